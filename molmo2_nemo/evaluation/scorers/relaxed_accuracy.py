"""Relaxed accuracy (PlotQA, arXiv 1909.00997; ChartQA, arXiv 2203.10244): numbers may be 5 % off the reference.

|answer - reference| / |reference| <= 0.05, in double precision as the published evaluation computes it (so that 1.05 is
not within 5 % of 1). A number is decimal, with an exponent or a percent sign (12% is 0.12). Unless both sides are
numbers and the reference is not 0, the texts must agree except for case. The answer is what `final_answer` finds.

>>> [SCORER.score(text, ["100"]).value for text in ("104.9", "105", "105.1", "about 100")]
[1.0, 1.0, 0.0, 0.0]
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.reference_fields import TextScorer

TOLERANCE = 0.05
NUMBER = re.compile(r"[+-]?(\d{1,99}\.?\d{0,99}|\.\d{1,99})(e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE)


def number(text: str) -> float | None:
    """The number that a text represents; None if it is not a number, or too large for one."""
    digits = text.rstrip("%").strip()
    if not NUMBER.fullmatch(digits) or float(digits) == float("inf"):
        return None
    return float(digits) / (100 if text.endswith("%") else 1)


def agrees(prediction: str, reference: str) -> bool:
    """Whether an answer is correct: within 5 % of a numeric reference, or equal to any other."""
    ours, theirs = number(prediction), number(reference)
    if ours is not None and theirs:
        return abs(ours - theirs) / abs(theirs) <= TOLERANCE
    return prediction.lower() == reference.lower()


class RelaxedAccuracy(TextScorer):
    name = "relaxed_accuracy"
    title = "numbers within 5 % of a reference, other answers as the reference has them"

    def compare(self, answer: str, references: Sequence[str]) -> Score:
        return Score(float(any(agrees(answer, reference) for reference in references)))


SCORER = RelaxedAccuracy()
