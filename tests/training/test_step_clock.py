"""Who is slow: the rank that waits for nobody, whatever the length of a step, which is everyone's."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch

from molmo2_nemo.rundir.straggler import straggler
from molmo2_nemo.training.metrics.interface import FinishedStep, Place
from molmo2_nemo.training.metrics.slowest import Slowest
from molmo2_nemo.training.step_clock import StepClock
from molmo2_nemo.training.step_result import StepResult
from tests.support.light import run_light

SLEEP = 0.4


def one_step(slow: int, place: str) -> tuple[float, float, float]:
    """A step with a collective on the way, as a layout with tensor ranks has; one rank sleeps. This rank's wait for
    data, computing, and length of the step."""
    import torch.distributed as dist

    rank = dist.get_rank()
    dist.barrier()
    clock, start, value = StepClock(), time.perf_counter(), torch.ones(4)
    clock.begins()
    if rank == slow and place == "data":
        time.sleep(SLEEP)
    wait = time.perf_counter() - start
    dist.all_reduce(value)
    if rank == slow and place == "computing":
        time.sleep(SLEEP)
    dist.all_reduce(value, async_op=True).wait()
    clock.exchanges()
    dist.all_reduce(value)
    return clock.data(wait), clock.computing(wait), time.perf_counter() - start


def both_steps() -> list[tuple[float, float, float]]:
    return [one_step(1, "data"), one_step(0, "computing")]


def test_a_slow_rank_is_told_by_the_time_it_does_not_wait():
    ranks = run_light(both_steps, ranks=2)
    for (data, computing, whole), slow in zip([ranks[0][0], ranks[1][0]], (False, True), strict=True):
        assert whole > SLEEP and computing < SLEEP / 2 and (data > 0.9 * SLEEP) == slow
    for (data, computing, whole), slow in zip([ranks[0][1], ranks[1][1]], (True, False), strict=True):
        assert whole > SLEEP and data < SLEEP / 2 and (computing > 0.9 * SLEEP) == slow


def test_a_wait_for_another_rank_that_reads_is_not_ones_own():
    clock = StepClock()
    assert clock.data(3.0) == 3.0
    clock.read = 0.5
    assert clock.data(3.0) == 0.5
    clock.read = 9.0
    assert clock.data(3.0) == 3.0


class Measured(StepClock):
    """A clock with given figures."""

    def __init__(self, computing: float) -> None:
        super().__init__()
        self.seconds = computing

    def computing(self, wait: float) -> float:
        return self.seconds


def slowest(each: list[tuple[float, float]], places: list[Place]) -> dict[str, Any]:
    """What the metric makes of (wait, computing) of each rank."""
    sums, metric = [0.0] * (2 * len(each)), Slowest()
    for rank, (wait, computing) in enumerate(each):
        result = StepResult(clock=Measured(computing))
        result.statistics.wait = wait
        step = FinishedStep(result, 1.0, 0, True, [], 1, None, len(each), rank=rank, places=places)
        sums = [a + b for a, b in zip(sums, metric.summed(step), strict=True)]
    return metric.figures(step, sums, [])


def test_the_slowest_is_compared_with_its_own_pipeline_stage():
    """The second stage has more to do: that makes none of its ranks slow."""
    places = [Place("a", 0, 0), Place("a", 1, 0), Place("b", 0, 1), Place("b", 1, 1)]
    found = slowest([(0.0, 1.0), (0.0, 1.5), (0.1, 4.0), (0.0, 4.2)], places)
    assert found["slowest"] | {"host": "a", "gpu": 1} == found["slowest"] and found["slowest"]["rank"] == 1
    assert found["lag"] == pytest.approx(0.5) and found["slowest"]["median_computing"] == 1.0
    assert slowest([(0.0, 1.0), (0.0, 9.0)], [Place("a", None, 0), Place("a", None, 1)]) == {}


def lines(ranks: list[int], lag: float, **slow: float) -> list[dict[str, Any]]:
    usual = {"host": "n2", "gpu": 3, "data": 0.1, "computing": 2.0, "median_data": 0.1, "median_computing": 2.0}
    return [
        {"step": n, "seconds": 4.0, "lag": lag, "slowest": {"rank": r, **usual, **slow}} for n, r in enumerate(ranks)
    ]


def test_only_who_is_slow_for_long_is_named():
    found = straggler(lines([11] * 20, 1.0, computing=3.0))
    assert found == (
        "rank 11 (host n2, GPU 3) is slower than the rest: it computes 3 s of a step, the others 2 s; they wait 1 of "
        "4 s for it (20 of the last 20 steps)"
    )
    assert "waits for its data 1.4 s" in str(straggler(lines([2] * 16 + [0] * 4, 1.3, data=1.4)))
    assert straggler(lines([11] * 20, 0.2, computing=2.2)) is None  # too little
    assert straggler(list(itertools.chain(*(lines([r], 1.0, computing=3.0) for r in range(20))))) is None  # by turns
    assert straggler(lines([11] * 7, 1.0, computing=3.0)) is None  # too soon
    assert straggler([{"step": 1, "seconds": 1.0}] * 20) is None  # an older run's
