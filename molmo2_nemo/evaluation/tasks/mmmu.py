"""MMMU (arXiv 2311.16502), validation: 900 questions of 30 subjects, multiple choice and open.

Data: MMMU/MMMU of huggingface.co in MMMU/: <subject>/validation-*.parquet. Columns read: id, question, options (a list
written as text), answer, question_type, image_1.
Asked as the released loader asks: the first picture alone, the marks `<image 1>` left in the text, no picture where
several options are pictures; multiple choice in the layout of evaluation, open questions in the style `vqa2`.
Score: mmmu, as released. There and here an answer that is written as a list is compared as that text.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from molmo2_nemo.data.multiple_choice import standard_choice
from molmo2_nemo.evaluation.choice import choice_reference, place_of
from molmo2_nemo.evaluation.hub_tables import HubTask, Row, picture
from molmo2_nemo.evaluation.task import Question
from molmo2_nemo.inference.prompt import Prompt

PICTURE = re.compile("<img='(.*?)'>")  # an option that is one


class Mmmu(HubTask):
    name = "mmmu"
    title = "college questions on pictures (MMMU, validation)"
    group = "image QA"
    scorers = ("mmmu",)
    max_new_tokens = 64
    dataset = "MMMU/MMMU"
    tables = "*/validation-*.parquet"
    columns = ("id", "question", "options", "answer", "question_type", "image_1")

    def question(self, row: Row, key: str, folder: Path) -> Question:
        tags = {"subject": row["id"].split("_", 1)[1].rsplit("_", 1)[0], "type": row["question_type"]}
        if row["question_type"] != "multiple-choice":
            prompt = Prompt(row["question"], [picture(row["image_1"])], style="vqa2")
            return Question(key, prompt, (row["answer"],), tags=tags)
        options: list[Any] = ast.literal_eval(row["options"])
        shown = [] if sum(bool(PICTURE.match(text)) for text in options) > 1 else [picture(row["image_1"])]
        reference = choice_reference(place_of(row["answer"]), options)
        asked, _ = standard_choice(row["question"], options, None)
        return Question(key, Prompt(asked, shown, style="a_okvqa_mc"), (reference,), tags=tags)


TASK = Mmmu()
