"""CountBenchQA (CountBench, arXiv 2302.12066; questions of PaliGemma, arXiv 2407.07726): how many of two to ten things
are in a picture, answered by pointing at each.

Data: nielsr/countbench of huggingface.co in countbench/: data/train-*.parquet, and beside data/
countbench_paired_questions.json of github.com/google-research/big_vision (big_vision/datasets/countbenchqa/data/), a
question for each row. Columns read: image, number. Rows without a picture, or with one of a single channel, are left
out, as released.
Asked as the released loader asks: the question in the style `point_count`. Score: point_count, as released.
"""

from __future__ import annotations

import io
from pathlib import Path

from molmo2_nemo.errors import DataError, UserError, read_text
from molmo2_nemo.evaluation.hub_tables import HubRows, HubTask, Row, picture
from molmo2_nemo.evaluation.task import Question, TaskSettings
from molmo2_nemo.evaluation.video_choice import read_json
from molmo2_nemo.inference.prompt import Prompt

QUESTIONS = "countbench_paired_questions.json"


class CountBench(HubTask):
    name = "countbench"
    title = "how many of two to ten things are in a picture (CountBenchQA)"
    group = "point"
    scorers = ("point_count",)
    max_new_tokens = 192
    dataset = "nielsr/countbench"
    tables = "data/train-*.parquet"
    columns = ("image", "number")
    selects = True

    def open(self, settings: TaskSettings) -> HubRows:
        rows = super().open(settings)
        path = rows.folder / QUESTIONS
        if not path.is_file():
            raise UserError(
                f"task {self.name}: no {path}; put there big_vision/datasets/countbenchqa/data/{QUESTIONS} of "
                "https://github.com/google-research/big_vision"
            )
        if not isinstance(asked := read_json(read_text(path), str(path)), list) or len(asked) != len(rows.tables):
            raise UserError(f"{path}: expected a list with a question for each of the {len(rows.tables)} rows")
        return rows

    def kept(self, row: Row) -> bool:
        from PIL import Image, UnidentifiedImageError

        try:
            return row["image"] is not None and len(Image.open(io.BytesIO(picture(row["image"]))).getbands()) > 1
        except (DataError, UnidentifiedImageError, OSError):
            return True  # not to be read: a wrong answer that is said

    def question(self, row: Row, key: str, folder: Path) -> Question:
        path = folder / QUESTIONS
        asked = read_json(read_text(path), str(path))[int(key.rpartition(":")[2])]["question"]
        return Question(key, Prompt(asked, [picture(row["image"])], style="point_count"), ({"count": row["number"]},))


TASK = CountBench()
