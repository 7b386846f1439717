"""Accuracy of multiple choice, as of AI2D (arXiv 1603.07396) and MMMU (arXiv 2311.16502): the correct option is chosen.

An answer names its option by letter, by text, or both: `B`, `(b)`, `B.`, `B) a cat`, `B: a cat`, `a cat`. Where answer
and reference have letters, these decide; else the texts, compared as exact_match does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.text import normalised

LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")  # nothing but a letter
LABELLED = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])[.:)])\s+(.+)", re.DOTALL)  # a letter, then the option's text


def option(answer: str) -> tuple[str | None, str]:
    """The letter (upper case, or None) and the text of the option that an answer names."""
    answer = answer.strip()
    if alone := LETTER.fullmatch(answer):
        return alone[1].upper(), ""
    if labelled := LABELLED.fullmatch(answer):
        return (labelled[1] or labelled[2]).upper(), labelled[3]
    return None, answer


def same_option(prediction: str, reference: str) -> bool:
    """Whether two answers name the same option."""
    (ours, text), (theirs, expected) = option(prediction), option(reference)
    if ours is not None and theirs is not None:
        return ours == theirs
    return bool(normalised(text)) and normalised(text) == normalised(expected)


class ChoiceAccuracy(Scorer):
    name = "multiple_choice"
    title = "the option that the answer names, by letter or text, is the reference's"

    def score(self, prediction: str, references: Sequence[str]) -> Score:
        return Score(
            float(any(same_option(prediction, reference) for reference in references)),
            {"option": option(prediction)[0]},
        )


SCORER = ChoiceAccuracy()
