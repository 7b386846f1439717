"""What a scorer is: a name, how one answer is scored, and how the scores of many become one figure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Score:
    """Of one answer."""

    value: float  # 0 (wrong) to 1 (right)
    details: dict[str, Any] = field(default_factory=dict)  # what it was made of, JSON values


class Scorer(ABC):
    """Compares answers with references. Subclasses keep no state between answers."""

    name: ClassVar[str]  # that of its file in scorers/
    title: ClassVar[str]  # one line for people
    min_references: ClassVar[int] = 1  # with fewer for an answer, the definition makes no sense

    @abstractmethod
    def score(self, prediction: str, references: Sequence[str]) -> Score:
        """The score of one answer.

        Args:
            references: at least `min_references` answers that are right.

        Raises:
            UserError: a reference is of a kind that this scorer cannot compare with.
        """

    def aggregate(self, scores: Sequence[Score]) -> float:
        """One figure for a data set, 0 to 1, of at least one answer: the mean."""
        return sum(score.value for score in scores) / len(scores)
