"""Accuracy of counting, as of TallyQA (arXiv 1810.12440) and CountBench (arXiv 2302.12066): the exact number.

The number of an answer is the one integer in it, in digits (1,000 is 1000) or in words up to twenty. Points, written as
tags, are ignored. An answer without a number, with two different ones, or with a fraction counts as wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.reference_fields import text_reference

WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty""".split()
TAG = re.compile(r"<[^<>]*>")
TERM = re.compile(r"-?\d+(?:[.,]\d+)*|[a-z]+", re.ASCII)
INTEGER = re.compile(r"-?(\d{1,18}|\d{1,3}(,\d{3}){1,5})", re.ASCII)  # no count is longer


def count(answer: str) -> int | None:
    """The number in an answer; None unless there is exactly one."""
    found: set[int | None] = set()
    for term in TERM.findall(TAG.sub(" ", answer.lower())):
        if term in WORDS:
            found.add(WORDS.index(term))
        elif not term.isalpha():
            found.add(int(term.replace(",", "")) if INTEGER.fullmatch(term) else None)
    return found.pop() if len(found) == 1 else None


class Counting(Scorer):
    name = "counting"
    title = "the one integer in the answer is the reference's"

    def check(self, references: Sequence[Any]) -> None:
        for reference in references:
            if count(text_reference(self.name, reference)) is None:
                raise UserError(f"counting: the reference {reference!r} has no number, or more than one")

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        self.check(references)
        expected, found = {count(reference) for reference in references}, count(prediction)
        return Score(float(found in expected), {"count": found})


SCORER = Counting()
