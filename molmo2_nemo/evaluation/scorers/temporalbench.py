"""Accuracy of TemporalBench (arXiv 2410.10818): the nearest option; a video's questions count as one, right if all are.

A reference is an object with all options (evaluation/choice.py) and {"group": "short_qa-video12"}: the kind of
question, "-", and the video. The aggregate is the share of groups that are right; the figures are this share by kind,
and the share of single questions. The option chosen is the one `nearest_name` finds for the whole response. (The
published evaluation's figure over all kinds is always 0, because its sum is never added to; here it is the share that
its code sets out to be.)

>>> entry = {"option": "A", "options": ["up", "down"]}
>>> asked = [("A", "qa-1"), ("B", "qa-1"), ("A", "qa-2")]
>>> scores = [SCORER.score(text, [entry | {"group": group}]) for text, group in asked]
>>> SCORER.aggregate(scores)
0.5
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.choice import nearest_name, read_choice
from molmo2_nemo.evaluation.groups import all_right, by_kind
from molmo2_nemo.evaluation.reference_fields import object_reference


class TemporalBench(Scorer):
    name = "temporalbench"
    title = "videos with the nearest option of every question right"

    def check(self, references: Sequence[Any]) -> None:
        for reference in references:
            read_choice(self.name, reference)
            object_reference(self.name, reference, {"option": str, "options": list, "group": str})

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        self.check(references)
        choice, group = read_choice(self.name, references[0]), references[0]["group"]
        place = nearest_name(prediction, choice.names)
        details = {"option": choice.letters[place], "group": group, "kind": group.split("-")[0]}
        return Score(float(place == choice.index), details)

    def aggregate(self, scores: Sequence[Score]) -> float:
        return all_right(scores)

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        return by_kind(scores) | {"single questions": super().aggregate(scores)}


SCORER = TemporalBench()
