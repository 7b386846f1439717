"""The interface of scorers: the score of one answer, and the aggregate of many scores.

A reference is a text or, where an answer has a structure, an object of JSON values whose fields the scorer's file
documents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Score:
    """The score of one answer."""

    value: float  # 0 (wrong) to 1 (right)
    details: dict[str, Any] = field(default_factory=dict)  # what the value was computed from, JSON values


class Scorer(ABC):
    """Compares answers with references. Subclasses keep no state between answers."""

    name: ClassVar[str]  # the name of its file in scorers/
    title: ClassVar[str]  # a one-line description for users
    min_references: ClassVar[int] = 1  # with fewer references, the score is undefined

    def check(self, references: Sequence[Any]) -> None:  # noqa: B027 - most scorers take any text
        """Called with an answer's references before the model is asked.

        Raises:
            UserError: a reference is of a kind that this scorer cannot compare with.
        """

    @abstractmethod
    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        """The score of one answer.

        Args:
            references: at least `min_references` correct answers.

        Raises:
            UserError: a reference is not of the kind that this scorer needs.
        """

    def aggregate(self, scores: Sequence[Score]) -> float:
        """The score of a data set with at least one answer, 0 to 1: the mean of its scores."""
        return sum(score.value for score in scores) / len(scores)

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        """Further figures of a data set with at least one answer, by name, such as precision and recall."""
        return {}
