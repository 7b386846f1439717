"""Exact match (SQuAD, arXiv 1606.05250): the answer is one of the references but for case, punctuation and articles.

The answer is what `final_answer` finds in the response. `plain_match` is the stricter one of the published evaluation.

>>> SCORER.score("The cat.", ["a CAT"]).value
1.0
"""

from __future__ import annotations

from collections.abc import Sequence

from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.reference_fields import TextScorer
from molmo2_nemo.evaluation.text import normalised


class ExactMatch(TextScorer):
    name = "exact_match"
    title = "the answer is a reference, but for case, punctuation, articles and whitespace"

    def compare(self, answer: str, references: Sequence[str]) -> Score:
        ours = normalised(answer)
        return Score(float(any(ours == normalised(reference) for reference in references)))


SCORER = ExactMatch()
