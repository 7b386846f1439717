"""Dynamic context parallelism in the loader: a step's packs assigned to blocks of the context group's ranks.

The rank that reads for a replica (parallel/packs.py) makes the assignment, which travels with the packs; every rank
then keeps its own, cut to the tokens they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from molmo2_nemo.data.counts import PackCounts, used_tokens
from molmo2_nemo.data.example import Batch
from molmo2_nemo.parallel.assignment import Assignment, assign
from molmo2_nemo.parallel.partition import degrees


class PackCost(Protocol):
    """Predicts what a pack costs (cost/context.py)."""

    def counts(self, batch: Batch) -> PackCounts:
        """What a micro-batch holds, as far as its cost depends on it."""

    def microseconds(self, pack: PackCounts, ranks: int) -> int:
        """Predicted time of a pack that `ranks` context ranks share."""

    def crops_of_rank(self, pack: PackCounts, ranks: int) -> int:
        """The most crops that one of `ranks` context ranks encodes."""


@dataclass(frozen=True)
class DynamicContext:
    """Assigns a step's packs to the ranks of a context group.

    Args:
        cost: predicts a pack's time by the number of ranks that share it.
        size, rank: the context group's size, and this rank in it.
        context_tokens: most tokens of a pack on one rank; what it has memory for.
        context_crops: most crops (settings/layout.py, `crop_limit`); None: any number. A rank of a micro-batch of
            several packs has memory for the crops of so many.
        multiple: equal parts that a rank's share of a pack is further cut into (the tensor ranks, with sequence
            parallelism; else 1).
    """

    cost: PackCost
    size: int
    rank: int
    context_tokens: int
    context_crops: int | None = None
    multiple: int = 1

    def plan(self, batches: Sequence[Batch]) -> list[Assignment]:
        """The step's assignment, made by the reader for all ranks of the context group."""
        return assign(self.table([self.cost.counts(batch) for batch in batches]), degrees(self.size))

    def table(self, packs: Sequence[PackCounts]) -> np.ndarray:
        """Microseconds of each pack by number of ranks, -1 where it does not fit; int64 [packs, degrees]."""
        sizes = degrees(self.size)
        costs = np.full((len(packs), len(sizes)), -1, np.int64)
        for row, pack in zip(costs, packs, strict=True):
            for column, size in enumerate(sizes):
                if size == self.size or self.fits(pack, size):
                    row[column] = self.cost.microseconds(pack, size)
        return costs

    def fits(self, pack: PackCounts, size: int) -> bool:
        """Whether each of `size` ranks has memory for its tokens and crops. An image is never divided: one with more
        crops than `context_crops` is on one rank under any layout, and is no reason for more ranks."""
        if rounded(pack.length, size * self.multiple) // size > self.context_tokens:
            return False
        if self.context_crops is None:
            return True
        room = max(self.context_crops * pack.packs, int(pack.unit_crops.max(initial=0)))
        return int(pack.unit_crops.sum()) <= room or self.cost.crops_of_rank(pack, size) <= room

    def take(self, batches: Sequence[Batch], assignments: Sequence[Assignment]) -> list[Batch]:
        """This rank's batches in their order. The last carries the loader's state after the step, all others before."""
        mine = [each for each in assignments if each.has(self.rank)]
        taken = []
        for each in mine:
            batch = without_padding(batches[each.number], each.size * self.multiple)
            state = batches[-1 if each is mine[-1] else 0].state
            taken.append(replace(batch, context_ranks=each.size, state=state, of_step=len(mine)))
        return taken


TOKEN_ARRAYS = ("input_ids", "labels", "loss_weights", "position_ids", "example_ids", "branch_ids", "visual")


def rounded(tokens: int, multiple: int) -> int:
    """`tokens` rounded up to a multiple of `multiple`."""
    return -(-tokens // multiple) * multiple


def without_padding(batch: Batch, multiple: int) -> Batch:
    """The batch cut to its longest pack, whose length without padding is rounded up to a multiple of `multiple`."""
    size = batch.input_ids.shape[1]
    length = rounded(used_tokens(batch), multiple)
    if length >= size:
        return batch
    tokens = {name: getattr(batch, name)[:, :length] for name in TOKEN_ARRAYS}
    pack, place = np.divmod(batch.pooled_positions, size)
    return replace(batch, **tokens, pooled_positions=pack * length + place)


def reordered(batch: Batch, order: np.ndarray) -> Batch:
    """The batch with the tokens of every pack in another order; nothing else changes, and every visual token goes to
    its place.

    Args:
        order: int64 [S], the place that each token comes from.
    """
    tokens = {name: getattr(batch, name)[:, order] for name in TOKEN_ARRAYS}
    pack, place = np.divmod(batch.pooled_positions, len(order))
    return replace(batch, **tokens, pooled_positions=pack * len(order) + np.argsort(order)[place])
