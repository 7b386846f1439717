"""GSM8K (arXiv 2110.14168), test: 1,319 word problems of arithmetic in text alone, with an answer that is worked out.

Data: openai/gsm8k of huggingface.co in gsm8k/: main/test-*.parquet. Columns read: question, answer (its number after
`####`).
Asked without examples and for the data set's own form of an answer (released Molmo2 is not evaluated on text; published
figures mostly have five or eight examples). Score: final_number. Answers may have 512 tokens.
"""

from __future__ import annotations

from pathlib import Path

from molmo2_nemo.errors import DataError
from molmo2_nemo.evaluation.hub_tables import HubTask, Row
from molmo2_nemo.evaluation.scorers.final_number import MARK
from molmo2_nemo.evaluation.task import Question
from molmo2_nemo.inference.prompt import Prompt

INSTRUCTION = f'Work it out step by step. Then write "{MARK} " and the answer, a number.'


class Gsm8k(HubTask):
    name = "gsm8k"
    title = "word problems of arithmetic, in text (GSM8K, no examples)"
    group = "text"
    scorers = ("final_number",)
    max_new_tokens = 512
    dataset = "openai/gsm8k"
    tables = "main/test-*.parquet"
    columns = ("question", "answer")

    def question(self, row: Row, key: str, folder: Path) -> Question:
        _, mark, number = row["answer"].rpartition(MARK)
        if not mark:
            raise DataError(f"no number after {MARK} in the answer")
        return Question(key, Prompt(f"{row['question']}\n{INSTRUCTION}"), (number.strip(),))


TASK = Gsm8k()
