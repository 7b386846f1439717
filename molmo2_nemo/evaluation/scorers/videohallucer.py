"""Accuracy of VideoHallucer (arXiv 2406.16338): yes or no; the questions of a group count as one, right if all are.

A reference is {"answer": "yes", "group": "temporal-12"}. The response says yes if "yes" is anywhere in it, else no if
"no" is. The aggregate is the share of groups that are right; the figures are this share by the group's kind (what
stands before its first "-"), and the share of single questions.

>>> scores = [SCORER.score(text, [{"answer": "yes", "group": name}]) for text, name in
...           (("Yes.", "a-1"), ("No.", "a-1"), ("yes it is", "b-2"))]
>>> SCORER.aggregate(scores), SCORER.figures(scores)["a"], SCORER.figures(scores)["b"]
(0.5, 0.0, 1.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.groups import all_right, by_kind
from molmo2_nemo.evaluation.reference_fields import object_reference


class VideoHallucer(Scorer):
    name = "videohallucer"
    title = "groups of yes-or-no questions with every answer right"

    def check(self, references: Sequence[Any]) -> None:
        for reference in references:
            object_reference(self.name, reference, {"answer": str, "group": str})

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        self.check(references)
        response = prediction.lower()
        said = next((word for word in ("yes", "no") if word in response), "")
        right = said == references[0]["answer"].lower().strip()
        group = references[0]["group"]
        return Score(float(right), {"answer": said, "group": group, "kind": group.split("-")[0]})

    def aggregate(self, scores: Sequence[Score]) -> float:
        return all_right(scores)

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        return by_kind(scores) | {"single questions": super().aggregate(scores)}


SCORER = VideoHallucer()
