"""How long a pack takes on 1, 2, 4, ... ranks: the cost model of dynamic context parallelism. No torch here.

    seconds(pack, C) = (decoder / C + vision(C)) * (1 + other) + sent(C) + of a micro-batch

Floating-point operations are the mask's (cost/flops.py, data/balance.py), divided by the rate that this kind of work
reaches; bytes are those of cost/traffic.py. The rates are those of the planner (cost/rates.py): assumptions, not
measurements of this project, and only their ratios matter to an assignment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from molmo2_nemo.cost.flops import connector_flops, crop_flops, forward_flops
from molmo2_nemo.cost.hardware import DEVICES, Device
from molmo2_nemo.cost.rates import ATTENTION_BACKWARD, Rates
from molmo2_nemo.cost.traffic import AttentionShape, Steps, keys_traffic, ulysses_traffic
from molmo2_nemo.data.balance import allowed_pairs
from molmo2_nemo.data.example import PAD_EXAMPLE, Batch
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.parallel.partition import deal_runs

MICROSECOND = 1e-6
MICRO_BATCH = 0.01  # seconds that no rank shares: launches, planning, small kernels


@dataclass(frozen=True)
class PackCounts:
    """What the cost of a pack, and whether it fits, follows from. A micro-batch of several packs counts as one."""

    tokens: int  # real ones
    pairs: int  # (query, key) pairs that the mask allows
    unit_crops: np.ndarray  # int64 [U], crops of each indivisible unit
    unit_pooled_tokens: np.ndarray  # int64 [U], pooled tokens of each
    slots: int = 0  # filled window slots of all pooled tokens
    scored: int = 0  # tokens with a loss weight
    length: int = 0  # of the longest pack, the padding behind it not counted
    packs: int = 1

    @classmethod
    def of(cls, batch: Batch, visual_attention: str = "image_tokens") -> PackCounts:
        return cls(
            tokens=int((batch.example_ids != PAD_EXAMPLE).sum()),
            pairs=allowed_pairs(batch, visual_attention),
            unit_crops=batch.unit_crops,
            unit_pooled_tokens=batch.unit_pooled_tokens,
            slots=int((batch.pooling >= 0).sum()),
            scored=int((batch.loss_weights > 0).sum()),
            length=used_tokens(batch),
            packs=len(batch.example_ids),
        )

    @cached_property
    def rows(self) -> int:
        return int(self.unit_pooled_tokens.sum())


def used_tokens(batch: Batch) -> int:
    """Tokens of the batch's longest pack, the padding behind it not counted; at least 1."""
    used = np.flatnonzero((batch.example_ids != PAD_EXAMPLE).any(axis=0))
    return int(used[-1]) + 1 if len(used) else 1


@dataclass(frozen=True)
class ContextCost:
    """Seconds of a pack's forward and backward, by the number of ranks that share it.

    Args:
        model: whose sizes and visual attention count.
        tensor: tensor-parallel ranks, which divide everything but the messages of each rank.
        ulysses, exchange: as in ContextSettings.
        recompute: all forward work is done twice.
        element: bytes of an activation.
        device, rates: whose peak and links, and what share of them is reached.
        node_ranks: ranks whose exchanges stay on links.
        micro_batch: seconds of one that no rank shares.
    """

    model: Molmo2Config
    tensor: int = 1
    ulysses: int | None = None
    exchange: str = "ring"
    recompute: bool = False
    element: int = 2
    device: Device = DEVICES["h100"]
    rates: Rates = field(default_factory=Rates)
    node_ranks: int = 8
    micro_batch: float = MICRO_BATCH

    def seconds(self, pack: PackCounts, ranks: int) -> float:
        shards, passes = ranks * self.tensor, 4 if self.recompute else 3
        work = forward_flops(self.model, tokens=pack.tokens, pairs=pack.pairs, scored_tokens=pack.scored)
        rates, peak = self.rates, self.device.tflops * 1e12
        matrix = passes * (work.linear + work.head) / rates.matrix_share(max(1.0, pack.tokens / shards))
        attention = work.attention * (
            (passes - 2) / rates.attention_forward + ATTENTION_BACKWARD / rates.attention_backward
        )
        computing = (matrix + attention) / shards + passes * self._vision(pack, shards) / rates.vision
        return computing / peak * (1 + rates.other) + self._sending(pack.tokens, ranks) + self.micro_batch

    def microseconds(self, pack: PackCounts, ranks: int) -> int:
        """Rounded, so that sums do not depend on their order."""
        return round(self.seconds(pack, ranks) / MICROSECOND)

    def crops_of_rank(self, pack: PackCounts, ranks: int) -> int:
        """The most crops that one of `ranks` context ranks encodes."""
        bounds = self._runs(pack, ranks * self.tensor)
        return max(int(pack.unit_crops[a:b].sum()) for a, b in zip(bounds, bounds[1:], strict=False))

    def _vision(self, pack: PackCounts, shards: int) -> float:
        """Operations of the rank with the largest share of the crops, which are dealt in whole units."""
        if not len(pack.unit_crops):
            return 0.0
        bounds, slots = self._runs(pack, shards), pack.slots / max(1, pack.rows)  # filled ones of a pooled token
        return max(
            crop_flops(self.model) * int(pack.unit_crops[a:b].sum())
            + connector_flops(self.model, 1, 0) * int(pack.unit_pooled_tokens[a:b].sum())
            + connector_flops(self.model, 0, 1) * int(pack.unit_pooled_tokens[a:b].sum()) * slots
            for a, b in zip(bounds, bounds[1:], strict=False)
        )

    def _runs(self, pack: PackCounts, shards: int) -> list[int]:
        return deal_runs(unit_costs(self.model, pack.unit_crops, pack.unit_pooled_tokens), shards)

    def _sending(self, tokens: int, ranks: int) -> float:
        if ranks == 1:
            return 0.0
        text, ulysses = self.model.text, math.gcd(ranks, self.ulysses or ranks)
        shape = AttentionShape(
            tokens=tokens,
            heads=max(1, text.num_heads // self.tensor),
            kv_heads=max(1, text.num_kv_heads // self.tensor),
            head_size=text.head_dim,
            element=self.element,
        )
        layer = self._exposed(ulysses_traffic(shape, ranks, ulysses), ulysses)
        layer += self._exposed(keys_traffic(shape, ranks, ulysses, self.exchange), ranks)
        return text.num_layers * layer

    def _exposed(self, sent: Steps, ranks: int) -> float:
        """Seconds of an exchange among so many context ranks that computing does not hide."""
        rates, device, total = self.rates, self.device, sent.total(self.recompute)
        inside = ranks * self.tensor <= self.node_ranks
        speed = 1e9 * (rates.link * device.link_gbs if inside else rates.network * device.network_gbs)
        return (1 - rates.hidden_exchange) * total.bytes / speed + total.messages * rates.latency


def unit_costs(model: Molmo2Config, unit_crops: np.ndarray, unit_pooled_tokens: np.ndarray) -> np.ndarray:
    """What units are dealt by: operations of encoding their crops and pooling their rows of four patches."""
    return unit_crops * crop_flops(model) + unit_pooled_tokens * connector_flops(model, 1, 4)
