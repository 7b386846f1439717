"""Vinoground (arXiv 2410.02763): 500 pairs of films that differ in the order of events, four questions each.

Data: vinoground_textscore.json, vinoground_videoscore.json and both archives of the Hub's HanSolo9682/Vinoground,
unpacked as vinoground_videos/ and vinoground_videos_concated/, together in Vinoground/ in the folder of data sets.
Fields read: idx (`0_pos`), video_name (a path there), question (with its options), GT (a letter).
The released code has an evaluator for it and no loader; the question ends as in lmms-eval's task. Score: vinoground
(all four answers of a pair right), as released.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from molmo2_nemo.evaluation.video_choice import Row, VideoChoice, VideoChoiceTask, table_rows

ONE_LETTER = "Please only output one English character."


class Vinoground(VideoChoiceTask):
    name = "vinoground"
    title = "the order of events in pairs of films (Vinoground)"
    group = "short video QA"
    scorers = ("vinoground",)
    places = ("Vinoground", "video_datasets/Vinoground")
    table = "vinoground_textscore.json"
    fetch = "put there the files of https://huggingface.co/datasets/HanSolo9682/Vinoground, its archives unpacked"

    def rows(self, folder: Path) -> Iterator[tuple[str, Row]]:
        """The questions of both files."""
        for kind in ("text", "video"):
            for where, row in table_rows(folder / f"vinoground_{kind}score.json"):
                yield where, {**row, "kind": kind}

    def read(self, row: Row, folder: Path, key: str) -> list[VideoChoice]:
        reference = {"answer": row["GT"], "id": row["idx"].split("_")[0], "kind": row["kind"]}
        return [
            VideoChoice(
                f"{row['kind']}:{row['idx']}",
                folder / row["video_name"],
                f"{row['question'].removesuffix(ONE_LETTER).rstrip()}\n{ONE_LETTER}",
                (),
                "",
                {"kind": row["kind"]},
                reference=reference,
            )
        ]


TASK = Vinoground()
