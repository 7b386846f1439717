"""A metric: what each rank contributes to it, how that is brought together, and what is written."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from molmo2_nemo.training.step_result import StepResult


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    host: str
    gpu: int | None  # its number on the host; None on a CPU
    stage: int  # pipeline stage


@dataclass(frozen=True)
class FinishedStep:
    """A step that has ended, as metrics see it on every rank."""

    result: StepResult
    loss: float  # of the global batch; known on rank 0
    skipped_records: int  # that this data-parallel rank could not use, since the run began
    first_of_replica: bool  # one rank of those that work on the same packs
    tasks: list[str]  # what the loss is also logged for
    max_crops: int  # of a pack
    peak_tflops: float | None  # of one device; None: not known
    processes: int
    rank: int = 0
    places: list[Place] = field(default_factory=list)  # of every rank, in their order
    seconds: float = math.nan  # from the first fetch of data to here; known to `figures` alone


class Metric(ABC):
    """One figure, or the few of one subject, of every line in metrics.jsonl and of TensorBoard and W&B.

    To add one, write a file in this folder with a subclass. All ranks call `summed` and `largest`, which must return
    lists of the same length on each; rank 0 alone calls `figures`.

    `place` orders the keys of a line; those who do not care come last.
    """

    place: ClassVar[int] = 1000

    def summed(self, step: FinishedStep) -> list[float]:
        """This rank's part of what is added up over all ranks."""
        return []

    def largest(self, step: FinishedStep) -> list[float]:
        """This rank's part of what the largest of all ranks is taken of. What only some ranks know (the loss of a
        task: those of the last pipeline stage) is 0 on all others."""
        return []

    @abstractmethod
    def figures(self, step: FinishedStep, summed: list[float], largest: list[float]) -> dict[str, Any]:
        """What the line gets, by key; nothing for a figure that is not known.

        Args:
            summed, largest: what the methods of these names returned, brought together over all ranks.
        """

    def scalars(self, figures: dict[str, Any]) -> dict[str, float]:
        """What the loggers get of them: numbers, under the same keys."""
        return {name: value for name, value in figures.items() if isinstance(value, (int, float))}


def finite(value: float) -> float | None:
    """The value, or None for one that is not finite, which JSON cannot hold."""
    return value if math.isfinite(value) else None
