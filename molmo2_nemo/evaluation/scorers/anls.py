"""ANLS, average normalised Levenshtein similarity (arXiv 1905.13648, equation 1), for text in documents and scenes.

Of an answer, with NL = edit distance / length of the longer text, case and whitespace not counting:

    max over the references of  1 - NL if NL < 0.5 else 0
"""

from __future__ import annotations

from collections.abc import Sequence

from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.text import edit_distance

THRESHOLD = 0.5


def similarity(prediction: str, reference: str) -> float:
    """The normalised similarity of two texts, 0 to 1."""
    a, b = (" ".join(text.lower().split()) for text in (prediction, reference))
    longer = max(len(a), len(b))
    distance = edit_distance(a, b) / longer if longer else 0.0
    return 1 - distance if distance < THRESHOLD else 0.0


class Anls(Scorer):
    name = "anls"
    title = "similarity to the nearest reference by edit distance; 0 from a half of the characters on"

    def score(self, prediction: str, references: Sequence[str]) -> Score:
        return Score(max(similarity(prediction, reference) for reference in references))


SCORER = Anls()
