"""What context-parallel attention sends: counted at the collectives, and by the formulas for one pack."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.attention.ring import visible_keys
from molmo2_nemo.cost.traffic import AttentionShape, context_traffic, ring_traffic, ulysses_traffic


class Counter:
    """Counts what leaves this rank, at torch.distributed's functions."""

    def __init__(self) -> None:
        self.messages = self.bytes = 0
        for name in ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "batch_isend_irecv"):
            self._watch(name)

    def _watch(self, name: str) -> None:
        original = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._count(name, *args, **kwargs)
            return original(*args, **kwargs)

        setattr(dist, name, counted)

    def _count(self, name: str, *args: Any, group: Any = None) -> None:
        if name == "batch_isend_irecv":
            sends = [op.tensor for op in args[0] if op.op is dist.isend]
            self.messages += len(sends)
            self.bytes += sum(t.nbytes for t in sends)
            return
        ranks, given = dist.get_world_size(group), args[1]
        self.messages += 1
        self.bytes += (
            given.nbytes * (ranks - 1) if name == "all_gather_into_tensor" else given.nbytes // ranks * (ranks - 1)
        )

    def take(self) -> tuple[int, int]:
        found = self.messages, self.bytes
        self.messages = self.bytes = 0
        return found


def exact(
    shape: AttentionShape, context: int, ulysses: int, cp_comm_type: str, mask: TokenMask, chunk: int
) -> list[tuple[float, float]]:
    """The formula with what this pack shows, forward and backward."""
    if cp_comm_type != "ring" or ulysses == context:
        return [(t.messages, t.bytes) for t in steps(context_traffic(shape, context, ulysses, cp_comm_type))]
    chunks = context // ulysses
    visible = visible_keys(mask, chunks)
    others = [j for j in range(chunks) if j != chunk]
    shown = [visible.count(j, chunk) for j in others] + [visible.count(chunk, j) for j in others]
    shown = [run * len(mask.example_ids) for run in shown]  # the same places of every pack
    found = ulysses_traffic(shape, context, ulysses) + ring_traffic(shape, context, ulysses, shown)
    return [(t.messages, t.bytes) for t in steps(found)]


def steps(found: Any) -> tuple[Any, Any]:
    return found.forward, found.backward


def vision_all_gather_bytes(pooled_tokens: int, width: int, bytes_per_element: int, ranks: int) -> int:
    """What all ranks together would send if every pooled token went to every rank (what the published code does)."""
    return pooled_tokens * width * bytes_per_element * (ranks - 1)
