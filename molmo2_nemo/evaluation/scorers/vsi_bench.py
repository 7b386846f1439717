"""Accuracy of VSI-Bench (arXiv 2412.14171): multiple choice, and mean relative accuracy (MRA) of numbers.

A reference is an object with all options (evaluation/choice.py) or {"number": 3.5}, and {"kind": "object_counting"}:
the kind of question. Multiple choice: as parsed_choice, but an answer without an option is wrong. Numbers: the share
of the thresholds t = 0.5, 0.55, ..., 0.95 for which |answer - number| / number <= 1 - t; the answer is the first
word, without periods at its end. The aggregate is the mean over the kinds of question (the three grades of
object_rel_direction count as one, their mean), as published, times the share of questions that could be asked; the
figures are the means by kind. The answer is what `final_answer` finds.

>>> [SCORER.score(text, [{"number": 10, "kind": "object_counting"}]).value for text in ("10", "9 m.", "16", "ten")]
[1.0, 0.9, 0.0, 0.0]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.choice import last_named, read_choice
from molmo2_nemo.evaluation.groups import mean_by
from molmo2_nemo.evaluation.reference_fields import object_reference
from molmo2_nemo.evaluation.text import final_answer

THRESHOLDS = np.linspace(0.5, 0.95, 10)
DIRECTION = "object_rel_direction"


def relative_accuracy(answer: str, number: float) -> float:
    """The mean relative accuracy of an answer; 0 if it begins with no number, or the reference is 0."""
    try:
        found = float(answer.split(" ")[0].rstrip(".").strip())
    except ValueError:
        return 0.0
    return float((abs(found - number) / number <= 1 - THRESHOLDS).mean()) if number else 0.0


class VsiBench(Scorer):
    name = "vsi_bench"
    title = "the option that the answer gives, or the mean relative accuracy of its number; mean over kinds of question"

    def check(self, references: Sequence[Any]) -> None:
        for reference in references:
            object_reference(self.name, reference, {"kind": str})
            if "number" in reference:
                object_reference(self.name, reference, {"number": (int, float), "kind": str})
            else:
                read_choice(self.name, reference)

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        self.check(references)
        answer, entry = final_answer(prediction), references[0]
        if "number" in entry:
            return Score(relative_accuracy(answer, float(entry["number"])), {"kind": entry["kind"]})
        choice = read_choice(self.name, entry)
        letter = last_named(answer, choice)
        return Score(float(letter == choice.letter), {"option": letter, "kind": entry["kind"]})

    def aggregate(self, scores: Sequence[Score]) -> float:
        kinds = mean_by(scores, "kind")
        known = sum("kind" in score.details for score in scores)
        grades = [value for kind, value in kinds.items() if kind.startswith(DIRECTION)]
        values = [value for kind, value in kinds.items() if not kind.startswith(DIRECTION)]
        values += [sum(grades) / len(grades)] if grades else []
        return sum(values) / len(values) * known / len(scores) if values else 0.0

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        return mean_by(scores, "kind") | {"single questions": super().aggregate(scores)}


SCORER = VsiBench()
