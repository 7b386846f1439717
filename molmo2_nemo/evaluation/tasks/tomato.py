"""TOMATO (arXiv 2410.23266), multiple choice about motion in short videos: all six kinds of reasoning.

Data: data/<kind>.json of github.com/yale-nlp/TOMATO and its videos (a link in its README), unpacked as
videos/<demonstration_type>/<key>.mp4, together in TOMATO/ in the folder of data sets. Fields read: question, options,
answer (a number from 0), key, demonstration_type. Score: nearest_option, as published; by kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from molmo2_nemo.data.multiple_choice import standard_choice
from molmo2_nemo.errors import UserError, read_text
from molmo2_nemo.evaluation.choice import LETTERS
from molmo2_nemo.evaluation.video_choice import Row, VideoChoice, VideoChoiceTask, read_json

REASONING = ("count", "direction", "rotation", "shape&trend", "velocity&frequency", "visual_cues")


class Tomato(VideoChoiceTask):
    name = "tomato"
    title = "multiple choice about motion (TOMATO)"
    group = "short video QA"
    scorers = ("nearest_option",)
    places = ("TOMATO", "video_datasets/TOMATO")
    table = "data/count.json"
    fetch = "put there data/ of https://github.com/yale-nlp/TOMATO, and beside it its videos unpacked as videos/"

    def rows(self, folder: Path) -> Iterator[tuple[str, Row]]:
        """The questions of all six files.

        Raises:
            UserError: a file is missing or not as published.
        """
        for kind in REASONING:
            path = folder / "data" / f"{kind}.json"
            questions = read_json(read_text(path), str(path))
            if not isinstance(questions, dict):
                raise UserError(f"{path}: expected an object of questions")
            for name, row in questions.items():
                yield f"{path}, question {name}", {**row, "reasoning": kind}

    def read(self, row: Row, folder: Path, key: str) -> list[VideoChoice]:
        options, kind = list(row["options"]), row["demonstration_type"]
        asked, _ = standard_choice(row["question"], options, row["answer"])
        video = folder / "videos" / kind / f"{row['key']}.mp4"
        tags = {"reasoning": row["reasoning"], "demonstration": kind}
        return [VideoChoice(f"{key}_{row['key']}", video, asked, options, LETTERS[row["answer"]], tags)]


TASK = Tomato()
