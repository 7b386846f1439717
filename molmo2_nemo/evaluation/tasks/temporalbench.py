"""TemporalBench (arXiv 2410.10818), multiple choice: descriptions that differ in what happens in a video.

Data: temporalbench_short_qa.json and temporalbench_long_qa.json of the Hub's microsoft/TemporalBench and its archives
unpacked beside them, together in TemporalBench/ in the folder of data sets. Fields read: idx, video_name (a path
there), question (with its options and an instruction, a line each), GT (a letter).
Asked in the released loader's format of multiple choice, which its evaluator scores (in its other format every answer
is right). Score: temporalbench, as released; by kind of question.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from molmo2_nemo.data.multiple_choice import standard_choice
from molmo2_nemo.evaluation.choice import LETTERS
from molmo2_nemo.evaluation.video_choice import Row, VideoChoice, VideoChoiceTask, table_rows

KINDS = ("long_qa", "short_qa")
LABEL = re.compile(r"([A-Z]).(.*)")


class TemporalBench(VideoChoiceTask):
    name = "temporalbench"
    title = "multiple choice about the course of events (TemporalBench)"
    group = "short video QA"
    scorers = ("temporalbench",)
    places = ("TemporalBench", "video_datasets/TemporalBench")
    table = "temporalbench_short_qa.json"
    fetch = "put there the files of https://huggingface.co/datasets/microsoft/TemporalBench, its archives unpacked"

    def rows(self, folder: Path) -> Iterator[tuple[str, Row]]:
        """The questions of both files."""
        for kind in KINDS:
            for where, row in table_rows(folder / f"temporalbench_{kind}.json"):
                yield where, {**row, "kind": kind}

    def read(self, row: Row, folder: Path, key: str) -> list[VideoChoice]:
        question, *lines = [line.strip() for line in row["question"].split("\n") if line.strip()]
        labelled = [LABEL.match(line) for line in lines[:-1]]  # the last line is an instruction
        options = {match[1]: match[2].strip() for match in labelled if match}
        texts = list(options.values())
        asked, _ = standard_choice(question, texts, None)
        return [
            VideoChoice(
                f"{row['kind']}:{row['idx']}",
                folder / row["video_name"],
                asked,
                texts,
                LETTERS[list(options).index(row["GT"])],
                {"kind": row["kind"]},
                reference={"group": f"{row['kind']}-{row['video_name']}"},
            )
        ]


TASK = TemporalBench()
