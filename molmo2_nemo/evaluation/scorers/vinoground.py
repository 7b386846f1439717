"""Accuracy of Vinoground (arXiv 2410.02763): four questions about two films that differ in the order of events.

A reference is {"answer": "A", "id": "17", "kind": "text"}: the pair of films, and whether a text is to be chosen for a
film (text) or a film for a text (video). An answer is right if the response begins or ends with it, in either case. The
aggregate is the group score: the share of pairs with all answers right; the figures text and video are the shares with
all answers of that kind right, and single questions is the share of right answers.

>>> scores = [SCORER.score(text, [{"answer": "A", "id": "1", "kind": kind}]) for text, kind in
...           (("a.", "text"), ("(A) the first", "video"), ("It is A", "video"))]
>>> [score.value for score in scores], SCORER.aggregate(scores), SCORER.figures(scores)["text"]
([1.0, 0.0, 1.0], 0.0, 1.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.groups import all_right, by_kind
from molmo2_nemo.evaluation.reference_fields import object_reference


class Vinoground(Scorer):
    name = "vinoground"
    title = "pairs of films with all four answers right"

    def check(self, references: Sequence[Any]) -> None:
        for reference in references:
            object_reference(self.name, reference, {"answer": str, "id": str, "kind": str})

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        self.check(references)
        response, entry = prediction.strip().lower(), references[0]
        expected = entry["answer"].lower()
        right = response.startswith(expected) or response.endswith(expected)
        return Score(float(right), {"group": entry["id"], "kind": entry["kind"]})

    def aggregate(self, scores: Sequence[Score]) -> float:
        return all_right(scores)

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        return by_kind(scores) | {"single questions": super().aggregate(scores)}


SCORER = Vinoground()
