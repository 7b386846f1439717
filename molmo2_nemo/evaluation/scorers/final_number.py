"""Accuracy of worked answers, as of GSM8K (arXiv 2110.14168): the number that the response ends in is the reference's.

It is the first number after the last `####`, as the data set writes its answers; without one, the last number of the
response. Signs of currency, commas between thousands and percent signs do not count, and numbers are compared by value.
A reference is the text of a number. (lm-evaluation-harness compares texts, after `####` and the last number each as a
figure of its own: `strict-match` and `flexible-extract`. Here, the figure `marked` is the share of responses with it.)

>>> [SCORER.score(text, ["1,072"]).value for text in ("It is 5. #### $1072.00", "so 1072 apples.", "1072 - 2 = 1070")]
[1.0, 1.0, 0.0]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.groups import mean_of
from molmo2_nemo.evaluation.reference_fields import text_reference

MARK = "####"
# A minus after a digit or letter is an operator or a hyphen; ASCII digits alone
NUMBER = re.compile(r"(?<![\w.])(-?)\$?(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)", re.ASCII)


def numbers(text: str) -> list[Decimal]:
    """The numbers in a text, in order."""
    return [Decimal(sign + digits.replace(",", "")) for sign, digits in NUMBER.findall(text)]


class FinalNumber(Scorer):
    name = "final_number"
    title = "the number that the response ends in is the reference's"

    def check(self, references: Sequence[Any]) -> None:
        for reference in references:
            if len(numbers(text_reference(self.name, reference))) != 1:
                raise UserError(f"{self.name}: the reference is {reference!r}; expected the text of a number")

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        self.check(references)
        _, mark, ending = prediction.rpartition(MARK)
        found = numbers(ending)
        answer = found[0 if mark else -1] if found else None
        right = answer in [numbers(reference)[0] for reference in references]
        return Score(float(right), {"answer": None if answer is None else str(answer), "marked": bool(mark)})

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        return mean_of(scores, ["marked"])


SCORER = FinalNumber()
