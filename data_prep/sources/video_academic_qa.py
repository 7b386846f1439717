"""Academic sets of questions about whole videos: one record per video, with its questions as branches."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from data_prep.sources.base import AnnotationJson, Context, File, Hub, Row, Sample, Skip, Source, Table, maybe
from data_prep.sources.schema import one_of
from data_prep.sources.shapes import choice
from data_prep.sources.shapes_video import (
    CELL,
    CHOICE,
    CHOSEN,
    EMPTY_ANSWER,
    MIXES,
    NO_SUCH_OPTION,
    OPEN,
    UNKNOWN_LICENCE,
    Branches,
    below,
    by,
    chosen,
    manual,
    open_ended,
    option_index,
    per_group,
    per_row,
    pick,
    text,
    whole,
    whole_video,
)

if TYPE_CHECKING:
    import numpy as np

# --- one function per schema -----------------------------------------------------------------------------------------


def _perception(row: Row, rng: np.random.Generator) -> Branches:
    return [chosen(q["question"], q["options"], q["answer_id"]) for q in row["mc_question"]]


def _five_options(row: Row, rng: np.random.Generator) -> Branches:
    return [chosen(row["question"], [row[f"a{i}"] for i in range(5)], row["answer"])]


def _intent(row: Row, rng: np.random.Generator) -> Branches:
    made = chosen(row["question"], [row[f"a{i}"] for i in range(5)], row["answer"])
    return made if isinstance(made, str) else [open_ended(row["question"], made["options"][made["answer_idx"]]), made]


def _nextqa(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    files = {text(row["video"]): row["value"] for row in ctx.rows(NEXTQA_FILES)}

    def visual(group: list[Row]) -> dict[str, Any]:
        name = text(group[0]["video"])
        return {"video": File(f"NExTVideo-all-videos/{files.get(name, name)}", f"NExTVideo/{files.get(name, name)}")}

    yield from per_group(lambda row: text(row["video"]), _five_options, visual)(rows, ctx)


NEXTQA_FILES = Table("map_vid_vidorID.json", key="video")


def _traffic(row: Row, rng: np.random.Generator) -> Branches:
    """Empty options are dropped, and the correct one is then found by its text."""
    options = [text(row[f"option{i}"]) for i in range(4)]
    index = option_index(row["answer"], options)
    if index is None or not options[index]:
        return NO_SUCH_OPTION
    left = [option for option in options if option]
    return [choice(text(row["q_body"]), left, left.index(options[index]), CHOICE)]


def _social(row: Row, rng: np.random.Generator) -> Branches:
    return [chosen(row["q"], [row[f"a{i}"] for i in range(4)], row["answer_idx"])]


def _open(row: Row, rng: np.random.Generator) -> Branches:
    return [open_ended(row["question"], row["answer"])]


def _clevrer(row: Row, rng: np.random.Generator) -> Branches:
    made: list[AnnotationJson | str] = []
    for question in row["questions"]:
        if question.get("answer") is not None:
            made.append(open_ended(question["question"], question["answer"]))
            continue
        options = question.get("choices") or ()
        right = [i for i, option in enumerate(options) if option["answer"] == "correct"]
        if len(right) == 1:
            made.append(chosen(question["question"], [option["choice"] for option in options], right[0]))
        else:
            made.append("several options are right" if right else NO_SUCH_OPTION)
    return made


def _clevrer_video(rows: list[Row]) -> dict[str, Any]:
    """The video, which is in a folder of a thousand: video_01000-02000/video_01234.mp4."""
    name = rows[0]["video_filename"]
    first = int(name.split(".")[0].removeprefix("video_")) // 1000 * 1000
    folder = f"video_{first:05d}-{first + 1000:05d}"
    return {"video": File(f"{folder}/{name}", f"video_train/{folder}/{name}", name)}


FUNQA_TIMED = frozenset({"H1", "C1", "M1", "C4", "C5"})  # tasks whose answers are times or scores
FUNQA_FOLDERS = {"H": "train_humor", "C": "train_creative", "M": "train_magic"}


def _funqa(row: Row, rng: np.random.Generator) -> Branches:
    """Open questions have a `task`; multiple choice has its options inside the instruction and `gt` counted from 1."""
    if row["visual_input"][:1] not in FUNQA_FOLDERS:
        return "neither humor, creative nor magic"
    if row.get("task") is not None:
        return (
            "task of times or scores" if row["task"] in FUNQA_TIMED else [open_ended(row["instruction"], row["output"])]
        )
    lines = row["instruction"].split("\n")
    index = whole(row.get("gt"))
    if len(lines) < 2 or index is None or index < 1:
        return NO_SUCH_OPTION
    try:
        found = ast.literal_eval(lines[-1].replace("The Options are:", "").strip())
    except (ValueError, SyntaxError):
        return "options cannot be read"
    options = [str(option).replace(f"Options {i}: ", "").strip() for i, option in enumerate(found, 1)]
    return [chosen(lines[-2].replace("The Question is:", "").strip(), options, index - 1)]


def _funqa_video(rows: list[Row]) -> dict[str, Any]:
    name = rows[0]["visual_input"]
    return {"video": below("train", f"{FUNQA_FOLDERS[name[:1]]}/{name}")}


def _narratives(row: Row, rng: np.random.Generator) -> Branches:
    return [open_ended(pair["raw_question"], pair["raw_answer"]) for pair in row["qa_pairs"]]


def _road_text(row: Row, rng: np.random.Generator) -> Branches:
    answers = [answer for answer in map(text, row["answer"]) if answer.strip()]
    return [open_ended(row["question"], pick(rng, answers))] if answers else EMPTY_ANSWER


FIVE = {f"a{i}": CELL for i in range(5)}

SOURCES: tuple[Source, ...] = (
    manual(
        "perception_test",
        CHOSEN,
        "training videos and all_train.json from https://github.com/google-deepmind/perception_test",
        Table("all_train.json", key="video_id"),
        "train_videos/<video_id>.mp4",
        {"video_id": str, "mc_question": [{"question": str, "options": [str], "answer_id": one_of(int, str)}]},
        per_row("video_id", _perception, whole_video("train_videos", "videos", column="video_id")),
        licence="CC BY 4.0",
        notes="Some videos have no question of this kind; they give no record.",
    ),
    manual(
        "nextqa_mc",
        CHOSEN,
        "train.csv and map_vid_vidorID.json (folder dataset/nextqa) and the videos from "
        "https://github.com/doc-doc/NExT-QA",
        Table("train.csv"),
        "NExTVideo-all-videos/<folder>/<number>.mp4, as map_vid_vidorID.json names them",
        {"video": CELL, "question": str, "answer": CELL, **FIVE},
        _nextqa,
        licence="MIT (questions); videos of VidOR",
    ),
    manual(
        "sutd_trafficqa",
        CHOSEN,
        "R2_train.jsonl and compressed_videos from https://zenodo.org/records/7431011, after asking for access",
        Table("R2_train.jsonl"),
        "compressed_videos/<vid_filename>",
        {"vid_filename": str, "q_body": str, "answer": CELL, **{f"option{i}": maybe(CELL) for i in range(4)}},
        per_group("vid_filename", _traffic, whole_video("compressed_videos", column="vid_filename")),
        licence="for research only, see the form",
        notes="Empty options are dropped.",
    ),
    Source(
        "social_iq2",
        MIXES,
        CHOSEN,
        Hub(
            "PediaMedAI/Social-IQ-Video",
            media="video/<vid_name>.mp4, from https://github.com/abwilf/Social-IQ-2.0-Challenge",
        ),
        UNKNOWN_LICENCE,
        {"vid_name": str, "q": str, "answer_idx": CELL, **{f"a{i}": str for i in range(4)}},
        per_group("vid_name", _social, whole_video("video", column="vid_name")),
    ),
    manual(
        "sportsqa_oe",
        OPEN,
        "meta-data (the zip of https://ndownloader.figshare.com/files/57448480) and the hub's "
        "HopLeeTop/Sports-QA videos",
        Table("meta-data/train.json"),
        "<video>.avi, .mp4 or .webm, as the rows name them",
        {"video": str, "question": str, "answer": CELL},
        per_group("video", _open, lambda rows: {"video": File(rows[0]["video"], f"videos/{rows[0]['video']}")}),
    ),
    manual(
        "clevrer",
        "video, question and answer, multiple choice",
        "train.json (questions) and video_train.zip, unpacked, from https://clevrer.csail.mit.edu",
        Table("train.json"),
        "video_00000-01000/video_00000.mp4 and so on",
        {"video_filename": str, "questions": [{"question": str}]},
        per_row("video_filename", _clevrer, _clevrer_video),
        notes="Multiple choice with several right options, or none, is left out.",
    ),
    manual(
        "funqa",
        "video, question and answer, multiple choice",
        "train.zip of the hub's fesvhtr/FunQA, unpacked; the questions are fetched from there",
        (Table("FunQA_train.json", repo="fesvhtr/FunQA"), Table("Funqa_mcqa_v1.json", repo="fesvhtr/FunQA")),
        "train/{train_humor,train_creative,train_magic}/<visual_input>",
        {"visual_input": str, "instruction": str, "task": maybe(str), "output": maybe(CELL), "gt": maybe(CELL)},
        per_group("visual_input", _funqa, _funqa_video),
        notes="Tasks H1, C1, M1, C4 and C5 are left out. The multiple-choice file covers all splits: its "
        "videos of other splits count as missing.",
    ),
    manual(
        "intent_qa",
        "video, question and answer, multiple choice",
        "the NExT-QA videos that https://github.com/JoseponLee/IntentQA links; train.csv is fetched from there",
        Table(
            "train.csv", url="https://raw.githubusercontent.com/JoseponLee/IntentQA/main/datasets/IntentQA/train.csv"
        ),
        "videos/<video_id>.mp4",
        {"video_id": CELL, "question": str, "answer": CELL, **FIVE},
        per_group(by("video_id"), _intent, whole_video("videos", column="video_id")),
        notes="Every question twice: open and as choice.",
    ),
    manual(
        "video_localized_narratives",
        OPEN,
        "videoqa.zip of https://google.github.io/video-localized-narratives, unpacked, and the videos of "
        "https://oops.cs.columbia.edu",
        Table("videoqa/text_output/oops_train/qa_text_output.json", at=("annotations",)),
        "oops_video/<video_name>.mp4 (or oops_video/train/)",
        {"video_name": str, "qa_pairs": [{"raw_question": str, "raw_answer": CELL}]},
        per_row(
            "video_name",
            _narratives,
            whole_video(
                "oops_video", "oops_video/train", "oops/oops_video", "oops/oops_video/train", column="video_name"
            ),
        ),
        licence="CC BY 4.0 (annotations)",
    ),
    manual(
        "road_text_vqa",
        OPEN,
        "train.json and videos from https://github.com/georg3tom/RoadtextVQA",
        Table("train.json", at=("data",)),
        "videos/<video>",
        {"video": str, "question": str, "answer": [CELL]},
        per_group("video", _road_text, whole_video("videos")),
        notes="Of several answers one is drawn, once.",
    ),
)
