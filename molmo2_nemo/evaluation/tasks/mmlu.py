"""MMLU (arXiv 2009.03300), test: 14,042 questions of 57 subjects in text alone, a guard of what the model knew before.

Data: cais/mmlu of huggingface.co in mmlu/: all/test-*.parquet. Columns read: question, subject, choices, answer (0 to
3).
Asked without examples, in the layout of evaluation (released Molmo2 is not evaluated on text); published figures mostly
have five examples and compare the letters' probabilities. Score: multiple_choice; by subject.
"""

from __future__ import annotations

from pathlib import Path

from molmo2_nemo.data.multiple_choice import standard_choice
from molmo2_nemo.evaluation.choice import choice_reference
from molmo2_nemo.evaluation.hub_tables import HubTask, Row
from molmo2_nemo.evaluation.task import Question
from molmo2_nemo.inference.prompt import Prompt


class Mmlu(HubTask):
    name = "mmlu"
    title = "knowledge of 57 subjects, in text (MMLU, no examples)"
    group = "text"
    scorers = ("multiple_choice",)
    dataset = "cais/mmlu"
    tables = "all/test-*.parquet"
    columns = ("question", "subject", "choices", "answer")

    def question(self, row: Row, key: str, folder: Path) -> Question:
        reference = choice_reference(row["answer"], row["choices"])
        asked, _ = standard_choice(row["question"], row["choices"], None)
        return Question(key, Prompt(asked), (reference,), tags={"subject": row["subject"]})


TASK = Mmlu()
