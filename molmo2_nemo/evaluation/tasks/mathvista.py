"""MathVista (arXiv 2310.02255), testmini: 1,000 questions of mathematics on pictures.

Data: AI4Math/MathVista of huggingface.co in MathVista/: data/testmini-*.parquet. Columns read: pid, question,
decoded_image, choices, precision, answer, question_type, answer_type, metadata.
Asked as the released loader asks: of a question the part between "Question:" and "Hint:", multiple choice in the layout
of evaluation, the others in the style `eval_short_answer` (vqa2).
Score: mathvista, the released evaluation with its judge off; the paper's figure has a judge that reads long answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from molmo2_nemo.data.multiple_choice import standard_choice
from molmo2_nemo.evaluation.hub_tables import HubTask, Row, picture
from molmo2_nemo.evaluation.task import Question
from molmo2_nemo.inference.prompt import Prompt


class MathVista(HubTask):
    name = "mathvista"
    title = "mathematics on pictures (MathVista, testmini)"
    group = "image QA"
    scorers = ("mathvista",)
    dataset = "AI4Math/MathVista"
    tables = "data/testmini-*.parquet"
    columns = (
        *("pid", "question", "decoded_image", "choices", "precision", "answer", "question_type", "answer_type"),
        "metadata",
    )

    def question(self, row: Row, key: str, folder: Path) -> Question:
        asked = row["question"].split("Question:")[-1].split("Hint:")[0].strip()
        reference: dict[str, Any] = {"answer": row["answer"], "type": row["answer_type"]}
        style = "eval_short_answer"
        if row["question_type"] == "multi_choice":
            reference |= {"type": "choice", "options": list(row["choices"])}
            asked, style = standard_choice(asked, reference["options"], None)[0], "eval_multiple_choice"
        elif row["answer_type"] == "float":
            reference["precision"] = int(row["precision"])
        tags = {"type": reference["type"], "task": str(row["metadata"]["task"])}
        return Question(key, Prompt(asked, [picture(row["decoded_image"])], style=style), (reference,), tags=tags)


TASK = MathVista()
