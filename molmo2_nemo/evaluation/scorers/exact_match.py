"""Exact match (SQuAD, arXiv 1606.05250): the answer is one of the references but for case, punctuation and articles."""

from __future__ import annotations

from collections.abc import Sequence

from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.text import normalised


class ExactMatch(Scorer):
    name = "exact_match"
    title = "the answer is a reference, but for case, punctuation, articles and whitespace"

    def score(self, prediction: str, references: Sequence[str]) -> Score:
        return Score(float(any(normalised(prediction) == normalised(reference) for reference in references)))


SCORER = ExactMatch()
