"""Balanced steps with one micro-batch per rank: each rank yields the packs of a window in order of cost.

Where a rank has several micro-batches in a step, the ranks swap some until their sums are equal (balance.py). With only
one there is nothing to swap, but every rank can choose when to use it: if all ranks sort the same number of packs, the
heaviest packs of all ranks meet in one step, the second heaviest in the next, and so on. No rank needs to know about
the others, no pack is sent, and every example is used exactly once. What changes is which packs share a step.

The order is decided from the planned examples, before anything is decoded: a window holds no pixels. Planning stays
even: for every pack of a window that is decoded, one pack of the next window is planned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from molmo2_nemo.data.balance import CostModel
from molmo2_nemo.data.example import Batch
from molmo2_nemo.data.loader import PackStream
from molmo2_nemo.data.planner import Place, PlannedBatch
from molmo2_nemo.data.tally import Tally


class Window(NamedTuple):
    """Batches that are sorted together."""

    size: int
    end: Place  # of the stream after them, in whatever order they are used


class CostOrder:
    """Iterates over a `PackStream` in windows sorted by cost, the heaviest first. One batch is one step.

    The state is that of the stream at the start of the window, plus the number of batches used since and their
    examples. A resumed run rebuilds the window and continues after those batches; a run with another number of ranks
    reads the examples that were not used.

    Args:
        window: batches that are sorted together; all ranks must use the same. A window ends early where a phase of
            `data.progression` ends.
    """

    def __init__(self, stream: PackStream, window: int, cost: CostModel):
        assert window >= 1 and stream.batches_per_step == 1
        self.stream, self.window, self.cost = stream, window, cost
        self._begin()

    def _begin(self) -> None:
        """A window begins where the stream is."""
        self._start = self.stream.mark()
        self._base = self.stream.state()
        self._position = self._base["position"]  # in the stream, at the end of the window
        self._used: list[int] = []  # examples of the batches used from the window
        self._counted = Tally()  # what these add to the counts of the state at its start
        self._given = 0

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position of the stream on; only one iterator may be active at a time."""
        self.stream.go_back(self._start)
        windows: deque[Window] = deque()
        source = self.stream.batches(lambda planned: self._windows(planned, windows))
        again, left = self._given, 0
        try:
            for batch in source:
                if not left:
                    self._position, left = windows[0].end.position, windows[0].size
                left, used = left - 1, again > 0
                if used:  # before the restart; decoded again because damaged records are counted by window
                    again -= 1
                else:
                    self._give()
                if not left:
                    self.stream.place = windows.popleft().end
                    self._begin()
                if not used:
                    batch.state = self.state()
                    yield batch
        finally:
            source.close()  # type: ignore[attr-defined]

    def state(self) -> dict[str, Any]:
        """The position in the stream as JSON values, for `load_states`; every batch carries it too."""
        if not self._given:
            return self._base
        ahead = {
            "window": self.window,
            "packing": self._packing(),
            "given": self._given,
            "used": sorted(self._used),
            "counted": self._counted.json(),
            "position": self._position,
            "steps": self._base["steps"],
        }
        return {**self._base, "steps": self._base["steps"] + self._given, "ahead": ahead}

    def load_states(self, states: list[dict[str, Any]]) -> None:
        """Continue the stream of a saved run; arguments and errors as in `PackStream.load_states`."""
        widths = {state.get("dp_size") for state in states}
        made = [state["ahead"] for state in states if state.get("ahead")]
        same = {"window": self.window, "packing": self._packing()}
        exact = widths == {self.stream.dp_size} and all({k: a[k] for k in same} == same for a in made)
        skips = {ahead["given"] for ahead in made}
        if made and exact and len(skips) == 1 and len(made) == len(states):
            bases = [{**s, "steps": s["ahead"]["steps"]} for s in states]
            self.stream.load_states([{k: v for k, v in s.items() if k != "ahead"} for s in bases])
            self._begin()
            own = next(s for s in states if s["dp_rank"] == self.stream.dp_rank)
            self._given, self._used = skips.pop(), list(own["ahead"]["used"])
            self._counted = Tally.of_json(own["ahead"].get("counted", {}))
            self._position = own["ahead"]["position"]
        else:
            self.stream.load_states(states)
            self._begin()

    def _packing(self) -> list[Any]:
        """The settings that decide which examples share a pack."""
        packing = self.stream.config.packing
        sizes = [packing.sequence_length, packing.max_crops, packing.buffer_size, packing.crop_value]
        return [*sizes, packing.mode, packing.max_wait, self.stream.micro_batch_size]

    def _size(self, step: int) -> int:
        """Number of batches in the window that begins at a step."""
        ends = [phase.until_step - step for phase in self.stream.config.progression if phase.until_step > step]
        return min([self.window, *ends])

    def _windows(self, planned: Iterator[PlannedBatch], windows: deque[Window]) -> Iterator[PlannedBatch]:
        """The batches of every window in the order in which they are used. Windows are appended when they are complete.
        Of the first, those used before the restart come first."""
        used = set(self._used)
        gathered: list[PlannedBatch] = []
        ready: deque[PlannedBatch] = deque()
        try:
            for batch in planned:
                gathered.append(batch)
                if ready:
                    yield ready.popleft()
                if len(gathered) == self._size(gathered[0].place.batches - 1):
                    yield from ready
                    windows.append(Window(len(gathered), gathered[-1].place))
                    ready, gathered = deque(sorted(gathered, key=lambda one: self._rank(one, used))), []
                    yield ready.popleft()
        except Exception:
            yield from ready
            raise

    def _rank(self, planned: PlannedBatch, used: set[int]) -> tuple[bool, int]:
        return used.isdisjoint(planned.numbers()), -self.cost.of(self.stream.without_pixels(planned))

    def _give(self) -> None:
        """Take note of the stream's last batch."""
        seen = self.stream.seen
        self._given += 1
        self._used += [record.number for record in seen]
        waited = {number for number, _ in self._base["packer"]["waiting"]}  # counted there
        for record in seen:
            if record.number not in waited:
                self._counted.read(record)
        self._counted.update(self.stream.found_late)
