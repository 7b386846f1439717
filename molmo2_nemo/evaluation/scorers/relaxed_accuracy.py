"""Relaxed accuracy (PlotQA, arXiv 1909.00997; ChartQA, arXiv 2203.10244): numbers may be 5 % off the reference.

|answer - reference| <= 0.05 * |reference|, computed exactly. A number is decimal, with an exponent or a percent sign
(12 % is 0.12); unless both sides are numbers, the texts must agree except for case and whitespace.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from molmo2_nemo.evaluation.base import Score, Scorer

TOLERANCE = Fraction(5, 100)
NUMBER = re.compile(r"[+-]?(\d{1,99}\.?\d{0,99}|\.\d{1,99})(e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE)


def number(text: str) -> Fraction | None:
    """The number that a text represents; None if it is not a number."""
    text = text.strip()
    digits = text.removesuffix("%").rstrip()
    if not NUMBER.fullmatch(digits):
        return None
    return Fraction(digits) / (100 if text.endswith("%") else 1)


def agrees(prediction: str, reference: str) -> bool:
    """Whether an answer is correct: within 5 % of a numeric reference, or equal to any other."""
    ours, theirs = number(prediction), number(reference)
    if ours is not None and theirs is not None:
        return abs(ours - theirs) <= TOLERANCE * abs(theirs)
    return " ".join(prediction.lower().split()) == " ".join(reference.lower().split())


class RelaxedAccuracy(Scorer):
    name = "relaxed_accuracy"
    title = "numbers within 5 % of a reference, other answers as the reference has them"

    def score(self, prediction: str, references: Sequence[str]) -> Score:
        return Score(float(any(agrees(prediction, reference) for reference in references)))


SCORER = RelaxedAccuracy()
