"""VideoHallucer (arXiv 2406.16338): yes or no, a true and a made-up fact about each video, of five sets.

Data: <set>/<set>.json and <set>/videos/ of the Hub's ColorfulAI/VideoHallucer, unpacked in VideoHallucer/ in the folder
of data sets, for the five sets of its paper (the later ones, interaction and fact_detect, are not asked). Fields read:
basic and hallucination, each with video, question and answer.
The released code has an evaluator for it and no loader; questions end as in the benchmark's own repository. Score:
videohallucer (both answers of a pair right), as released; by set.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from molmo2_nemo.evaluation.video_choice import Row, VideoChoice, VideoChoiceTask, table_rows

SETS = ("object_relation", "temporal", "semantic_detail", "external_factual", "external_nonfactual")
INSTRUCTION = "Answer the question using 'yes' or 'no'."


class VideoHallucer(VideoChoiceTask):
    name = "videohallucer"
    title = "true and made-up facts about videos (VideoHallucer)"
    group = "short video QA"
    scorers = ("videohallucer",)
    places = ("VideoHallucer", "VideoHallucer/videohallucer_datasets", "video_datasets/VideoHallucer")
    table = "object_relation/object_relation.json"
    fetch = "put there the files of https://huggingface.co/datasets/ColorfulAI/VideoHallucer, its archives unpacked"

    def rows(self, folder: Path) -> Iterator[tuple[str, Row]]:
        """The pairs of all five sets."""
        for name in SETS:
            for number, (where, row) in enumerate(table_rows(folder / name / f"{name}.json")):
                yield where, {**row, "set": name, "group": f"{name}-{number}"}

    def read(self, row: Row, folder: Path, key: str) -> list[VideoChoice]:
        return [
            VideoChoice(
                f"{row['group']}-{kind}",
                folder / row["set"] / "videos" / row[kind]["video"],
                f"{row[kind]['question']}\n{INSTRUCTION}",
                (),
                "",
                {"set": row["set"], "asked": kind},
                style="video_short_answer",
                reference={"answer": row[kind]["answer"], "group": row["group"]},
            )
            for kind in ("basic", "hallucination")
        ]


TASK = VideoHallucer()
