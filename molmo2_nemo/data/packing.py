"""Two-budget packing: choose waiting examples so that a pack nearly fills its tokens and stays within its crops.

Online, from a bounded buffer, deterministic. Two modes share one class:

- `balanced` (production): every subset sum of the buffer is known exactly, as one big integer used as a bit set over
  (tokens, crops); the best reachable pair fills the scarcer budget and leaves a buffer of the stream's own mixture
  behind. An example that has waited `max_wait` packs is forced into the next one, so every wait is bounded.
- `knapsack` (reference): the 0/1 two-dimensional knapsack by dynamic programming that maximises
  tokens + crop_value * crops, as in the published runs. It has no limit on waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from molmo2_nemo.data.config import PackingConfig, PackingMode
from molmo2_nemo.errors import DataError, plural

CELLS = 1024  # lower bound on the token resolution of the balanced mode
GRAIN = 16  # tokens; upper bound on the cell size of the balanced mode
KNAPSACK_CELLS = 512  # token resolution of the knapsack mode


@dataclass(slots=True)
class Item:
    """One example waiting for a pack."""

    id: int  # its number in the global stream
    tokens: int
    crops: int
    payload: Any = None
    arrived: int = 0  # packs emitted when it came in


class Packer:
    """Collects items and emits packs.

    Args:
        tokens: budget of tokens of a pack (the sequence length).
        crops: budget of crops of a pack.
        buffer_size: examples that may wait; a pack is emitted when one more arrives.
        crop_value: value of a crop in tokens (knapsack mode).
        max_wait: packs an example may wait before it is forced; default `buffer_size`. No wait ever exceeds
            `max_wait + buffer_size`, since a forced example leaves with every pack while any is overdue.
    """

    def __init__(
        self,
        tokens: int,
        crops: int,
        *,
        buffer_size: int = PackingConfig.buffer_size,
        crop_value: float = PackingConfig.crop_value,
        mode: PackingMode = PackingConfig.mode,
        max_wait: int | None = PackingConfig.max_wait,
    ):
        if tokens < 1 or crops < 0 or buffer_size < 1:
            raise DataError(f"packing needs tokens >= 1, crops >= 0, buffer >= 1; got {tokens}, {crops}, {buffer_size}")
        if mode not in get_args(PackingMode):
            raise DataError(f"unknown packing mode {mode!r}; known are {', '.join(get_args(PackingMode))}")
        self.tokens, self.crops = tokens, crops
        self.buffer_size, self.crop_value, self.mode = buffer_size, crop_value, mode
        self.max_wait = buffer_size if max_wait is None else max_wait
        self.emitted = 0  # packs emitted so far
        self.waiting: list[Item] = []  # oldest first
        self._bits = SubsetSums(tokens, crops)

    def fits(self, tokens: int, crops: int) -> bool:
        """Whether an example of this size fits into an empty pack."""
        return tokens <= self.tokens and crops <= self.crops

    def add(self, item: Item) -> list[Item] | None:
        """Add one example; returns a pack if one is due.

        Raises:
            DataError: the example alone exceeds a budget.
        """
        if not self.fits(item.tokens, item.crops):
            raise DataError(
                f"example {item.id} has {plural(item.tokens, 'token')} and {plural(item.crops, 'crop')}; a pack "
                f"holds {self.tokens} and {self.crops}"
            )
        item.arrived = self.emitted
        full = self._is_full(item)
        if full and not self._overdue():  # no usable room is left beside it: emit it alone
            self.emitted += 1
            return [item]
        if len(self.waiting) < self.buffer_size and not full:
            self.waiting.append(item)
            return None
        pack = self._emit()
        item.arrived = self.emitted
        self.waiting.append(item)
        return pack

    def flush(self) -> list[list[Item]]:
        """Pack everything that waits (end of a finite stream)."""
        packs = []
        while self.waiting:
            packs.append(self._emit())
        return packs

    def state(self) -> dict[str, Any]:
        """JSON values: the waiting examples' ids, oldest first, each with the packs emitted before it arrived."""
        return {"emitted": self.emitted, "waiting": [[item.id, item.arrived] for item in self.waiting]}

    def restore(self, state: dict[str, Any], rebuild: Callable[[int], Item]) -> None:
        """Refill the buffer from a saved state; `rebuild(id)` decodes an example anew and returns its item."""
        self.emitted = int(state["emitted"])
        self.waiting = []
        for number, arrived in state["waiting"]:
            item = rebuild(int(number))
            item.arrived = int(arrived)
            self.waiting.append(item)

    def _overdue(self) -> bool:
        """Whether the oldest example has waited long enough to be forced (balanced mode only)."""
        if self.mode == "knapsack" or not self.waiting:
            return False
        return self.emitted - self.waiting[0].arrived >= self.max_wait

    def _is_full(self, item: Item) -> bool:
        if self.mode == "knapsack":
            grain = max(1, self.tokens // KNAPSACK_CELLS)
            return -(-item.tokens // grain) >= -(-self.tokens // grain)
        return item.tokens >= self.tokens - self.tokens // 256

    def _emit(self) -> list[Item]:
        chosen = self._choose()
        assert chosen, "every waiting example fits alone, so a pack is never empty"
        self.emitted += 1
        pack = [self.waiting[i] for i in chosen]
        kept = set(chosen)
        self.waiting = [item for i, item in enumerate(self.waiting) if i not in kept]
        return pack

    def _choose(self) -> list[int]:
        sizes = [(item.tokens, item.crops) for item in self.waiting]
        if self.mode == "knapsack":
            return knapsack(sizes, self.tokens, self.crops, self.crop_value)
        return self._bits.choose(sizes, forced=0 if self._overdue() else None)


class SubsetSums:
    """All (tokens, crops) sums that subsets of the waiting examples reach, within the budgets.

    Bit t * stride + c of an integer stands for "some subset uses t cells of tokens and c crops". Adding an example is
    one shift and one OR of some ten thousand bytes.
    """

    def __init__(self, tokens: int, crops: int):
        self.tokens, self.crops = tokens, crops
        self.grain = max(1, min(GRAIN, tokens // CELLS))
        self.cells = tokens // self.grain
        self.stride = 2 * crops + 1  # room for an overflow of crops, masked away after every shift
        row = (1 << (crops + 1)) - 1
        mask = 0
        for t in range(self.cells + 1):
            mask |= row << (t * self.stride)
        self.mask = mask

    def choose(self, sizes: Sequence[tuple[int, int]], forced: int | None) -> list[int]:
        """Indices of the examples of the next pack, ascending (so oldest first).

        Tokens are rounded to the nearest cell, so that many examples waste no more than one; the best subset is then
        counted in tokens, and if it is over the budget the next best is taken.
        """
        cells = [min(self.cells, (tokens + self.grain // 2) // self.grain) for tokens, _ in sizes]
        order = [i for i in range(len(sizes)) if i != forced]
        start = 0 if forced is None else cells[forced] * self.stride + sizes[forced][1]
        reach = [1 << start]
        for i in order:
            reach.append(reach[-1] | ((reach[-1] << (cells[i] * self.stride + sizes[i][1])) & self.mask))
        for goal in self._best_first(reach[-1], sizes):
            chosen = [] if forced is None else [forced]
            for step in range(len(order) - 1, -1, -1):  # prefer leaving an example out, so that newer ones stay
                if not (reach[step] >> goal) & 1:
                    chosen.append(order[step])
                    goal -= cells[order[step]] * self.stride + sizes[order[step]][1]
            if chosen and sum(sizes[i][0] for i in chosen) <= self.tokens:
                return sorted(chosen)
        return [0]  # not reached by examples that fit alone, but an example must never be stuck

    def _best_first(self, reached: int, sizes: Sequence[tuple[int, int]]) -> Iterator[int]:
        """Reachable bits by descending score; for each number of crops only the highest token count competes."""
        width = (self.cells + 1) * self.stride
        raw = np.frombuffer(reached.to_bytes(-(-width // 8), "little"), np.uint8)
        bits = np.unpackbits(raw, count=width, bitorder="little").reshape(self.cells + 1, self.stride)
        bits = bits[:, : self.crops + 1]
        demand, c = self._demand(sizes), np.arange(self.crops + 1)
        t = self.cells - np.argmax(bits[::-1], axis=0)  # [crops + 1], the highest tokens with c crops
        score = pack_score(t / self.cells, c / max(1, self.crops), demand)
        score[bits[t, c] == 0] = -1.0
        while score[best := int(np.argmax(score))] >= 0:
            yield int(t[best]) * self.stride + best
            below = np.flatnonzero(bits[: t[best], best])
            t[best] = below[-1] if len(below) else 0
            step = pack_score(t[best] / self.cells, best / max(1, self.crops), demand)
            score[best] = step if len(below) else -1.0

    def _demand(self, sizes: Sequence[tuple[int, int]]) -> float:
        """Demand for crops over demand for tokens, both in packs; above 1, crops are the scarcer budget."""
        tokens = sum(tokens for tokens, _ in sizes) / self.tokens
        crops = sum(crops for _, crops in sizes) / max(1, self.crops)
        return crops / max(tokens, 1e-9)


def pack_score(t: Any, c: Any, demand: float) -> Any:
    """Score of filling the fractions (t, c) of the budgets when the buffer's demand is `demand` crops per token.

    The scarcer budget dominates; the other is weighted by its share of the demand, so that neither kind of example
    accumulates in the buffer.
    """
    scarce_crops = min(1.0, demand)
    scarce_tokens = min(1.0, 1.0 / max(demand, 1e-9))
    return scarce_tokens**2 * t + scarce_crops**2 * c


def knapsack(sizes: Sequence[tuple[int, int]], tokens: int, crops: int, crop_value: float) -> list[int]:
    """Exact 0/1 knapsack with two capacities, examples in buffer order; returns the chosen indices, newest first.

    Among equal values an example that does not strictly improve is left out, so older ones win.
    """
    grain = max(1, tokens // KNAPSACK_CELLS)
    room = -(-tokens // grain)
    best = np.zeros((room + 1, crops + 1), np.float32)
    taken = np.zeros((len(sizes), room + 1, crops + 1), bool)
    for i, (item_tokens, item_crops) in enumerate(sizes):
        t = -(-item_tokens // grain)
        if t > room or item_crops > crops:
            continue
        value = np.float32(item_tokens + crop_value * item_crops)
        with_item = best[: room + 1 - t, : crops + 1 - item_crops] + value
        better = with_item > best[t:, item_crops:]
        taken[i, t:, item_crops:] = better
        updated = best.copy()
        updated[t:, item_crops:] = np.where(better, with_item, best[t:, item_crops:])
        best = updated
    chosen, t_left, c_left = [], room, crops
    for i in range(len(sizes) - 1, -1, -1):
        if taken[i, t_left, c_left]:
            chosen.append(i)
            t_left -= -(-sizes[i][0] // grain)
            c_left -= sizes[i][1]
    return chosen
