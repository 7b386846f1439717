"""Accuracy of A-OKVQA's direct answers (arXiv 2206.01718): min(1, m / 3), where m of the humans gave the answer.

Unlike VQA accuracy, only case and outer whitespace do not count. The answer is what `final_answer` finds.

>>> SCORER.score("Snow", ["snow", "snow ", "the snow", "ice"]).value == 2 / 3
True
"""

from __future__ import annotations

from collections.abc import Sequence

from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.reference_fields import TextScorer

ENOUGH = 3  # humans who must agree for an answer to be fully correct


class AokvqaAccuracy(TextScorer):
    name = "aokvqa_accuracy"
    title = "humans who gave the answer, over 3 and at most 1; only case and outer whitespace do not count"
    min_references = ENOUGH

    def compare(self, answer: str, references: Sequence[str]) -> Score:
        same = sum(reference.lower().strip() == answer.lower().strip() for reference in references)
        return Score(min(1.0, same / ENOUGH), {"agree": same})


SCORER = AokvqaAccuracy()
