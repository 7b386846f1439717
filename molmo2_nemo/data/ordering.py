"""Balanced steps with one micro-batch per rank: each rank yields the packs of a window in order of cost.

Where a rank has several micro-batches in a step, the ranks swap some until their sums are equal (balance.py). With only
one there is nothing to swap, but every rank can choose when to use it: if all ranks sort the same number of packs, the
heaviest packs of all ranks meet in one step, the second heaviest in the next, and so on. No rank needs to know about
the others, no pack is sent, and every example is used exactly once. What changes is which packs share a step.

Reading stays even: for every pack of a window that is used, one pack of the next window is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from molmo2_nemo.data.balance import CostModel
from molmo2_nemo.data.example import Batch
from molmo2_nemo.data.loader import PackStream
from molmo2_nemo.data.tally import Seen, Tally


class Held(NamedTuple):
    """A batch, and what it adds to the counts."""

    batch: Batch
    seen: list[Seen]  # its examples, as planned
    late: Tally  # what decoding them has found


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
        self._base = self._end = self.stream.state()  # stream states at both ends of the current window
        self._current: list[Held] = []  # batches of the current window not yet used
        self._next: list[Held] = []  # batches read for the next window
        self._used: list[int] = []  # examples of the batches used from the current window
        self._counted = Tally()  # what these add to the counts of the state at its start
        self._given = 0
        self._skip = 0  # batches of the first window that were used before the restart

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position of the stream on; only one iterator may be active at a time."""
        source = iter(self.stream)
        try:
            while True:
                self._read(source)
                while not self._current:
                    self._read(source)
                    self._start_window()
                batch = self._give()
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
            "position": self._end["position"],
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
            self._skip = skips.pop()
            own = next(s for s in states if s["dp_rank"] == self.stream.dp_rank)
            self._given, self._used = self._skip, list(own["ahead"]["used"])
            self._counted = Tally.of_json(own["ahead"].get("counted", {}))
            self._end = {**self._base, "position": own["ahead"]["position"]}
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

    def _read(self, source: Iterator[Batch]) -> None:
        """Read one more batch for the next window, unless it is complete."""
        if len(self._next) < self._size(self._end["steps"]):
            self._next.append(Held(next(source), self.stream.seen, self.stream.found_late))

    def _start_window(self) -> None:
        """Make the next window the current one, if it is complete."""
        begin = self._base if self._skip else self._end
        if len(self._next) < self._size(begin["steps"]):
            return
        ranked = sorted(range(len(self._next)), key=lambda i: (-self.cost.of(self._next[i].batch), i))
        ordered = [self._next[i] for i in ranked]
        self._base, self._end, self._next = begin, self.stream.state(), []
        self._current = ordered[self._skip :]
        if not self._skip:
            self._given, self._used, self._counted = 0, [], Tally()
        self._skip = 0

    def _give(self) -> Batch:
        held = self._current.pop(0)
        self._given += 1
        self._used += [seen.number for seen in held.seen]
        waited = {number for number, _ in self._base["packer"]["waiting"]}  # counted there
        for seen in held.seen:
            if seen.number not in waited:
                self._counted.read(seen)
        self._counted.update(held.late)
        if not self._current:  # the window is used up: what comes next begins at its end
            self._base, self._given, self._used, self._counted = self._end, 0, [], Tally()
        return held.batch
