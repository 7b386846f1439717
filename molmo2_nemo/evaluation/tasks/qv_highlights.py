"""QVHighlights (arXiv 2107.09609): which segments of a video of 150 s a query describes; validation, 1,487 queries.

Data: highlight_val_release.jsonl from github.com/jayleicn/moment_detr (data/), and beside it videos/<vid>.mp4 from
qvhilights_videos.tar.gz (nlp.cs.unc.edu/data/jielei/qvh), together in qv_highlights/ in the folder of data sets; there,
QVHighlights/ and video_datasets/QVHighlights/, where the released code looks, are found too.
Score: moment_retrieval, whose F1 is the figure of the released code and whose other figures are those of the benchmark.
As there, the 63 queries with more than five windows are left out; a query whose video is missing counts 0 and is said,
where the released code leaves it out. The question's wording is that of our training source, with the style of short
answers. An answer may have 64 tokens, enough for five segments (released: 40).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.errors import UserError, read_text
from molmo2_nemo.evaluation.scorers.moment_retrieval import SCORER
from molmo2_nemo.evaluation.task import ELSEWHERE, Question, Task, TaskSettings
from molmo2_nemo.inference.prompt import Prompt

PLACES = ("qv_highlights", "QVHighlights", "video_datasets/QVHighlights")  # in the folder of data sets
QUERIES, VIDEOS = "highlight_val_release.jsonl", "videos"
MOST_WINDOWS = 5
STYLE = "video_short_answer"


class Queries:
    """The queries of a file, in its order, without those of more than five windows.

    Args:
        folder: holds the file and the videos.

    Raises:
        UserError: a line that is no query; names it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / QUERIES
        lines = [line for line in enumerate(read_text(path).split("\n"), start=1) if line[1].strip()]
        queries = [read_query(text, f"{path}, line {number}") for number, text in lines]
        self.queries = [query for query in queries if len(query["relevant_windows"]) <= MOST_WINDOWS]

    def __len__(self) -> int:
        return len(self.queries)

    def questions(self, number: int, builder: ExampleBuilder) -> list[Question]:
        """The one question of a query."""
        query = self.queries[number]
        video = self.folder / VIDEOS / f"{query['vid']}.mp4"
        text = query["query"].rstrip(".")
        asked = f"Query: {text}. Which segments of the video does it describe? Give start and end in seconds."
        tags = {"windows": "one" if len(query["relevant_windows"]) == 1 else "several"}
        key = f"{query['qid']}_{query['vid']}"
        return [Question(key, Prompt(asked, video=video, style=STYLE), (reference(query),), tags=tags)]


def read_query(text: str, where: str) -> dict[str, Any]:
    """One line of the published file.

    Raises:
        UserError: not such a line; begins with `where`.
    """
    try:
        query = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(query, dict) or not {"qid", "vid", "query", "relevant_windows"} <= set(query):
        raise UserError(f"{where}: expected an object with qid, vid, query and relevant_windows")
    if not all(isinstance(query[name], str) and query[name].strip() for name in ("vid", "query")):
        raise UserError(f"{where}: vid and query are texts")
    try:
        SCORER.check([reference(query)])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return query


def reference(query: dict[str, Any]) -> dict[str, Any]:
    """What moment_retrieval compares with: the windows and, where the file has them, the ratings of clips of 2 s."""
    rated = {"clips": "relevant_clip_ids", "saliency": "saliency_scores"}
    ratings = {ours: query[theirs] for ours, theirs in rated.items() if theirs in query}
    return {"windows": query["relevant_windows"], **ratings}


class QVHighlights(Task):
    name = "qv_highlights"
    title = "segments of a video that a query describes (QVHighlights, validation)"
    group = "short video QA"
    scorers = ("moment_retrieval",)
    max_new_tokens = 64
    video = True

    def open(self, settings: TaskSettings) -> Queries:
        folders = [settings.root / place for place in PLACES]
        folder = next((folder for folder in folders if (folder / QUERIES).is_file()), None)
        if folder is None:
            raise UserError(
                f"task {self.name}: no {folders[0] / QUERIES}; put there data/{QUERIES} of "
                f"https://github.com/jayleicn/moment_detr, and {VIDEOS}/ of "
                f"https://nlp.cs.unc.edu/data/jielei/qvh/qvhilights_videos.tar.gz beside it, {ELSEWHERE}"
            )
        if not (folder / VIDEOS).is_dir():
            raise UserError(f"task {self.name}: {folder} has no {VIDEOS}/; unpack qvhilights_videos.tar.gz there")
        return Queries(folder)


TASK = QVHighlights()
