"""Exact match as the published evaluation has it for GQA and TallyQA ("em"): only case may differ from a reference.

The answer is what `final_answer` finds in the response.

>>> [SCORER.score(text, ["cat"]).value for text in ("Cat", "cat.", "Answer: cat")]
[1.0, 0.0, 1.0]
"""

from __future__ import annotations

from collections.abc import Sequence

from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.reference_fields import TextScorer


class PlainMatch(TextScorer):
    name = "plain_match"
    title = "the answer is a reference, but for case"

    def compare(self, answer: str, references: Sequence[str]) -> Score:
        return Score(float(answer.lower() in [reference.lower() for reference in references]))


SCORER = PlainMatch()
