"""BLINK (arXiv 2404.12390), validation: multiple choice of vision in the narrow sense, one to four pictures, 14 tasks.

Data: BLINK-Benchmark/BLINK of huggingface.co in BLINK/: <task>/val-*.parquet. Columns read: sub_task, prompt (question
and options), choices, answer (`(A)`), image_1 to image_4.
Asked as the released loader asks: the prompt of the table. Score: parsed_choice, as released; by task.
"""

from __future__ import annotations

from pathlib import Path

from molmo2_nemo.evaluation.choice import choice_reference, place_of
from molmo2_nemo.evaluation.hub_tables import HubTask, Row, pictures
from molmo2_nemo.evaluation.task import Question
from molmo2_nemo.inference.prompt import Prompt

PICTURES = ("image_1", "image_2", "image_3", "image_4")


class Blink(HubTask):
    name = "blink"
    title = "multiple choice of perception, one or several pictures (BLINK, validation)"
    group = "image QA"
    scorers = ("parsed_choice",)
    dataset = "BLINK-Benchmark/BLINK"
    tables = "*/val-*.parquet"
    columns = ("sub_task", "prompt", "choices", "answer", *PICTURES)

    def question(self, row: Row, key: str, folder: Path) -> Question:
        reference = choice_reference(place_of(row["answer"].strip("()")), row["choices"])
        shown = pictures(row, PICTURES)
        style = "mantis_instruct_mc" if len(shown) > 1 else "eval_multiple_choice"
        prompt = Prompt(row["prompt"], shown, style=style)
        return Question(key, prompt, (reference,), tags={"task": str(row["sub_task"])})


TASK = Blink()
