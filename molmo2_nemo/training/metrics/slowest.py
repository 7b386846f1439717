"""Which rank the others wait for."""

from __future__ import annotations

import statistics
from typing import Any, ClassVar

from molmo2_nemo.training.metrics.interface import FinishedStep, Metric

PARTS = 2  # of a rank: seconds of its own wait for data, seconds of computing


class Slowest(Metric):
    """The rank that did most by itself in the step (training/step_clock.py), and by how much more than the rest.

    `slowest` has its rank, host and GPU, its own wait for data and its computing, in seconds, and the medians of both
    over the other ranks of its pipeline stage (stages have different layers); `lag` is how many seconds it took longer
    than their median. Every rank fills its own place of one sum, so this costs no collective of its own. Nothing where
    no pipeline stage has two ranks.
    """

    place: ClassVar[int] = 75

    def summed(self, step: FinishedStep) -> list[float]:
        wait = step.result.statistics.wait
        found = [0.0] * (PARTS * step.processes)
        clock = step.result.clock
        found[PARTS * step.rank : PARTS * (step.rank + 1)] = [clock.data(wait), clock.computing(wait)]
        return found

    def figures(self, step: FinishedStep, summed: list[float], largest: list[float]) -> dict[str, Any]:
        each = [summed[n : n + PARTS] for n in range(0, len(summed), PARTS)]
        behind = {rank: self._lag(step, each, rank) for rank in range(len(each))}
        known = {rank: lag for rank, lag in behind.items() if lag is not None}
        if not known:
            return {}
        rank = max(known, key=lambda number: known[number])
        data, computing = each[rank]
        others = [each[other] for other in self._others(step, rank)]
        where = step.places[rank]
        return {
            "slowest": {
                "rank": rank,
                "host": where.host,
                **({} if where.gpu is None else {"gpu": where.gpu}),
                "data": data,
                "computing": computing,
                "median_data": statistics.median(other[0] for other in others),
                "median_computing": statistics.median(other[1] for other in others),
            },
            "lag": known[rank],
        }

    def _others(self, step: FinishedStep, rank: int) -> list[int]:
        """The other ranks of its pipeline stage."""
        stage = step.places[rank].stage
        return [other for other, place in enumerate(step.places) if place.stage == stage and other != rank]

    def _lag(self, step: FinishedStep, each: list[list[float]], rank: int) -> float | None:
        others = [sum(each[other]) for other in self._others(step, rank)]
        return sum(each[rank]) - statistics.median(others) if others else None
