"""The length of a caption beside the reference's; a definition of ours, since a caption's other scores depend on it.

Words are what whitespace separates. The score is the smaller number of words over the larger one, of the caption and
the reference that is nearest in length: 1 where both are equally long, 0 for an empty caption. The figures are the mean
numbers of words and characters of captions (`words`, `characters`) and of the nearest references (`reference_words`,
`reference_characters`), and the first over the third (`words_ratio`: above 1, captions are longer than references).

A reference is a text, or an object with a "text".

>>> SCORER.score("a cat sleeps", ["a cat sleeps on the sofa"]).value
0.5
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.text import text_of

COUNTS = ("words", "characters", "reference_words", "reference_characters")


class CaptionLength(Scorer):
    name = "caption_length"
    title = "words of the shorter of caption and reference over those of the longer"

    def check(self, references: Sequence[Any]) -> None:
        for reference in references:
            text_of(reference)

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        words = len(prediction.split())
        nearest = min(map(text_of, references), key=lambda text: abs(len(text.split()) - words))
        expected = len(nearest.split())
        longer = max(words, expected)
        counts = words, len(prediction.strip()), expected, len(nearest.strip())
        return Score(min(words, expected) / longer if longer else 1.0, dict(zip(COUNTS, counts, strict=True)))

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        counted = [score.details for score in scores if score.details]  # without those that could not be asked
        if not counted:
            return {}
        means = {name: sum(details[name] for details in counted) / len(counted) for name in COUNTS}
        expected = means["reference_words"]
        return means | ({"words_ratio": means["words"] / expected} if expected else {})


SCORER = CaptionLength()
