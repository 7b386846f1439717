"""Films for long contexts, in no published mixture of Molmo2: captions of Shot2Story (LongVILA's long stage) and
LVD-2M, questions on the hours of VideoMarathon.

LongCaption-10K is not here: it was not found published. Rows of it go through your own files (docs/own_files.md).

Their columns are those that the publishers' pages list, or their own code reads; no file of theirs was read as a whole.
Add one to a run with `data.sources.NAME.path=...`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data_prep.sources.base import AnnotationJson, File, Manual, Row, Source, Table, maybe
from data_prep.sources.schema import one_of
from data_prep.sources.shapes import qa
from data_prep.sources.shapes_video import EMPTY_ANSWER, Branches, per_group, per_row, text

if TYPE_CHECKING:
    import numpy as np

NOT_SEEN = "Not seen whole: columns after the publisher's page, tried on made rows."
NO_CAPTION = "no caption"
STORIES = "mhan/shot2story"
QUESTIONS = 16  # of a film in a record; it has a hundred or so
STYLE = "user_qa"  # as they are: options and length are said in the question
MARK = "<image>"  # where the film stands in a question
TAKES = "https://ic-cv-long-videos.s3.ap-northeast-2.amazonaws.com/LVD-2M/data"
TAKE_TABLES = ("ytb_600k_720p.csv", "hdvg_300k_720p.csv", "webvid_1200k_336_short.csv")


def _caption(column: str) -> Any:
    """The branch of a row whose film is described in a column."""

    def branches(row: Row, rng: np.random.Generator) -> Branches:
        words = text(row[column]).strip()
        return [{"style": "video_long_caption", "text": words}] if words else NO_CAPTION

    return branches


def _story(rows: list[Row]) -> dict[str, Any]:
    name = rows[0]["video"]
    return {"video": File(f"shot2story-videos/{name}", f"videos/{name}", name)}


def _take(rows: list[Row]) -> dict[str, Any]:
    name = text(rows[0]["key"])
    return {"video": File(f"lvd-2m/videos/{name}.mp4", f"videos/{name}.mp4", f"{name}.mp4")}


def _turns(row: Row, rng: np.random.Generator) -> Branches:
    """Each question of a conversation with its answer."""
    said = [text(turn["value"]) for turn in row["conversations"]]
    made: list[AnnotationJson | str] = []
    for question, answer in zip(said[::2], said[1::2], strict=False):
        question, answer = question.replace(MARK, "").strip(), answer.strip()
        made.append(qa(question, answer, STYLE) if question and answer else EMPTY_ANSWER)
    return made


def _hour(rows: list[Row]) -> dict[str, Any]:
    folder, name = rows[0]["data_source"], rows[0]["video"]
    return {"video": File(f"{folder}/{name}", name)}


SOURCES: tuple[Source, ...] = (
    Source(
        name="shot2story",
        mixes={},
        kind="video, long caption",
        origin=Manual(
            "the multi-shot videos of the hub's mhan/shot2story-videos (160 GB), unpacked; the captions are fetched",
            (Table("43k_human_train.json", repo=STORIES), Table("90k_gptv_train.json", repo=STORIES)),
            ("shot2story-videos/<video>",),
        ),
        licence="CC BY-NC-SA 4.0 (captions); the videos keep their owners' terms",
        fields={"video": str, "id": one_of(int, str), "whole_caption": str},
        records=per_row(
            lambda row: f"{row['__table__'].partition('_')[0]}-{row['id']}", _caption("whole_caption"), _story
        ),
        notes=f"The summary of each film. Captions of shots have no times in these files and are left out. {NOT_SEEN}",
    ),
    Source(
        name="lvd_2m",
        mixes={},
        kind="video, caption",
        origin=Manual(
            "the clips, cut and named by the publisher's download script (https://github.com/SilentView/LVD-2M); the "
            "tables are fetched",
            tuple(Table(f"data/{name}", url=f"{TAKES}/{name}") for name in TAKE_TABLES),
            ("lvd-2m/videos/<key>.mp4",),
        ),
        licence="that of HD-VILA (captions); the videos keep their owners' terms",
        fields={"key": one_of(str, int), "refined_caption": maybe(str)},
        records=per_row("key", _caption("refined_caption"), _take),
        notes=f"The refined caption of each clip. {NOT_SEEN}",
    ),
    Source(
        name="videomarathon",
        mixes={},
        kind="video, questions",
        origin=Manual(
            "the videos and questions of the hub's jylins/videomarathon, these in VideoMarathon/jsons, laid out as the "
            "publisher's code reads them (https://github.com/jylins/hourllava)",
            (Table("VideoMarathon/jsons/videomarathon.json"),),
            ("<data_source>/<video>, as the rows name them",),
        ),
        licence="Apache 2.0 (questions), for academic research; the videos keep their owners' terms",
        fields={"video": str, "data_source": str, "conversations": [{"value": str}]},
        records=per_group(lambda row: f"{row['data_source']}/{row['video']}", _turns, _hour, at_most=QUESTIONS),
        notes=f"Questions on one film are one record, at most {QUESTIONS} of them. Columns after the publisher's code, "
        "not seen whole, tried on made rows.",
    ),
)
