"""ANLS, average normalised Levenshtein similarity (arXiv 1905.13648, equation 1), for text in documents and scenes.

Of an answer, with NL = edit distance / length of the longer text, case not counting:

    max over the references of  1 - NL if NL < 0.5 else 0

The answer is what `final_answer` finds in the response, with single spaces.

>>> SCORER.score("hallo", ["hello", "hullo there"]).value
0.8
"""

from __future__ import annotations

from collections.abc import Sequence

from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.reference_fields import TextScorer
from molmo2_nemo.evaluation.text import edit_distance

THRESHOLD = 0.5


def similarity(prediction: str, reference: str) -> float:
    """The normalised similarity of two texts, 0 to 1; 1 of two empty ones."""
    longer = max(len(prediction), len(reference))
    distance = edit_distance(prediction.lower(), reference.lower()) / longer if longer else 0.0
    return 1 - distance if distance < THRESHOLD else 0.0


class Anls(TextScorer):
    name = "anls"
    title = "similarity to the nearest reference by edit distance; 0 from a half of the characters on"

    def compare(self, answer: str, references: Sequence[str]) -> Score:
        return Score(max(similarity(answer, reference) for reference in references))


SCORER = Anls()
