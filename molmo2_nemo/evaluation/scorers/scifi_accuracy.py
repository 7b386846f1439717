"""Relaxed accuracy of long answers about charts, the published evaluation's "scifi relaxed correctness".

Of answer and reference, what follows "answer:" counts, in lower case. Where the reference is a number: the first number
in the answer, commas and a final period taken out and number words to ten as digits, or a hundredth of it, is within
5 % of it (of a reference of 0: at most 0.05 away). Where the reference is a list, [a, b]: each item lies in the answer.
Else the reference lies in the answer. The answer is what `final_answer` finds in the response.

>>> [SCORER.score("It rose by 5.1 percent.", [text]).value for text in ("5", "0.05", "It rose", "[rose, percent]", "6")]
[1.0, 1.0, 1.0, 1.0, 0.0]
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.reference_fields import TextScorer

TOLERANCE = 0.05
NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")  # a sign counts only before a decimal fraction, as published
WORDS = "zero one two three four five six seven eight nine ten".split()


def after_answer(text: str) -> str:
    """What follows the first "answer:" of a text, up to the next; else the text."""
    text = text.lower().strip()
    return text.split("answer:")[1].strip() if "answer:" in text else text


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def near(answer: str, expected: float) -> bool:
    """Whether the first number in an answer, as it is or as a percentage, is within the tolerance."""
    answer = answer.replace(",", "")
    for value, word in enumerate(WORDS):
        answer = answer.replace(word, str(value))
    if not (found := NUMBER.search(answer)):
        return False
    scale = abs(expected) or 1.0
    return any(abs(expected - value) / scale <= TOLERANCE for value in (float(found[0]), float(found[0]) / 100))


def agrees(answer: str, reference: str) -> bool:
    """Whether an answer is correct."""
    answer, reference = after_answer(answer), after_answer(reference)
    if not answer:
        return False
    answer = answer.removesuffix(".")
    if (expected := number(reference)) is not None:
        return near(answer, expected)
    if "[" in reference and "," in reference:
        return all(item.strip() in answer for item in reference.replace("[", "").replace("]", "").split(","))
    return reference.strip() in answer


class ScifiAccuracy(TextScorer):
    name = "scifi_accuracy"
    title = "the first number is within 5 % of the reference's, or the reference lies in the answer"

    def compare(self, answer: str, references: Sequence[str]) -> Score:
        return Score(float(any(agrees(answer, reference) for reference in references)))


SCORER = ScifiAccuracy()
