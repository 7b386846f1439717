"""Made rows of published benchmarks, and how the released loaders and formatter word their questions, for
tests/evaluation/test_official_prompts.py.

    python tests/evaluation/official/prompts.py CHECKOUT

writes prompts.json.gz beside this file. CHECKOUT is a checkout of allenai/molmo2; what its olmo/data imports must be
installed. Nothing is downloaded: the loaders read the rows made here. A picture is {"picture": its number} in them.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import string
import sys
import tempfile
from pathlib import Path
from typing import Any

ROWS = 60  # of each benchmark
OUT = Path(__file__).parent / "prompts.json.gz"
VIDEOS = "video_datasets"
Rows = list[dict[str, Any]]
# Text, pictures, part of the video, subtitles
Asked = tuple[str, int, list[float] | None, list[tuple[float, float, str]]]

WORDS = """which colour is it in <image 1> the <image> A. B) (C) 3.5 "it's" how many? Hint: Question: 10:30 Straße red,
blue \\frac{1}{2} no yes None [] {} % $5 left right Answer: Options: a the cat""".split()


def text(rng: random.Random, most: int = 9) -> str:
    """Words, of which some look like parts of a layout; at times more than one line, or a space at an end."""
    said = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))
    return rng.choice([said] * 5 + [said + " ", said.replace(" ", "\n", 1), said.capitalize() + "?"])


def line(rng: random.Random, most: int = 5) -> str:
    return " ".join(text(rng, most).split())


def options(rng: random.Random, least: int = 2, most: int = 6) -> list[str]:
    """Different texts."""
    return list({line(rng, 3): None for _ in range(rng.randint(least, most) * 3)})[: rng.randint(least, most)] + ["red"]


def lettered(texts: list[str], form: str = "{}. {}") -> list[str]:
    return [form.format(letter, given) for letter, given in zip(string.ascii_uppercase, texts, strict=False)]


def letter(rng: random.Random, texts: list[str]) -> str:
    return string.ascii_uppercase[rng.randrange(len(texts))]


def mmmu(rng: random.Random) -> dict[str, Rows]:
    rows: Rows = []
    for number in range(ROWS):
        texts = options(rng)
        if rng.random() < 0.2:
            texts = [f"<img='{given}.png'>" for given in "abc"]
        kind = rng.choice(["multiple-choice", "multiple-choice", "open"])
        rows.append(
            {
                "id": f"validation_Art_Theory_{number}",
                "question": text(rng),
                "options": repr(texts if kind != "open" else []),
                "answer": letter(rng, texts) if kind != "open" else line(rng),
                "question_type": kind,
                **{f"image_{n}": {"picture": n} if n == 1 or rng.random() < 0.3 else None for n in range(1, 8)},
            }
        )
    return {"MMMU/Art_Theory/validation-00000-of-00001.parquet": rows}


def mathvista(rng: random.Random) -> dict[str, Rows]:
    rows: Rows = []
    for number in range(ROWS):
        texts, kind = options(rng), rng.choice(["multi_choice", "free_form"])
        asked = text(rng)
        rows.append(
            {
                "pid": str(number),
                "question": rng.choice(["{}", "Hint: {1}\nQuestion: {0}", "{0}\nHint: {1}"]).format(asked, line(rng)),
                "decoded_image": {"picture": number},
                "choices": texts if kind == "multi_choice" else None,
                "precision": 1.0,
                "answer": rng.choice(texts) if kind == "multi_choice" else "1.2",
                "question_type": kind,
                "answer_type": "text" if kind == "multi_choice" else rng.choice(["float", "integer"]),
                "metadata": {"task": "x"},
            }
        )
    return {"MathVista/data/testmini-00000-of-00001.parquet": rows}


def realworldqa(rng: random.Random) -> dict[str, Rows]:
    rows: Rows = []
    for number in range(ROWS):
        texts = options(rng, 1, 3)
        short = f"{line(rng)}\nPlease answer directly with a single word or number."
        end = "Please answer directly with only the letter of the correct option and nothing else."
        choice = "\n".join([line(rng), "", *lettered(texts), end])
        choices = {"question": choice, "answer": letter(rng, texts)}
        asked = rng.choice([choices, {"question": short, "answer": line(rng)}])
        rows.append({"image": {"picture": number}, **asked})
    return {"RealworldQA/data/test-00000-of-00002.parquet": rows}


def muirbench(rng: random.Random) -> dict[str, Rows]:
    rows: Rows = []
    for number in range(ROWS):
        texts = [*options(rng), "<image>"]
        rows.append(
            {
                **{"idx": str(number), "task": "Counting", "image_relation": "x", "image_type": "y"},
                "counterpart_idx": "0",
                "question": rng.choice(["<image> {} <image>", "{}"]).format(text(rng)),
                "options": texts,
                "answer": letter(rng, texts),
                "image_list": [{"picture": n} for n in range(rng.randint(2, 9))],
            }
        )
    return {"MUIRBENCH/data/test-00000-of-00003.parquet": rows}


def blink(rng: random.Random) -> dict[str, Rows]:
    rows: Rows = []
    for number in range(ROWS):
        texts, pictures = options(rng, 2, 3), rng.randint(1, 4)
        rows.append(
            {
                **{"idx": f"val_Jigsaw_{number}", "sub_task": "Jigsaw", "question": text(rng)},
                "prompt": "\n".join([text(rng), *lettered(texts, "({}) {}")]),
                "choices": texts,
                "answer": f"({letter(rng, texts)})",
                **{f"image_{n}": {"picture": n} if n <= pictures else None for n in range(1, 5)},
            }
        )
    return {"BLINK/Jigsaw/val-00000-of-00001.parquet": rows}


def mmiu(rng: random.Random) -> dict[str, Rows]:
    rows: Rows = []
    for _ in range(ROWS):
        texts = options(rng)
        row = {"task": "sorting", "visual_input_component": "x", "source": "y", "context": "z", "question": text(rng)}
        row |= {"options": "\n".join(lettered(texts, "{}: {}")), "output": letter(rng, texts)}
        images = [f"./2D-spatial/sorting/{n}.png" for n in range(rng.randint(1, 9))]
        rows.append({**row, "input_image_path": images})
    return {"MMIU-Benchmark/all.parquet": rows}


def osworld_g(rng: random.Random) -> dict[str, Rows]:
    kinds = {"bbox": [10.0, 20.0, 30.0, 5.0], "polygon": [1.0, 1.0, 5.0, 1.0, 5.0, 9.0], "refusal": [-1.0] * 4}
    return {
        "OSWorld-G/data/test-00000-of-00001.parquet": [
            {
                **{"id": str(n), "image": {"picture": n}, "instruction": text(rng)},
                **dict(zip(("box_type", "box_coordinates"), rng.choice(list(kinds.items())), strict=True)),
            }
            for n in range(ROWS)
        ]
    }


def mvbench(rng: random.Random) -> dict[str, Rows]:
    from olmo.data.academic_video_datasets import MVBench

    found = {}
    for file, _ in MVBench.data_list.values():
        rows: Rows = []
        for number in range(3):
            texts = options(rng)
            row = {"video": f"{number}.mp4", "question": text(rng), "candidates": texts, "answer": rng.choice(texts)}
            rows.append(row | ({"start": 1.5, "end": 4.0} if rng.random() < 0.3 else {}))
        found[f"{VIDEOS}/MVBench/json/{file}"] = rows
    return found


def temporalbench(rng: random.Random) -> dict[str, Rows]:
    found = {}
    for kind in ("short_qa", "long_qa"):
        rows: Rows = []
        for number in range(ROWS // 2):
            texts = options(rng, 1, 3)
            asked = [line(rng), *lettered(texts), "Answer with the option's letter from the given choices directly."]
            row = {"idx": f"{kind}_{number}", "video_name": f"{kind}/{number // 3}.mp4", "GT": letter(rng, texts)}
            rows.append({**row, "question": "\n".join(asked)})
        found[f"{VIDEOS}/TemporalBench/temporalbench_{kind}.json"] = rows
    return found


def tomato(rng: random.Random) -> dict[str, Any]:
    found = {}
    for kind in ("count", "direction", "rotation", "shape&trend", "velocity&frequency", "visual_cues"):
        rows = {}
        for number in range(ROWS // 6):
            texts = options(rng)
            row = {"question": text(rng), "options": texts, "answer": rng.randrange(len(texts)), "key": f"0{number}"}
            rows[str(number)] = {**row, "demonstration_type": "human", "motion_type": "x"}
        found[f"{VIDEOS}/TOMATO/data/{kind}.json"] = rows
    return found


def mlvu(rng: random.Random) -> dict[str, Rows]:
    found = {}
    for place, kind in enumerate(("plotQA", "needle", "ego", "count", "order", "anomaly_reco", "topic_reasoning")):
        rows: Rows = []
        for number in range(ROWS // 6):
            texts = options(rng)
            row = {"video": f"{number}.mp4", "question": text(rng), "candidates": texts, "answer": rng.choice(texts)}
            rows.append({**row, "duration": 1000 * place + number})  # the released loader sorts by it
        found[f"{VIDEOS}/MVLU/MLVU/json/{place + 1}_{kind}.json"] = rows
    return found


def motionbench(rng: random.Random) -> dict[str, Rows]:
    rows: Rows = []
    for number in range(ROWS):
        texts = options(rng)
        asked = "\n".join([line(rng), *lettered(texts)])
        answers = [letter(rng, texts), "NA"]
        qa = [{"uid": f"{number}{n}", "question": asked, "answer": answer} for n, answer in enumerate(answers)]
        rows.append({"key": str(number), "video_path": "a.mp4", "question_type": "x", "qa": qa})
    return {f"{VIDEOS}/MotionBench/MotionBench/video_info.meta.jsonl": rows}


def lines(rng: random.Random) -> list[tuple[float, float, str]]:
    """Subtitles at different times."""
    return [(0.5 * n, round(0.5 * n + rng.uniform(0.1, 9), 2), line(rng)) for n in rng.sample(range(90), 12)]


def longvideobench(rng: random.Random) -> dict[str, Any]:
    rows: Rows = []
    files: dict[str, Any] = {}
    for number in range(ROWS):
        texts, name = options(rng), f"{number}.json"
        row = {"id": str(number), "video_id": "a", "video_path": "a.mp4", "question": text(rng), "candidates": texts}
        row |= {"correct_choice": rng.randrange(len(texts)), "duration_group": 15, "question_category": "S2E"}
        row |= {"starting_timestamp_for_subtitles": rng.choice([0, 10.25, 20]), "duration": rng.choice([5.5, 15, 40])}
        rows.append(row | {"level": "L1", "subtitle_path": name})
        spoken: Rows = [
            {"timestamp": [start, rng.choice([end, end, None, int(end) + 1])], "text": said}
            for start, end, said in lines(rng)
        ]
        if rng.random() < 0.3:
            spoken = [
                {"start": f"00:00:{start:06.3f}", "end": f"00:01:{end % 60:06.3f}", "line": said}
                for start, end, said in lines(rng)
            ]
        files[f"{VIDEOS}/LongVideoBench/subtitles/{name}"] = spoken
    return {f"{VIDEOS}/LongVideoBench/lvb_val.json": rows, **files}


def lvbench(rng: random.Random) -> dict[str, Rows]:
    rows: Rows = []
    for number in range(ROWS // 2):
        asked = []
        for uid in range(2):
            texts = [line(rng) for _ in range(4)]
            qa = {"uid": f"{number}{uid}", "answer": letter(rng, texts), "question_type": ["x"], "time_reference": "0"}
            asked.append({**qa, "question": "\n".join([line(rng), *lettered(texts, "({}) {}")])})
        rows.append({"key": str(number), "type": "x", "qa": asked})
    return {f"{VIDEOS}/LVBench/video_info.meta.jsonl": rows}


def videomme(rng: random.Random) -> dict[str, Any]:
    rows: Rows = []
    spoken = {}
    for number in range(ROWS):
        texts = lettered([line(rng) for _ in range(4)])
        row = {
            "video_id": "1",
            "videoID": f"v{number}",
            "question_id": str(number),
            "question": text(rng),
            "options": texts,
        }
        row |= {"answer": letter(rng, texts), "duration": "short", "domain": "x", "sub_category": "y"}
        rows.append(row | {"task_type": "z"})
        if rng.random() < 0.7:
            heard = [{"start": start, "end": end, "text": said} for start, end, said in lines(rng)]
            spoken[f"v{number}"] = {str(place): entry for place, entry in enumerate(heard)}
    return {
        f"{VIDEOS}/Video-MME/videomme/test-00000-of-00001.parquet": rows,
        f"{VIDEOS}/Video-MME/subtitles.json": spoken,
    }


def longvideobench_subtitles(rng: random.Random) -> dict[str, Any]:
    return longvideobench(rng)


def videomme_subtitles(rng: random.Random) -> dict[str, Any]:
    return videomme(rng)


def videoevalpro(rng: random.Random) -> dict[str, Rows]:
    rows: Rows = []
    for _ in range(ROWS):
        texts = lettered(options(rng))
        row = {"video": "a.mp4", "question": text(rng), "options": texts, "answer": letter(rng, texts)}
        rows.append({**row, "answer_text": "x", "source": "y", "qa_type": "z", "qa_subtype": "z"})
    return {f"{VIDEOS}/VideoEvalPro/data/test-00000-of-00001.parquet": rows}


def egoschema(rng: random.Random) -> dict[str, Rows]:
    rows: Rows = []
    for number in range(ROWS):
        texts = lettered([line(rng) for _ in range(5)])
        row = {"video_idx": "a", "question_idx": str(number), "question": text(rng), "option": texts}
        rows.append({**row, "answer": str(rng.randrange(5))})
    return {f"{VIDEOS}/egoschema/Subset/test-00000-of-00001.parquet": rows}


def nextqa(rng: random.Random) -> dict[str, Rows]:
    rows: Rows = []
    for number in range(ROWS):
        row = {"video": number, "question": text(rng), "type": "CW", "answer": rng.randrange(5)}
        rows.append(row | {f"a{n}": text(rng, 3) for n in range(5)})
    return {f"{VIDEOS}/NeXTQA/MC/test-00000-of-00001.parquet": rows}


def perception_test(rng: random.Random) -> dict[str, Rows]:
    rows: Rows = []
    for number in range(ROWS):
        texts = [line(rng) for _ in range(3)]
        row = {"video_name": "a", "question_id": str(number), "question": text(rng), "options": texts}
        rows.append({**row, "answer_id": str(rng.randrange(3)), "area": "x", "reasoning": "y"})
    return {f"{VIDEOS}/perception_test/mc_question_val/validation-00000-of-00001.parquet": rows}


MADE = {
    make.__name__: make
    for make in (
        *(mmmu, mathvista, realworldqa, muirbench, blink, mmiu, osworld_g, mvbench, temporalbench, tomato, mlvu),
        *(longvideobench, longvideobench_subtitles, lvbench, videomme, videomme_subtitles, videoevalpro, egoschema),
        *(nextqa, perception_test, motionbench),
    )
}


def written(path: Path, rows: Any) -> None:
    """A table in the form that its name says."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = path.suffix == ".jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows))


def released(name: str, files: dict[str, Any]) -> Any:
    """The released data set of a benchmark, which reads the made rows."""
    import datasets
    from olmo.data import academic_image_datasets as image
    from olmo.data import academic_multi_image_datasets as several
    from olmo.data import academic_video_datasets as video

    def load_dataset(path: str, name: str | None = None, split: str | None = None, **_: Any) -> Any:
        (rows,) = files.values()
        part = rows if name in (None, "Art_Theory", "Jigsaw") else []
        return part if split else {"test": part}

    datasets.load_dataset = load_dataset
    datasets.concatenate_datasets = lambda parts: sum(parts, [])
    several.MuirBench.legacy = False  # which its code reads and does not set
    made: dict[str, Any] = {
        "mmmu": lambda: image.MMMU("validation"),
        "mathvista": lambda: image.MathVista("testmini"),
        "realworldqa": lambda: image.RealWorldQa("no_instruction"),
        "muirbench": lambda: several.MuirBench("test"),
        "blink": lambda: several.BLINK("validation"),
        "mmiu": lambda: several.MMIU("test"),
        "osworld_g": lambda: image.OSWorldG("none"),
        "mvbench": lambda: video.MVBench("validation"),
        "temporalbench": lambda: video.TemporalBenchQa("test", format="mc"),
        "tomato": lambda: video.Tomato("test"),
        "mlvu": lambda: video.MLVU("validation", task="multiple-choice"),
        "longvideobench": lambda: video.LongVideoBench("validation"),
        "longvideobench_subtitles": lambda: video.LongVideoBench("validation", with_subtitle=True),
        "lvbench": lambda: video.LVBench(),
        "motionbench": lambda: video.MotionBench("validation"),
        "videomme_subtitles": lambda: video.VideoMME("validation", with_subtitle=True),
        "videomme": lambda: video.VideoMME("validation"),
        "videoevalpro": lambda: video.VideoEvalProMC("test"),
        "egoschema": lambda: video.EgoSchema("validation"),
        "nextqa": lambda: video.NeXTQA("test", task="multiple-choice"),
        "perception_test": lambda: video.PerceptionTest("validation"),
    }
    return made[name]()


def asked(example: dict[str, Any], formatter: Any) -> Asked:
    """The first message of a question, its pictures, the part of its video and its subtitles."""
    import numpy as np

    images = example.get("image")
    metadata = example.get("metadata", {})
    clip = None if metadata.get("clip_start_time") is None else [metadata["clip_start_time"], metadata["clip_end_time"]]
    count = len(images) if isinstance(images, list) else int(images is not None)
    messages, _ = formatter(example, is_training=False, for_inference=True, rng=np.random.RandomState(0))
    return messages[0], count, clip, [(*times, said) for times, said in example.get("subtitle", {}).items()]


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    with tempfile.TemporaryDirectory() as root:
        os.environ["MOLMO_DATA_DIR"] = root
        import numpy as np
        from olmo.preprocessing.data_formatter import DataFormatter

        written(Path(root) / VIDEOS / "MotionBench/MotionBench/public-dataset/a.mp4", [])  # only has to be there
        formatter = DataFormatter(
            prompt_templates="uber_model_v2", message_format="none", system_prompt="demo_or_style_v2"
        )
        rng = random.Random(18)
        cases = {}
        for name, make in MADE.items():
            files = make(rng)
            for place, rows in files.items():
                if place.startswith(VIDEOS):
                    written(Path(root) / place, rows)
            data = released(name, files)
            found = [asked(data.get(number, np.random.RandomState(0)), formatter) for number in range(len(data))]
            cases[name] = {"files": files, "asked": found}
    content = json.dumps(cases, ensure_ascii=False, separators=(",", ":")).encode()
    OUT.write_bytes(gzip.compress(content, mtime=0))
    print({name: len(case["asked"]) for name, case in cases.items()}, OUT.stat().st_size)


if __name__ == "__main__":
    main()
