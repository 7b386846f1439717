"""How long a pack takes on 1, 2, 4, ... ranks: the cost model of dynamic context parallelism. No torch here.

    seconds(pack, C) = passes * (linear + attention + head) / C + vision(C) + sent(C)

Floating-point operations are the mask's (model/flops.py, data/balance.py), divided by the rate that this kind of work
reaches; bytes are those of parallel/traffic.py. The rates are settings, not measurements of this project: the defaults
are what published kernels reach on an H100 (see each field), and only their ratios matter to an assignment.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from molmo2_nemo.data.balance import allowed_pairs
from molmo2_nemo.data.example import PAD_EXAMPLE, Batch
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.model.flops import connector_flops, crop_flops, forward_flops
from molmo2_nemo.parallel.traffic import AttentionShape, Traffic, context_traffic

MICROSECOND = 1e-6


@dataclass(frozen=True)
class Rates:
    """What one device and its links reach. Defaults: H100 SXM, bf16."""

    matmul: float = 600e12  # FLOP/s of large matrix products
    attention: float = 350e12  # FLOP/s by mask area: between FlashAttention-3 and FlexAttention on packed documents
    vision: float = 380e12  # FLOP/s of the ViT, whose attention is short and whose width is small
    node_bytes: float = 300e9  # bytes/s that a rank sends to others of its node (NVLink)
    network_bytes: float = 40e9  # bytes/s that a rank sends to other nodes (400 Gb/s InfiniBand)
    message: float = 25e-6  # seconds before a message's first byte arrives, launch included
    pack: float = 0.01  # seconds of a micro-batch that no rank shares: launches, planning, small kernels
    node_ranks: int = 8


@dataclass(frozen=True)
class PackCounts:
    """What the cost of a pack follows from. A micro-batch of several packs counts as one."""

    tokens: int  # real ones
    pairs: int  # (query, key) pairs that the mask allows
    unit_crops: np.ndarray  # int64 [U], crops of each indivisible unit
    rows: int = 0  # pooled tokens
    slots: int = 0  # filled window slots of all rows
    scored: int = 0  # tokens with a loss weight

    @classmethod
    def of(cls, batch: Batch) -> PackCounts:
        return cls(
            tokens=int((batch.example_ids != PAD_EXAMPLE).sum()),
            pairs=allowed_pairs(batch),
            unit_crops=batch.unit_crops,
            rows=len(batch.pooling),
            slots=int((batch.pooling >= 0).sum()),
            scored=int((batch.loss_weights > 0).sum()),
        )


@dataclass(frozen=True)
class ContextCost:
    """Seconds of a pack's forward and backward, by the number of ranks that share it.

    Args:
        model: whose sizes count.
        tensor: tensor-parallel ranks, which divide everything but the messages of each rank.
        ulysses, exchange: as in ContextSettings.
        passes: forward passes' worth of work: 3 (the backward is two), 4 with full recomputation.
    """

    model: Molmo2Config
    tensor: int = 1
    ulysses: int | None = None
    exchange: str = "ring"
    passes: int = 3
    element: int = 2
    rates: Rates = field(default_factory=Rates)

    def seconds(self, pack: PackCounts, ranks: int) -> float:
        rates = self.rates
        work = forward_flops(
            self.model,
            tokens=pack.tokens,
            pairs=pack.pairs,
            pooled_rows=pack.rows,
            pooled_slots=pack.slots,
            scored_tokens=pack.scored,
        )
        shared = (work.linear + work.head) / rates.matmul + work.attention / rates.attention
        return (
            self.passes * shared / (ranks * self.tensor)
            + self._vision(pack, ranks * self.tensor)
            + self._sending(pack.tokens, ranks)
            + rates.pack
        )

    def microseconds(self, pack: PackCounts, ranks: int) -> int:
        """Rounded, so that sums do not depend on their order."""
        return round(self.seconds(pack, ranks) / MICROSECOND)

    def _vision(self, pack: PackCounts, ranks: int) -> float:
        """The largest share of the crops, which are dealt in whole units, and of the connector."""
        if not len(pack.unit_crops):
            return 0.0
        from molmo2_nemo.parallel.deal import deal_runs

        bounds = deal_runs(pack.unit_crops, ranks)
        largest = max(int(pack.unit_crops[a:b].sum()) for a, b in zip(bounds, bounds[1:], strict=False))
        share = largest / int(pack.unit_crops.sum())
        return self.passes * (
            crop_flops(self.model) * largest / self.rates.vision
            + connector_flops(self.model, pack.rows, pack.slots) * share / self.rates.matmul
        )

    def _sending(self, tokens: int, ranks: int) -> float:
        if ranks == 1:
            return 0.0
        text, rates = self.model.text, self.rates
        shape = AttentionShape(
            tokens=tokens,
            heads=max(1, text.num_heads // self.tensor),
            kv_heads=max(1, text.num_kv_heads // self.tensor),
            head_size=text.head_dim,
            element=self.element,
        )
        sent: Traffic = context_traffic(shape, ranks, self.ulysses, self.exchange).total(self.passes > 3)
        within = ranks * self.tensor <= rates.node_ranks
        speed = rates.node_bytes if within else rates.network_bytes
        return text.num_layers * (sent.messages * rates.message + sent.bytes / speed)
