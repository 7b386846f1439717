"""The interface of figures that a judge model is asked for: what it is asked, and how its replies become a score."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from molmo2_nemo.evaluation.base import Score

Read = TypeVar("Read")
Ask = Callable[[str, Callable[[str], Read | None]], Read]  # a question, and what reads its reply (None: not this form)


@dataclass(frozen=True)
class Item:
    """One answer to judge."""

    key: str
    question: str
    prediction: str
    references: Sequence[Any]


class Measure(ABC):
    """A figure that a judge is asked for. Subclasses keep no state."""

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def check(self, references: Sequence[Any]) -> None:
        """Raises UserError: references that cannot be compared with."""

    @abstractmethod
    def score(self, ask: Ask[Any], item: Item) -> Score:
        """The score of one answer.

        Args:
            ask: asks the judge; raises NoAnswer.
        """

    def aggregate(self, scores: Sequence[Score]) -> float:
        """The figure of at least one judged answer: the mean."""
        return sum(score.value for score in scores) / len(scores)

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        """Further figures of at least one judged answer."""
        return {}


def json_object(reply: str) -> dict[str, Any] | None:
    """The first JSON object in a reply, whatever stands around it (a code fence, a remark); None without one."""
    decoder = json.JSONDecoder()
    start = reply.find("{")
    while start >= 0:
        try:
            found, _ = decoder.raw_decode(reply, start)
            return found if isinstance(found, dict) else None
        except json.JSONDecodeError:
            start = reply.find("{", start + 1)
        except RecursionError:
            return None
    return None
