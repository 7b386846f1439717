"""MuirBench (arXiv 2406.09411): multiple choice about two to nine pictures, twelve tasks, 2,600 questions.

Data: MUIRBENCH/MUIRBENCH of huggingface.co in MUIRBENCH/: data/test-*.parquet. Columns read: task, question, options,
answer (a letter), image_list.
Asked as the released loader means to ask (it fails for lack of a field, `legacy`): each `<image>` of question and
options, in this order, becomes `Image 1`, `Image 2`, ...; in the layout of evaluation.
Score: parsed_choice, as released; by task.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from molmo2_nemo.data.multiple_choice import standard_choice
from molmo2_nemo.evaluation.choice import choice_reference, place_of
from molmo2_nemo.evaluation.hub_tables import HubTask, Row, picture
from molmo2_nemo.evaluation.task import Question
from molmo2_nemo.inference.prompt import Prompt


class MuirBench(HubTask):
    name = "muirbench"
    title = "multiple choice about several pictures (MuirBench)"
    group = "image QA"
    scorers = ("parsed_choice",)
    dataset = "MUIRBENCH/MUIRBENCH"
    tables = "data/test-*.parquet"
    columns = ("task", "question", "options", "answer", "image_list")

    def question(self, row: Row, key: str, folder: Path) -> Question:
        numbers = itertools.count(1)
        texts = [row["question"], *row["options"]]
        asked, *options = [re.sub("<image>", lambda _: f"Image {next(numbers)}", text) for text in texts]
        reference = choice_reference(place_of(row["answer"]), options)
        shown = [picture(image) for image in row["image_list"]]
        prompt = Prompt(standard_choice(asked, options, None)[0], shown, style="mantis_instruct_mc")
        return Question(key, prompt, (reference,), tags={"task": str(row["task"])})


TASK = MuirBench()
