"""Dynamic context parallelism in the loader: a step's packs dealt to blocks of the context group's ranks.

The rank that reads for a replica (parallel/packs.py) makes the assignment, which travels with the packs; every rank
then keeps its own, cut to the tokens they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from molmo2_nemo.cost.context import ContextCost, PackCounts, used_tokens
from molmo2_nemo.data.example import Batch
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.parallel.assignment import Turn, assign
from molmo2_nemo.parallel.context import degrees


@dataclass(frozen=True)
class DynamicSettings:
    """What a run says about it.

    Args:
        most_tokens: of a pack on one rank; what it has memory for.
        most_crops: of a pack on one rank (settings/layout.py, `crop_limit`); None: any number.
        ulysses, exchange: as in ContextSettings.
        recompute: forward work is done twice.
        sequence: sequence parallelism cuts a rank's tokens again.
        element: bytes of an activation.
    """

    most_tokens: int
    most_crops: int | None = None
    ulysses: int | None = None
    exchange: str = "ring"
    recompute: bool = False
    sequence: bool = False
    element: int = 2

    def of_rank(self, model: Molmo2Config, tensor: int, size: int, rank: int) -> DynamicContext:
        """For a rank of a context group."""
        cost = ContextCost(model, tensor, self.ulysses, self.exchange, self.recompute, self.element)
        return DynamicContext(cost, size, rank, self.most_tokens, self.most_crops, tensor if self.sequence else 1)


@dataclass(frozen=True)
class DynamicContext:
    """How packs are dealt.

    Args:
        cost: of a pack by ranks.
        size, rank: of the context group.
        most_tokens, most_crops: of a pack on one rank; what it has memory for. A rank of a micro-batch of several packs
            has memory for the crops of so many.
        multiple: a rank's share of a pack is cut into so many equal parts again (tensor ranks, with sequence
            parallelism).
    """

    cost: ContextCost
    size: int
    rank: int
    most_tokens: int
    most_crops: int | None = None
    multiple: int = 1

    def plan(self, batches: Sequence[Batch]) -> list[Turn]:
        """Who works on what, decided once for all ranks."""
        rule = self.cost.model.visual_attention
        return assign(self.table([PackCounts.of(batch, rule) for batch in batches]), degrees(self.size))

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
        """Whether each of `size` ranks has memory for its tokens and crops. A picture is never divided: one with more
        crops than `most_crops` is a rank's under any layout, and is no reason for more ranks."""
        if rounded(pack.length, size * self.multiple) // size > self.most_tokens:
            return False
        if self.most_crops is None:
            return True
        room = max(self.most_crops * pack.packs, int(pack.unit_crops.max(initial=0)))
        return int(pack.unit_crops.sum()) <= room or self.cost.crops_of_rank(pack, size) <= room

    def take(self, batches: Sequence[Batch], turns: Sequence[Turn]) -> list[Batch]:
        """This rank's batches in their order. The last carries the loader's state after the step, all others before."""
        mine = [turn for turn in turns if turn.has(self.rank)]
        taken = []
        for turn in mine:
            batch = without_padding(batches[turn.number], turn.size * self.multiple)
            state = batches[-1 if turn is mine[-1] else 0].state
            taken.append(replace(batch, context_ranks=turn.size, state=state))
        return taken


def rounded(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple


def without_padding(batch: Batch, multiple: int) -> Batch:
    """The batch without the padding behind its longest pack, but for what makes its length a multiple."""
    size = batch.input_ids.shape[1]
    length = rounded(used_tokens(batch), multiple)
    if length >= size:
        return batch
    tokens = {
        name: getattr(batch, name)[:, :length]
        for name in ("input_ids", "labels", "loss_weights", "position_ids", "example_ids", "branch_ids", "visual")
    }
    pack, place = np.divmod(batch.pooled_positions, size)
    return replace(batch, **tokens, pooled_positions=pack * length + place)
