"""Micro-batches made ready one ahead: the same ones, in order, with their state; errors and ends where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from molmo2_nemo.training.ahead import Ahead


class Source:
    """Numbers from 0 on, and how many were read; ends, or fails, at one."""

    def __init__(self, end: int | None = None, error: Exception | None = None) -> None:
        self.read, self.threads, self.closed = 0, set(), threading.Event()
        self.end, self.error = end, error

    def __iter__(self) -> Iterator[int]:
        try:
            while self.read != self.end:
                self.threads.add(threading.current_thread().name)
                self.read += 1
                yield self.read - 1
            if self.error is not None:
                raise self.error
        finally:
            self.closed.set()


def settled(source: Source, count: int) -> bool:
    """Whether the source comes to have read so many, and does not read on."""
    deadline = time.monotonic() + 10
    while source.read < count and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    return source.read == count


def test_one_is_made_ready_beyond_the_one_that_was_taken():
    source = Source()
    made = Ahead(source, lambda number: ("made", number))
    assert source.read == 0
    taken = iter(made)
    assert settled(source, 1)  # ready before training asks
    assert next(taken) == ("made", 0) and settled(source, 2)
    assert next(taken) == ("made", 1) and settled(source, 3)
    assert iter(made) is taken  # asked for again, it goes on
    assert next(taken) == ("made", 2)
    made.close()
    assert source.closed.wait(10)
    assert len(source.threads) == 2  # the first where it was asked for, all others in the thread


def test_what_comes_next_can_be_looked_at():
    made = Ahead(Source(end=2), str)
    assert made.look() == made.look() == "0"
    taken = iter(made)
    assert next(taken) == "0" and made.look() == "1" and next(taken) == "1"
    assert made.look() is None
    assert list(taken) == []
    assert made.look() is None  # however often


def test_none_is_read_beyond_the_most():
    source = Source()
    assert list(Ahead(source, str, most=3)) == ["0", "1", "2"]
    assert source.read == 3 and source.closed.wait(10)


@pytest.mark.parametrize("end", [0, 1, 4])
def test_the_end_comes_after_the_last(end):
    assert list(Ahead(Source(end), int)) == list(range(end))


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("where", ["loader", "plan"])
def test_an_error_comes_where_training_would_have_met_it(at, where):
    def make(number: int) -> int:
        if where == "plan" and number == at:
            raise ValueError("broken")
        return number

    taken = iter(Ahead(Source(at, ValueError("broken")) if where == "loader" else Source(), make))
    assert [next(taken) for _ in range(at)] == list(range(at))
    with pytest.raises(ValueError, match="broken"):
        next(taken)


def test_a_thread_that_reads_is_told_to_end():
    source = Source()
    made = Ahead(source, str)
    taken = iter(made)
    next(taken)
    taken.close()  # as a generator is that nobody wants any more
    assert source.closed.wait(10)
    assert all(thread.name != "ahead" for thread in threading.enumerate())
