"""What of a step this rank did by itself, in seconds: the figures that tell a slow rank from those that wait for it.

A step takes equally long on every rank, because they meet in collectives. So its length says nothing about who is slow;
what differs is the time that a rank does *not* wait for others. Here that is the time from the first fetch of data to
where the ranks exchange gradients, without the wait for data and without the time spent in collectives on the way.

On a GPU both ends are marked on the device's stream, as the host runs ahead of it; collectives on the way (tensor,
context and pipeline parallel ones) then count as computing, so that ranks which share packs look alike. On a CPU a
collective blocks the host, and is left out.
"""

from __future__ import annotations

import functools
import threading
import time
from typing import Any

import torch
from torch._C._distributed_c10d import Work

_spent = threading.local()  # seconds in collectives, of each thread that asked for it


def seconds_in_collectives() -> float:
    """Seconds that this thread has stood still for collectives so far: those of gloo, which block the host. Counting
    begins with the first call in a thread."""
    _count_waiting()
    if not hasattr(_spent, "seconds"):
        _spent.seconds = 0.0
    return float(_spent.seconds)


@functools.cache
def _count_waiting() -> None:
    """Every collective that blocks does so in `Work.wait`, torch's own functions and Megatron's handles alike."""
    wait = Work.wait

    def counted(work: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return wait(work, *args, **kwargs)
        finally:
            if hasattr(_spent, "seconds"):
                _spent.seconds += time.perf_counter() - start

    Work.wait = counted  # type: ignore[method-assign, assignment]


class StepClock:
    """One step on one rank. `begins` at its first micro-batch, `exchanges` where gradients are, both called once or
    more: the first beginning and the last exchange count."""

    def __init__(self) -> None:
        self.read: float | None = None  # seconds that reading the step's data took, where a thread reads ahead for all
        self._began: tuple[float, float, Any] | None = None  # host clock, seconds in collectives, event on the device
        self._ended: tuple[float, float, Any] | None = None

    def begins(self) -> None:
        """The step fetches its first data."""
        if self._began is None:
            self._began = _now()

    def exchanges(self) -> None:
        """This rank's gradients are computed; from here on ranks wait for each other."""
        self._ended = _now()

    def data(self, wait: float) -> float:
        """Seconds of the wait for data that are this rank's own: where one rank reads for others, those that its
        reading took.

        Args:
            wait: seconds that training stood still for data.
        """
        return wait if self.read is None else min(wait, self.read)

    def computing(self, wait: float) -> float:
        """Seconds of computing, at least 0; 0 before both ends are there. On a GPU to be asked for when the host has
        waited for the step's end."""
        if self._began is None or self._ended is None:
            return 0.0
        (start, before, begin), (end, after, finish) = self._began, self._ended
        if begin is None:
            return max(0.0, end - start - wait - (after - before))
        finish.synchronize()
        return max(0.0, begin.elapsed_time(finish) / 1000 - wait)


def _now() -> tuple[float, float, Any]:
    event = None
    if torch.cuda.is_available():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
    return time.perf_counter(), seconds_in_collectives(), event
