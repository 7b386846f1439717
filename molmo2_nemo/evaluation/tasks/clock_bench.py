"""Reading clocks in photographs and films (It's About Time, arXiv 2111.09162): COCO, Open Images and films.

Data: data/coco_final.csv, openimg_final.csv and movies_final.csv of github.com/charigyang/itsabouttime, and the images
that its README links to, in ClockBench/ in the folder of data sets: coco/trainval_images/, openimg/data/ and
movies/ClockMovies/images/. Columns read: img_id, file_name, hour, minute.
Asked on the whole image as Molmo's first code asked ("What time is being shown?"; the released Molmo2 has an evaluator
for it, and neither loader nor training data). Its style, `clocks`, was only in Molmo's training: here it is `user_qa`.
Score: clock, of 12 hours; by source. Images that are not there count as wrong; Molmo's loader leaves them out.
"""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.errors import UserError, read_text
from molmo2_nemo.evaluation.task import ELSEWHERE, Question, Task, TaskSettings
from molmo2_nemo.inference.prompt import Prompt

IMAGES = {"coco": "coco/trainval_images", "openimg": "openimg/data", "movies": "movies/ClockMovies/images"}
QUESTION = "What time is being shown?"
FOLDER = "ClockBench"


class Clocks:
    """The rows of the three tables.

    Raises:
        UserError: a table that is missing, or a row that is not as published; names it.
    """

    def __init__(self, folder: Path) -> None:
        self.rows: list[Question] = []
        for source in IMAGES:
            path = folder / f"{source}_final.csv"
            for number, row in enumerate(csv.DictReader(io.StringIO(read_text(path))), start=2):
                self.rows.append(clock(row, source, folder, f"{path}, line {number}"))

    def __len__(self) -> int:
        return len(self.rows)

    def questions(self, number: int, builder: ExampleBuilder) -> list[Question]:
        """See `Items`."""
        return [self.rows[number]]


def clock(row: Mapping[str, str | None], source: str, folder: Path, where: str) -> Question:
    """The question of a row.

    Raises:
        UserError: not such a row; begins with `where`.
    """
    given = {name: row.get(name) or "" for name in ("img_id", "file_name", "hour", "minute")}
    if not all(given.values()) or not (given["hour"].isdecimal() and given["minute"].isdecimal()):
        raise UserError(f"{where}: expected img_id, file_name, hour and minute of a clock; got {given}")
    folder = folder / IMAGES[source]
    names = (given["file_name"], *(unicodedata.normalize(form, given["file_name"]) for form in ("NFD", "NFC")))
    image = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
    time = {"hour": int(given["hour"]), "minute": int(given["minute"]), "second": -1, "bench": True}
    prompt = Prompt(QUESTION, images=[image], style="user_qa")
    return Question(f"{source}:{given['img_id']}", prompt, (time,), tags={"source": source})


class ClockBench(Task):
    name = "clock_bench"
    title = "the time on clocks in photographs and films (It's About Time)"
    group = "image QA"
    scorers = ("clock",)
    max_new_tokens = 16

    def open(self, settings: TaskSettings) -> Clocks:
        folder = settings.root / FOLDER
        missing = [f"{source}_final.csv" for source in IMAGES if not (folder / f"{source}_final.csv").is_file()]
        if missing:
            raise UserError(
                f"task {self.name}: no {folder / missing[0]}; put there data/*.csv of "
                f"https://github.com/charigyang/itsabouttime and the images that its README links to, {ELSEWHERE}"
            )
        return Clocks(folder)


TASK = ClockBench()
