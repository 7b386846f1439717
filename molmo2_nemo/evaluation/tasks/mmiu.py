"""MMIU (arXiv 2408.02718): multiple choice about one to 62 pictures, 52 tasks, 11,000 questions.

Data: all.parquet of the Hub's FanqingM/MMIU-Benchmark in MMIU-Benchmark/, and its seven archives unpacked beside it,
each as a folder of its own name. Columns read: task, question, options (`A: ...`, a line each), output (a letter),
input_image_path (`./<folder>/...`).
Asked as the released loader asks, in the layout of evaluation. Score: parsed_choice, as released; by task and by kind
of relation between the pictures. Some questions have a letter of no option, as published: these are said and count 0.
"""

from __future__ import annotations

import re
from pathlib import Path

from molmo2_nemo.data.multiple_choice import standard_choice
from molmo2_nemo.errors import DataError
from molmo2_nemo.evaluation.choice import choice_reference, place_of
from molmo2_nemo.evaluation.hub_tables import HubTask, Row
from molmo2_nemo.evaluation.task import Question
from molmo2_nemo.inference.prompt import Prompt

OPTION = re.compile(r"^[A-Z]:\s?([^\n]+)", re.MULTILINE)


class Mmiu(HubTask):
    name = "mmiu"
    title = "multiple choice about up to 62 pictures (MMIU)"
    group = "image QA"
    scorers = ("parsed_choice",)
    dataset = "FanqingM/MMIU-Benchmark"
    tables = "all.parquet"
    columns = ("task", "question", "options", "output", "input_image_path")

    def question(self, row: Row, key: str, folder: Path) -> Question:
        options = OPTION.findall(row["options"])
        asked, _ = standard_choice(row["question"], options, None)
        shown = [image_file(folder, name.removeprefix("./")) for name in row["input_image_path"]]
        reference = choice_reference(place_of(row["output"]), options)
        relation = row["input_image_path"][0].removeprefix("./").split("/")[0]
        prompt = Prompt(asked, shown, style="mantis_instruct_mc")
        return Question(key, prompt, (reference,), tags={"task": str(row["task"]), "relation": relation})


def image_file(folder: Path, name: str) -> Path:
    """A picture, wherever its archive was unpacked: in the folder, or in one of the archive's name.

    Raises:
        DataError: it is a path out of the folder.
    """
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise DataError(f"input_image_path has {name!r}")
    inner = folder / Path(name).parts[0] / name
    return inner if inner.is_file() else folder / name


TASK = Mmiu()
