"""Precision, recall and F1 of points that were found, and their means over a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from molmo2_nemo.evaluation.base import Score


@dataclass(frozen=True)
class Hits:
    """How many points of an answer are right, of how many it has and how many there are."""

    right: int
    answered: int
    expected: int

    @property
    def precision(self) -> float:
        """1 where there is nothing to find and nothing was answered, as published; else 0 without an answer."""
        return self.right / self.answered if self.answered and self.expected else float(self == Hits(0, 0, 0))

    @property
    def recall(self) -> float:
        """As `precision`, over what there is to find."""
        return self.right / self.expected if self.answered and self.expected else float(self == Hits(0, 0, 0))

    @property
    def f1(self) -> float:
        """The harmonic mean of both."""
        return f1(self.precision, self.recall)

    def score(self) -> Score:
        """F1, with the details."""
        details: dict[str, Any] = {"precision": self.precision, "recall": self.recall, "right": self.right}
        return Score(self.f1, {**details, "answered": self.answered, "expected": self.expected})


def f1(precision: float, recall: float) -> float:
    """The harmonic mean; 0 where one is 0."""
    return 2 * precision * recall / (precision + recall) if precision and recall else 0.0


def best(scores: Sequence[Score]) -> Score:
    """The score against the reference that an answer is nearest to; the first of equal ones."""
    return max(scores, key=lambda score: score.value)


def means(scores: Sequence[Score], names: Sequence[str]) -> dict[str, float]:
    """The mean of each of these details; 0 is that of an answer that failed and has none."""
    return {name: sum(float(score.details.get(name, 0)) for score in scores) / len(scores) for name in names}
