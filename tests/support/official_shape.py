"""A folder shaped like a checkout of the official repository, with made-up sentences where it has its wordings.

Counts, names and the kinds of expressions are those that the reader expects; every sentence is this file's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

FILES = {
    "formatter": "olmo/preprocessing/data_formatter.py",
    "choices": "olmo/preprocessing/multiple_choice_templates.py",
    "pixmo": "olmo/data/pixmo_datasets.py",
    "video": "olmo/data/academic_video_datasets.py",
}
TABLE = {  # key -> (number of wordings, their fields) of the lists that are written out
    "short_answer": (15, "{question}"),
    "short_caption": (11, ""),
    "long_caption": (23, ""),
    "video_motion_caption": (10, ""),
    "video_object_caption": (10, "{object}"),
    "video_clip_caption_start_end": (21, "{start_time} {end_time}"),
    "video_clip_caption_start_end_in_seconds": (21, "{start_time} {end_time}"),
    "video_frame_caption_timestamp": (13, "{timestamp}"),
    "video_frame_caption_timestamp_in_seconds": (13, "{timestamp}"),
    "video_clip_transcript_start_end": (5, "{start_time} {end_time}"),
    "video_clip_transcript_start_end_in_seconds": (5, "{start_time} {end_time}"),
    "transcript": (5, ""),
    "plain": (1, "{question}"),
    "pointing": (43, "{label}"),
    "point_count": (60, "{label}"),
    "count_then_point": (6, "{label}"),
    "only_count": (6, "{label}"),
    "chain_of_thought": (1, "{question}"),
    "multi_image_pointing": (11, "{selected_label} {selected_images}"),
    "multi_image_point_then_count": (14, "{selected_label} {selected_images}"),
    "multi_image_counting": (9, "{selected_label}"),
    "multi_image_count_then_point": (9, "{selected_label} {selected_images}"),
    "rank_by_cnt": (3, "{selected_images} {selected_label} {n}"),
}
TRACKS = {
    "video_point_track_per_frame_default_fps": (8, "{label}"),
    "video_point_track_per_frame": (10, "{label} {fps}"),
    "video_point_ground_start_end": (7, "{label}"),
    "video_single_point_track_per_frame": (12, "{input_points} {fps}"),
}
FOR_VIDEO = {  # key -> the list that it is made of
    "video_short_caption": "short_caption",
    "video_long_caption": "long_caption",
    "video_transcript": "transcript",
    "video_short_answer": "short_answer",
    "video_point": "pointing",
    "video_point_count": "point_count",
    "video_count": "only_count",
    "video_count_point": "count_then_point",
}


def _list(key: str, count: int, fields: str) -> list[str]:
    return [f"made {key} {i} of an image: {fields}".rstrip(" :") for i in range(count)]


def formatter() -> str:
    """The file with the lists; the module stops at once if it is ever imported."""
    written = ",\n".join(
        f'    "{key}": [\n' + "".join(f"        {t!r},\n" for t in _list(key, *of)) + "    ]"
        for key, of in TABLE.items()
    )
    lines = [
        '"""Made for a test."""',
        "import torch_of_somebody_else",
        'raise SystemExit("this was run")',
        "",
        "GENERAL_PROMPTS_V1 = {",
        written + ",",
        "}",
        "",
    ]
    for key, source in FOR_VIDEO.items():
        lines.append(
            f'GENERAL_PROMPTS_V1["{key}"] = [p.replace("image", "video").replace("photo", "video") '
            f'for p in GENERAL_PROMPTS_V1["{source}"]]'
        )
    for key, of in TRACKS.items():
        lines += [f'GENERAL_PROMPTS_V1["{key}"] = [', *(f"    {t!r}," for t in _list(key, *of)), "]"]
    lines += ['OTHER = torch_of_somebody_else.load("file")', "def run():", "    return GENERAL_PROMPTS_V1", ""]
    return "\n".join(lines)


def choices() -> str:
    def function(name: str, parameters: str, sentence: str, count: int) -> str:
        body = "".join(f'        f"{name} {i}: {sentence}",\n' for i in range(count))
        return f"def {name}({parameters}):\n    assert True\n    return [\n{body}    ]\n\n"

    parts = "{question}\\n{options}"
    return "".join(
        [
            "import string\n\nraise SystemExit('this was run')\n\n",
            function("build_option_name_instructions", "option_type", "say the {option_type}", 16),
            "def build_option_instructions(option_type):\n    out = [\n",
            "".join(f'        f"choose well {i}",\n' for i in range(14)),
            "    ]\n    if option_type is not None:\n        out += [\n",
            '            f"the {option_type} and more",\n            f"all with its {option_type}",\n',
            "        ]\n    return out\n\n",
            function("build_option_templates", "q, opts, instr", "{q}\\n\\n{opts}\\n{instr}", 15),
            function("build_option_name_templates", "question, options, option_type", parts + " by {option_type}", 9),
            function("build_instruction_templates", "question, options, option_type", parts, 19),
            'COMMON_MARKERS = ["%s. ", "%s) ", "%s: ", "(%s) "]\n',
            'WEIRD_MARKERS = ["%s; ", "%s ", "%s.  ", "%s)", "%s=", "%s/",\n',
            '                 "%s    ", "{%s} ", "%s -> ", "[%s] ", "<%s> "]\n',
            "WEIRD_MARKERS = sorted(set(WEIRD_MARKERS + [\n",
            '    x.strip() for x in COMMON_MARKERS + WEIRD_MARKERS if x.strip() != "%s"]))\n\n',
            "def template_mc_question(question, options, rng):\n    options = [str(x) for x in options]\n",
            "    marker = rng.choice(COMMON_MARKERS)\n    names = [\n",
            '        (string.ascii_uppercase, "letter"),\n        (string.ascii_lowercase, "letter"),\n',
            '        ([str(i) for i in range(1, 21)], "number"),\n',
            '        (["i", "ii", "iii", "iv", "v"], "numeral"),\n',
            "    ]\n",
            '    inline_seps = [x for x in [";", " // "] if x not in marker and any(o != x for o in options)]\n',
            '    if rng.random() < 0.5:\n        seps = ["*", "-", "+", "~", "o", "x", "=", "#", "@", "&"]\n',
            "    return names, inline_seps, seps\n",
        ]
    )


def pixmo() -> str:
    texts = "".join(f'    "made request {i} without points:\\n",\n' for i in range(32))
    return f"import os\n\nraise SystemExit('this was run')\n\nNO_POINT_PREFIX = [\n{texts}]\n\nclass Some:\n    pass\n"


QUESTIONS = {  # class -> the variable with its questions, and how many
    "ActivityNet": ("templates", 3),
    "COIN": ("action_templates", 3),
    "EpicKitchens": ("templates", 3),
    "MomentsInTime": ("templates", 3),
    "Kinetics710": ("templates", 4),
    "Youcook2": ("templates", 3),
    "CharadesSTA": ("templates", 4),
    "Paxion": ("QUESTION_TEMPLATES", 3),
}


def video() -> str:
    lines = ["import somebody_elses_loader", "", "raise SystemExit('this was run')", ""]
    for name, (variable, count) in QUESTIONS.items():
        lines += [f"class {name}(Base):", "    path = join(HOME, 'x')", f"    {variable} = ["]
        lines += [f"        'made {name} {i}, what is done?'," for i in range(count)]
        lines += ["    ]", "", "    def load(self):", "        return random.choice(self.templates)", ""]
    return "\n".join(lines)


MAKERS: dict[str, Callable[[], str]] = {"formatter": formatter, "choices": choices, "pixmo": pixmo, "video": video}


def write_checkout(folder: Path, **changed: tuple[str, str]) -> Path:
    """Make the folder.

    Args:
        changed: of the files `formatter`, `choices` and `pixmo`: what is replaced in them, and by what.
    """
    for name, path in FILES.items():
        text = MAKERS[name]()
        if name in changed:
            old, new = changed[name]
            assert old in text, (name, old)
            text = text.replace(old, new, 1)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return folder
