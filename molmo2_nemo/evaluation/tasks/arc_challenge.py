"""ARC-Challenge (arXiv 1803.05457), test: 1,172 questions of school science in text alone.

Data: allenai/ai2_arc of huggingface.co in ai2_arc/: ARC-Challenge/test-*.parquet. Columns read: question, choices (text
and label), answerKey (a letter, or a number from 1).
Asked without examples, in the layout of evaluation, always with letters (released Molmo2 is not evaluated on text;
published figures mostly compare probabilities of answers). Score: multiple_choice.
"""

from __future__ import annotations

from pathlib import Path

from molmo2_nemo.data.multiple_choice import standard_choice
from molmo2_nemo.evaluation.choice import choice_reference
from molmo2_nemo.evaluation.hub_tables import HubTask, Row
from molmo2_nemo.evaluation.task import Question
from molmo2_nemo.inference.prompt import Prompt


class ArcChallenge(HubTask):
    name = "arc_challenge"
    title = "school science, in text (ARC-Challenge, no examples)"
    group = "text"
    scorers = ("multiple_choice",)
    dataset = "allenai/ai2_arc"
    tables = "ARC-Challenge/test-*.parquet"
    columns = ("question", "choices", "answerKey")

    def question(self, row: Row, key: str, folder: Path) -> Question:
        options = row["choices"]["text"]
        reference = choice_reference(row["choices"]["label"].index(row["answerKey"]), options)
        asked, _ = standard_choice(row["question"], options, None)
        return Question(key, Prompt(asked), (reference,))


TASK = ArcChallenge()
