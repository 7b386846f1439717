"""The published wordings, read out of a user's own checkout of the official repository (allenai/molmo2).

Its files are parsed as data (literals.py); nothing of them is run, and none of their sentences are part of this
project. The names of lists, functions and variables below are where the code at commit f3cb108 keeps them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo2_nemo.data.literals import SourceFile, assigned_in, strings
from molmo2_nemo.data.templates import OWN
from molmo2_nemo.data.wordings import LISTS, NOT_PUBLISHED, Fields, Wordings, check_list, checked
from molmo2_nemo.errors import DataError, UserError, read_text

REPOSITORY = "allenai/molmo2"
FORMATTER = "olmo/preprocessing/data_formatter.py"
CHOICES = "olmo/preprocessing/multiple_choice_templates.py"
PIXMO = "olmo/data/pixmo_datasets.py"
VIDEO = "olmo/data/academic_video_datasets.py"
FILES = (FORMATTER, CHOICES, PIXMO, VIDEO)
TABLE, NO_POINTING = "GENERAL_PROMPTS_V1", "NO_POINT_PREFIX"

QUESTIONS = {  # our list -> the class and the variable in it
    "activitynet_label": ("ActivityNet", "templates"),
    "coin_label": ("COIN", "action_templates"),
    "epic_kitchens_label": ("EpicKitchens", "templates"),
    "moments_in_time_label": ("MomentsInTime", "templates"),
    "kinetics_label": ("Kinetics710", "templates"),
    "youcook2_label": ("Youcook2", "templates"),
    "charades_sta": ("CharadesSTA", "templates"),
    "paxion": ("Paxion", "QUESTION_TEMPLATES"),
}
OTHER_NAMES = {"explanation": "chain_of_thought"}  # our list -> its key in TABLE; the others have the same name
RENAMED = {  # a field as they write it -> as ours
    "start_time": "start",
    "end_time": "end",
    "timestamp": "time",
    "selected_label": "label",
    "selected_images": "images",
    "input_points": "point",
}
EXPECTED = {  # how many wordings there are at that commit
    **{"long_caption": 23, "short_caption": 11, "video_long_caption": 23, "video_short_caption": 11},
    **{"video_transcript": 5, "video_motion_caption": 10, "video_object_caption": 10},
    **{"video_clip_caption_start_end": 21, "video_clip_caption_start_end_in_seconds": 21},
    **{"video_clip_transcript_start_end": 5, "video_clip_transcript_start_end_in_seconds": 5},
    **{"video_frame_caption_timestamp": 13, "video_frame_caption_timestamp_in_seconds": 13},
    **{"video_short_answer": 15, "explanation": 1},
    **{"pointing": 43, "point_count": 60, "count_then_point": 6, "only_count": 6},
    **{"video_point": 43, "video_point_count": 60, "video_count_point": 6, "video_count": 6},
    **{"multi_image_pointing": 11, "multi_image_point_then_count": 14},
    **{"multi_image_count_then_point": 9, "multi_image_counting": 9},
    **{"video_point_track_per_frame": 10, "video_point_track_per_frame_default_fps": 8},
    **{"video_point_ground_start_end": 7, "video_single_point_track_per_frame": 12, "no_pointing": 32},
    **dict.fromkeys(QUESTIONS, 3),
    **{"kinetics_label": 4, "charades_sta": 4},
}
EXPECTED_CHOICE = {
    **{"common_markers": 4, "other_markers": 19, "bullets": 10, "separators": 2, "names": 4, "name_words": 4},
    **{"name_instructions": 16, "instructions": 14, "named_instructions": 2},
    **{"layouts": 15, "name_layouts": 9, "plain_layouts": 19},
}
UNUSED = frozenset(  # keys of TABLE that the published stages 2 and 3 never draw from
    {
        *("short_answer", "long_caption_no_pointing", "transcript", "refexp_pointing", "plain", "multiple_choice"),
        *("video_multiple_choice", "video_multiple_choice_w_subtitle", "video_multiple_choice_multiple_correct"),
        *("most_least_selected_image", "rank_by_cnt", "exact_cnt", "threshold_cnt"),
    }
)


@dataclass(frozen=True)
class Imported:
    """What was found."""

    wordings: Wordings
    notes: list[str]  # what differs from the commit that this module was written for


def read_checkout(folder: Path) -> Imported:
    """All wordings of a checkout of the official repository.

    Raises:
        UserError: not such a checkout, a file that cannot be parsed, wordings that are missing or have other fields;
            names file and list.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a checkout of {REPOSITORY}")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is no checkout of {REPOSITORY}: it has no {', no '.join(missing)}")
    formatter, choices, pixmo, video = (SourceFile(folder / name) for name in FILES)
    lists, new = _lists(formatter)
    prefixes = _texts(pixmo.value(NO_POINTING), f"{pixmo.path}: {NO_POINTING}")
    lists["no_pointing"] = list(check_list(prefixes, LISTS["no_pointing"], f"{pixmo.path}: {NO_POINTING}"))
    lists |= {name: _questions(video, *place) for name, place in QUESTIONS.items()}
    for name in NOT_PUBLISHED:
        lists[name] = list(OWN[name])
    choice = {name: read(choices) for name, read in CHOICE_PARTS.items()}
    wordings = checked(lists, choice, _source(folder), str(folder))
    return Imported(wordings, [*_other_counts(lists, EXPECTED), *_other_counts(choice, EXPECTED_CHOICE), *new])


def _lists(formatter: SourceFile) -> tuple[dict[str, list[str]], list[str]]:
    """The lists of TABLE that we use, with our names of fields; and a note for each key that is new."""
    table = formatter.value(TABLE)
    if not isinstance(table, dict):
        raise DataError(f"{formatter.path}: {TABLE} is not a dictionary of lists")
    elsewhere = {"no_pointing", *QUESTIONS}
    wanted = {ours: OTHER_NAMES.get(ours, ours) for ours in EXPECTED if ours not in elsewhere}
    missing = [key for key in wanted.values() if key not in table]
    reasons = {key: formatter.unread(f"{TABLE}['{key}']") for key in missing}
    if absent := [key for key, reason in reasons.items() if reason is None]:
        raise DataError(f"{formatter.path}: {TABLE} has no wordings for {', '.join(absent)}")
    for key, reason in reasons.items():
        raise DataError(f"{formatter.path}: {TABLE}[{key!r}] cannot be read: {reason}")
    lists = {}
    for ours, key in wanted.items():
        where = f"{formatter.path}: {TABLE}[{key!r}]"
        texts = [re.sub(r"{(\w+)}", _renamed, text) for text in _texts(table[key], where)]
        lists[ours] = list(check_list(texts, LISTS[ours], where))
    new = sorted(set(map(str, table)) - set(wanted.values()) - UNUSED)
    return lists, [f"{TABLE} has {key!r}, which is new and not used here" for key in new]


def _questions(file: SourceFile, name: str, variable: str) -> list[str]:
    """The questions that a data set's class has in a variable."""
    where = f"{file.path}: {name}.{variable}"
    found = next((node for node in file.classes() if node.name == name), None)
    if found is None:
        raise DataError(f"{file.path}: there is no class {name}")
    try:
        texts = assigned_in(found, variable)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if texts is None:
        raise DataError(f"{where}: nothing is assigned to it")
    return list(check_list(texts, Fields(), where))


def _renamed(field: re.Match[str]) -> str:
    return f"{{{RENAMED.get(field[1], field[1])}}}"


def _texts(value: Any, where: str) -> list[str]:
    try:
        return strings(value, None)
    except DataError:
        raise DataError(f"{where}: expected a list of texts") from None


def _other_counts(found: Mapping[str, Any], expected: Mapping[str, int]) -> Iterator[str]:
    for name, count in expected.items():
        if len(found[name]) != count:
            yield f"{name}: {len(found[name])} wordings, {count} expected"


# --- multiple choice --------------------------------------------------------------------------------------------------

DRAWN = "template_mc_question"


def _markers(name: str) -> Callable[[SourceFile], list[str]]:
    """Marks such as `%s) `, which become `{name}) `."""

    def read(file: SourceFile) -> list[str]:
        texts = _texts(file.value(name), f"{file.path}: {name}")
        for text in texts:
            if text.count("%s") != 1 or text.count("%") != 1:
                raise DataError(f"{file.path}: {name}: a mark needs %s once, found {text!r}")
        return [text.replace("%s", "{name}") for text in texts]

    return read


def _kinds(column: int) -> Callable[[SourceFile], list[Any]]:
    """Kinds of names of options, and the word for each: pairs of names and word in the variable `names`."""

    def read(file: SourceFile) -> list[Any]:
        pairs = file.local(DRAWN, "names")[0]
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise DataError(f"{file.path}: {DRAWN}(): names are not pairs of names and the word for one")
        values = [pair[column] for pair in pairs]
        return values if column else [list(names) for names in values]

    return read


def _layouts(function: str, *fields: str) -> Callable[[SourceFile], list[str]]:
    return lambda file: _texts(file.returned(function, *fields), f"{file.path}: {function}()")


def _instructions(number: int) -> Callable[[SourceFile], list[str]]:
    """The list that `build_option_instructions` starts with, or what it adds where options have names."""

    def read(file: SourceFile) -> list[str]:
        found = file.local("build_option_instructions", "out", "name")
        if len(found) != 2:
            raise DataError(f"{file.path}: build_option_instructions() has {len(found)} lists, 2 expected")
        return _texts(found[number], f"{file.path}: build_option_instructions()")

    return read


CHOICE_PARTS: dict[str, Callable[[SourceFile], list[Any]]] = {
    "common_markers": _markers("COMMON_MARKERS"),
    "other_markers": _markers("WEIRD_MARKERS"),
    "bullets": lambda file: file.local(DRAWN, "seps")[0],
    "separators": lambda file: file.local(DRAWN, "inline_seps", iterated=True)[0],
    "names": _kinds(0),
    "name_words": _kinds(1),
    "name_instructions": _layouts("build_option_name_instructions", "name"),
    "instructions": _instructions(0),
    "named_instructions": _instructions(1),
    "layouts": _layouts("build_option_templates", "question", "options", "instruction"),
    "name_layouts": _layouts("build_option_name_templates", "question", "options", "name"),
    "plain_layouts": _layouts("build_instruction_templates", "question", "options", "name"),
}


# --- where they are from ----------------------------------------------------------------------------------------------


def _source(folder: Path) -> dict[str, Any]:
    """The repository, the commit where it can be read, and the SHA-256 of each file."""
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    return {"repository": REPOSITORY, "commit": commit_of(folder), "files": sums}


def commit_of(folder: Path) -> str | None:
    """The commit that a git checkout stands on, from the files of its .git folder; None where they do not say."""
    git = folder / ".git"
    try:
        head = read_text(git / "HEAD").strip()
        name = head.removeprefix("ref: ")
        if name == head:
            found = head
        elif (git / name).is_file():
            found = read_text(git / name).strip()
        else:
            packed = (line.split(" ") for line in read_text(git / "packed-refs").splitlines())
            found = next((parts[0] for parts in packed if parts[1:] == [name]), "")
    except (OSError, UserError):
        return None
    return found if re.fullmatch(r"[0-9a-f]{40}", found) else None
