"""Like with like: each rank gives the packs of a window in order of cost, for steps of one micro-batch per rank.

Where a rank has several micro-batches in a step, the ranks swap some until their sums are equal (balance.py). With one
there is nothing to swap, but every rank can choose when to use it: if all sort the same number of packs, the
heaviest of each meet in one step, the second heaviest in the next, and so on. No rank needs to know of the others, no
pack travels, and no example is used twice or left out. What changes is which packs share a step.

Reading stays even: while a window is used up, one pack of the next is read for every pack given.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from molmo2_nemo.data.balance import CostModel
from molmo2_nemo.data.example import Batch
from molmo2_nemo.data.loader import PackStream

Held = tuple[Batch, list[int]]  # a batch and the numbers of its examples


class CostOrder:
    """Iterates over a `PackStream` in windows sorted by cost, the heaviest first. One batch is one step.

    The state is the stream's at the beginning of the window, how many were given since, and their examples. A resumed
    run builds the window again and continues behind those; a run of another width reads what they leave.

    Args:
        window: batches that are sorted together; all ranks must use the same. A window ends early where a phase of
            `data.progression` ends.
    """

    def __init__(self, stream: PackStream, window: int, cost: CostModel):
        assert window >= 1 and stream.batches_per_step == 1
        self.stream, self.window, self.cost = stream, window, cost
        self._begin()

    def _begin(self) -> None:
        self._base = self._end = self.stream.state()  # of the stream at both ends of the window in use
        self._current: list[Held] = []  # what is left of it
        self._next: list[Held] = []  # read for the one after it
        self._used: list[int] = []  # examples of the batches given
        self._given = 0
        self._skip = 0  # batches of the first window that were used before the restart

    def __iter__(self) -> Iterator[Batch]:
        """Continue where the stream stands; one iterator at a time."""
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
        """JSON values that `load_states` takes; also attached to every batch."""
        if not self._given:
            return self._base
        ahead = {
            "window": self.window,
            "packing": self._packing(),
            "given": self._given,
            "used": sorted(self._used),
            "position": self._end["position"],
            "steps": self._base["steps"],
        }
        return {**self._base, "steps": self._base["steps"] + self._given, "ahead": ahead}

    def load_states(self, states: list[dict[str, Any]]) -> None:
        """Continue a saved run; see `PackStream.load_states`."""
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
            self._end = {**self._base, "position": own["ahead"]["position"]}
        else:
            self.stream.load_states(states)
            self._begin()

    def _packing(self) -> list[Any]:
        """What decides which examples share a pack."""
        packing = self.stream.config.packing
        sizes = [packing.sequence_length, packing.max_crops, packing.buffer_size, packing.crop_value]
        return [*sizes, packing.mode, packing.max_wait, self.stream.micro_batch_size]

    def _size(self, step: int) -> int:
        """Batches of the window that begins at a step."""
        ends = [phase.until_step - step for phase in self.stream.config.progression if phase.until_step > step]
        return min([self.window, *ends])

    def _read(self, source: Iterator[Batch]) -> None:
        """One more batch for the next window, if it lacks any."""
        if len(self._next) < self._size(self._end["steps"]):
            self._next.append((next(source), self.stream.numbers))

    def _start_window(self) -> None:
        """Use the next window, if it is complete."""
        begin = self._base if self._skip else self._end
        if len(self._next) < self._size(begin["steps"]):
            return
        ranked = sorted(range(len(self._next)), key=lambda i: (-self.cost.of(self._next[i][0]), i))
        ordered = [self._next[i] for i in ranked]
        self._base, self._end, self._next = begin, self.stream.state(), []
        self._current = ordered[self._skip :]
        if not self._skip:
            self._given, self._used = 0, []
        self._skip = 0

    def _give(self) -> Batch:
        batch, numbers = self._current.pop(0)
        self._given += 1
        self._used += numbers
        if not self._current:  # the window is used up: what comes next begins at its end
            self._base, self._given, self._used = self._end, 0, []
        return batch
