"""Accuracy of multiple choice, as of AI2D (arXiv 1603.07396) and MMMU (arXiv 2311.16502): the correct option is chosen.

An answer names its option by letter, by text, or both: `B`, `(b)`, `B.`, `B) a cat`, `B: a cat`, `a cat`. Where answer
and reference have letters, these decide; else the texts, compared as exact_match does. A reference is a text in one of
these forms or an object with all options (evaluation/choice.py); of an object, letter and text are both known. Nothing
is guessed: an answer that names no option is wrong. The published evaluations guess more (nearest_option and others).

>>> dog = {"option": "B", "options": ["a cat", "a dog"]}
>>> [SCORER.score("a dog", [reference]).value for reference in ("B. a dog", "B", dog)]
[1.0, 0.0, 1.0]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.choice import TextOrChoiceScorer, read_choice
from molmo2_nemo.evaluation.text import final_answer, normalised

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


def same_text(text: str, expected: str) -> bool:
    return bool(normalised(text)) and normalised(text) == normalised(expected)


def same_option(prediction: str, reference: str) -> bool:
    """Whether two answers name the same option."""
    (ours, text), (theirs, expected) = option(prediction), option(reference)
    if ours is not None and theirs is not None:
        return ours == theirs
    return same_text(text, expected)


def is_right(answer: str, reference: Any) -> bool:
    """Whether an answer names the option of a reference, a text or an object."""
    if isinstance(reference, str):
        return same_option(answer, reference)
    choice = read_choice("multiple_choice", reference)
    letter, _ = option(answer)
    if same_text(answer, choice.options[choice.index]):
        return True
    return choice.labelled and letter == choice.letter


class ChoiceAccuracy(TextOrChoiceScorer):
    name = "multiple_choice"
    title = "the option that the answer names, by letter or text, is the reference's"

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        answer = final_answer(prediction)
        right = any(is_right(answer, reference) for reference in references)
        return Score(float(right), {"option": option(answer)[0]})


SCORER = ChoiceAccuracy()
