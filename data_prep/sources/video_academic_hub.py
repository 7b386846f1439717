"""Academic video sets whose annotations are fetched from the Hugging Face Hub (most of them repackaged for Molmo2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from data_prep.sources.base import (
    AnnotationJson,
    Context,
    File,
    Hub,
    Manual,
    Row,
    Sample,
    Skip,
    Source,
    Table,
    maybe,
)
from data_prep.sources.common import local
from data_prep.sources.schema import one_of
from data_prep.sources.shapes import qa, shuffled_choice
from data_prep.sources.shapes_video import (
    CELL,
    CHOICE,
    CHOSEN,
    CORRUPT,
    EMPTY_ANSWER,
    MIXES,
    ODC,
    OPEN,
    SHORT,
    Branches,
    UniqueKeys,
    chosen,
    manual,
    open_ended,
    per_group,
    per_row,
    pick,
    text,
    whole_video,
)

if TYPE_CHECKING:
    import numpy as np

CAMERA_REPO, NEWS_REPO, TGIF_REPO = (
    "allenai/Molmo2-CameraBenchTrain",
    "allenai/Molmo2-NewsVideoQA",
    "allenai/Molmo2-TGIF",
)

# --- LLaVA-Video-178K: three academic sets in their own wording ------------------------------------------------------

LLAVA_REPO = "lmms-lab/LLaVA-Video-178K"
LLAVA_SETS = {
    "open_ended": (
        *("0_30_s_activitynetqa", "0_30_s_nextqa", "30_60_s_activitynetqa", "30_60_s_nextqa"),
        *("1_2_m_activitynetqa", "1_2_m_nextqa", "2_3_m_activitynetqa", "2_3_m_nextqa"),
    ),
    "multi_choice": (
        *("0_30_s_perceptiontest", "0_30_s_nextqa", "30_60_s_perceptiontest", "30_60_s_nextqa"),
        *("1_2_m_nextqa", "2_3_m_nextqa"),
    ),
}


def _llava(kind: str, mark: str) -> Source:
    """Questions as published; options are part of the question's text, so multiple choice is not reformatted."""
    style = SHORT if kind == "open_ended" else CHOICE

    def branches(row: Row, rng: np.random.Generator) -> Branches:
        said = [turn["value"] for turn in row["conversations"]]
        made: list[AnnotationJson | str] = []
        for question, answer in zip(said[::2], said[1::2], strict=False):
            question, answer = question.removeprefix("<image>\n"), answer.strip()
            made.append(qa(question, answer, style) if answer else EMPTY_ANSWER)
        return made

    return Source(
        name=f"llava_video_{'oe' if kind == 'open_ended' else 'mc'}_academic",
        mixes=MIXES,
        kind=OPEN if kind == "open_ended" else CHOSEN,
        origin=Manual(
            fetch=f"videos: the .tar.gz archives of these folders of the hub's {LLAVA_REPO}, unpacked where they lie "
            f"({', '.join(LLAVA_SETS[kind])}); the questions are fetched from there",
            tables=tuple(
                Table(f"{name}/{name}_{mark}_qa_processed.json", repo=LLAVA_REPO) for name in LLAVA_SETS[kind]
            ),
            media=("<data_source>/<video>, as the rows name them",),
        ),
        licence="Apache 2.0 (questions); the videos keep the licence of ActivityNet, NExT-QA and Perception Test",
        fields={"id": str, "data_source": str, "video": str, "conversations": [{"value": str}]},
        records=per_group(
            lambda row: f"{row['id']}_{row['data_source']}_{row['video']}",
            branches,
            lambda rows: {"video": File(f"{rows[0]['data_source']}/{rows[0]['video']}")},
        ),
        notes="Rows of one id and video are one record. Empty answers are left out.",
    )


# --- repackaged sets

NEWS_CORRUPT = frozenset({"389x18", "76x16", "254x17", "254x21", "389x15", "254x20", "389x17"})


def _news(row: Row, rng: np.random.Generator) -> Branches:
    return CORRUPT if row["uni_clipped_id"] in NEWS_CORRUPT else [open_ended(row["question"], row["answer"])]


def _camera(row: Row, rng: np.random.Generator) -> Branches:
    return [shuffled_choice(q["Question"], q["Answer"], q["NegativeAnswers"], rng) for q in row["mc_qa_list"]]


TGIF_OPTIONS = [f"a{i}" for i in range(1, 6)]


def _tgif(row: Row, rng: np.random.Generator) -> Branches:
    """Actions and transitions both as multiple choice and as open questions; counts and frame questions only open."""
    if not any(kind in row["__table__"] for kind in ("_action_", "_transition_")):
        return [open_ended(row["question"], row["answer"])]
    made = chosen(row["question"], [row.get(name) for name in TGIF_OPTIONS], row["answer"])
    if isinstance(made, str):
        return made
    return [made, open_ended(row["question"], made["options"][made["answer_idx"]])]


def _cinepile(row: Row, rng: np.random.Generator) -> Branches:
    style = f"{CHOICE}_w_subtitle" if row.get("subtitles") else CHOICE
    found = [chosen(q["question"], q["choices"], q["answer_key_position"]) for q in row["examples"]]
    return [branch if isinstance(branch, str) else {**branch, "style": style} for branch in found]


def _cinepile_seen(rows: list[Row]) -> dict[str, Any]:
    name, words = rows[0]["video_id"], rows[0].get("subtitles") or ""
    return {
        "video": File(f"videos/{name}/{name}", f"videos/{name}"),
        "subtitles": words.replace("<subtitle> ", "").strip(),
    }


COUNTIX_REPO = "allenai/Molmo2-Countix"
COUNTIX_QUESTIONS = Table("class_to_question.json", repo=COUNTIX_REPO, key="class")


def _countix(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    """One record per row; the question is one of those of the row's class."""
    questions = {row["class"]: row["value"] for row in ctx.rows(COUNTIX_QUESTIONS)}
    unique = UniqueKeys()
    for row in rows:
        key = unique(row["video_path"])
        if not questions.get(row["class"]):
            yield Skip(key, "no question for the class")
            continue
        asked = pick(ctx.rng(key), questions[row["class"]])
        video = File(f"kinetics700/{row['video_path']}", row["video_path"])
        yield Sample(key, [qa(asked, text(row["count"]), SHORT)], video=video)


SOURCES: tuple[Source, ...] = (
    manual(
        "tgif",
        "video, question and answer, multiple choice",
        "GIFs from https://github.com/raingo/TGIF-Release, converted to MP4 (ffmpeg -i x.gif -pix_fmt yuv420p "
        "x.mp4); the "
        "questions are fetched from the hub",
        tuple(
            Table(f"Train_{part}_question.csv", delimiter="\t", repo=TGIF_REPO)
            for part in ("action", "count", "transition", "frameqa")
        ),
        "videos/<gif_name>.mp4",
        {"gif_name": str, "question": str, "answer": CELL, **{name: maybe(CELL) for name in TGIF_OPTIONS}},
        per_group("gif_name", _tgif, whole_video("videos", column="gif_name")),
        licence=ODC,
        notes="Actions and transitions count twice: as choice and as open question.",
    ),
    _llava("multi_choice", "mc"),
    _llava("open_ended", "oe"),
    manual(
        "news_video_qa_filtered",
        OPEN,
        "videos from https://cvit.iiit.ac.in/research/projects/cvit-projects/videoqa; the questions are fetched "
        "from the hub",
        Table("json_files/raw_files/new_train.json", repo=NEWS_REPO),
        "videos/train/<uni_clipped_id>.mp4",
        {"uni_clipped_id": str, "question": str, "answer": CELL},
        per_group(
            "uni_clipped_id",
            _news,
            whole_video("videos/train", "final_data_feb_16/videos/train", column="uni_clipped_id"),
        ),
        licence=ODC,
        notes="Empty answers and 7 corrupt clips are left out.",
    ),
    Source(
        "cinepile_with_sub",
        MIXES,
        "video with subtitles, multiple choice",
        Hub("allenai/Molmo2-cinepile", media="videos/<video_id>/<video_id>.mp4 (YouTube clips by id)"),
        ODC,
        {
            "video_id": str,
            "subtitles": maybe(str),
            "examples": [{"question": str, "choices": [str], "answer_key_position": one_of(int, str)}],
        },
        per_row("video_id", _cinepile, _cinepile_seen),
        notes="Subtitles are one text without times, shown whole.",
    ),
    manual(
        "countix_oe",
        "video, count",
        "Kinetics-700 training videos (https://github.com/cvdfoundation/kinetics-dataset); the rest is fetched "
        "from the hub",
        Table("countix_train_mapped.csv", repo=COUNTIX_REPO),
        "kinetics700/<video_path>",
        {"video_path": str, "class": str, "count": CELL},
        _countix,
        licence=ODC,
    ),
    manual(
        "camerabench_qa",
        CHOSEN,
        "videos as https://github.com/sy77777en/CameraBench describes; the questions are fetched from the hub",
        Table("camerabench_qa.parquet", repo=CAMERA_REPO),
        "train/<video_path>",
        {"video_path": str, "mc_qa_list": [{"Question": str, "Answer": str, "NegativeAnswers": [str]}]},
        per_row("video_path", _camera, lambda rows: {"video": local(f"train/{rows[0]['video_path']}")}),
        licence=ODC,
    ),
)
