"""Formulas of traffic and cost against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from molmo2_nemo.cost.context import ContextCost, PackCounts
from molmo2_nemo.cost.flops import connector_flops, crop_flops, forward_flops
from molmo2_nemo.cost.hardware import DEVICES
from molmo2_nemo.cost.rates import Rates
from molmo2_nemo.cost.traffic import (
    AttentionShape,
    Traffic,
    all_gather_traffic,
    context_traffic,
    gradient_traffic,
    ring_traffic,
    tensor_traffic,
    ulysses_traffic,
)
from molmo2_nemo.model.config import preset

STAGE_3 = AttentionShape(tokens=36864, heads=32, kv_heads=8, head_size=128)


def test_the_published_layout():
    """Stage 3 of the 8B on 8 ranks: q 37.7, k and v 9.4 each, out 37.7 MB per layer and rank, 7/8 of it leaving."""
    steps = ulysses_traffic(STAGE_3, 8, 8)
    assert steps.forward.bytes == pytest.approx((37.75e6 + 2 * 9.44e6 + 37.75e6) * 7 / 8, rel=1e-3)
    assert steps.forward == steps.backward and steps.forward.messages == 2


def test_key_heads_are_repeated_beyond_their_number():
    """On 16 ranks each of 8 key heads is held twice: 32 + 2 * 16 + 32 heads of 2,304 tokens leave but for a 16th."""
    assert ulysses_traffic(STAGE_3, 16, 16).forward.bytes == 2304 * 96 * 128 * 2 * 15 / 16


def test_exchanges_of_keys():
    """4 x 2 ranks: 2 key heads a rank; the other half's keys and values of 18,432 tokens."""
    sent = 18432 * 2 * 2 * 128 * 2
    ring, gathered = ring_traffic(STAGE_3, 8, 4), all_gather_traffic(STAGE_3, 8, 4)
    assert ring.forward == gathered.forward == Traffic(1, sent)
    assert ring.backward == gathered.backward == Traffic(2, 2 * sent)
    inside = ulysses_traffic(STAGE_3, 8, 4)
    assert context_traffic(STAGE_3, 8, 4).total(recompute=True).bytes == inside.forward.bytes * 3 + 4 * sent


def test_ring_sends_what_is_shown():
    shown = ring_traffic(STAGE_3, 4, 1, [0, 100, 9216, 9216, 0, 0])
    assert shown.forward == Traffic(2, 9316 * 2 * 8 * 128 * 2)
    assert shown.backward == Traffic(3, (9316 + 9216) * 2 * 8 * 128 * 2)


def test_other_kinds():
    """All-reduce of n bytes over 2 ranks sends n; sequence parallelism sends the same forward."""
    plain, sharded = tensor_traffic(1000, 64, 2, 2, False), tensor_traffic(1000, 64, 2, 2, True)
    assert plain.forward.bytes == sharded.forward.bytes == 2 * 1000 * 64 * 2
    assert gradient_traffic(100, 4).bytes == 100 * 6 * 3 / 4
    assert gradient_traffic(100, 4, distributed=False).bytes == 2 * 100 * 4 * 3 / 4
    assert gradient_traffic(100, 1) == Traffic()


def counts(unit_crops: list[int], **rest: int) -> PackCounts:
    units = np.array(unit_crops, np.int64)
    return PackCounts(tokens=30000, pairs=10**8, unit_crops=units, unit_pooled_tokens=units * 81, scored=1000, **rest)


def test_cost_is_work_over_rates():
    """Nothing that is sent or waited for: a rank's share of each kind of work over its rate, by hand."""
    model = preset("8b")
    rates = Rates(half_rate=0.0, hidden_exchange=1.0, latency=0.0)
    pack = counts([1] * 64, slots=64 * 729)
    work = forward_flops(model, tokens=30000, pairs=10**8, scored_tokens=1000)
    vision = 64 * crop_flops(model) + connector_flops(model, 64 * 81, 64 * 729)
    decoder = (work.linear + work.head) / 0.62
    for recompute in (False, True):
        attention = work.attention * ((2 if recompute else 1) / 0.27 + 2.5 / 0.18)
        shared = (4 if recompute else 3) * (decoder + vision / 0.38) + attention
        expected = 1.12 * shared / 989e12
        cost = ContextCost(model, rates=rates, recompute=recompute, micro_batch=0.0)
        for ranks in (1, 2, 8):
            assert cost.seconds(pack, ranks) == pytest.approx(expected / ranks)
    # one picture of 64 crops cannot be divided
    whole, cost = counts([64], slots=64 * 729), ContextCost(model, rates=rates, micro_batch=0.0)
    undivided = 1.12 * 3 * vision / 0.38 / 989e12
    gain = cost.seconds(whole, 1) - cost.seconds(whole, 8)
    assert gain == pytest.approx((cost.seconds(whole, 1) - undivided) * 7 / 8)
    # few tokens of a rank make slow products
    slow = ContextCost(model, rates=Rates(half_rate=3750.0, hidden_exchange=1.0, latency=0.0), micro_batch=0.0)
    fast = ContextCost(model, rates=rates, micro_batch=0.0)
    assert slow.seconds(pack, 8) - fast.seconds(pack, 8) == pytest.approx(1.12 * 3 * decoder / 989e12 / 8)


def test_cost_counts_crops_of_the_busiest_rank():
    cost = ContextCost(preset("8b"), tensor=2)
    assert [cost.crops_of_rank(counts([1] * 64), ranks) for ranks in (1, 2, 4)] == [32, 16, 8]
    assert [cost.crops_of_rank(counts([9, 1, 1, 9]), ranks) for ranks in (1, 2)] == [10, 9]
    assert cost.crops_of_rank(counts([]), 4) == 0


def test_an_empty_pack_costs_next_to_nothing():
    none = np.zeros(0, np.int64)
    cost = ContextCost(preset("8b"), micro_batch=0.5)
    assert cost.seconds(PackCounts(0, 0, none, none), 1) == 0.5


def test_sharing_costs_what_is_sent():
    """Inside a node over links, beyond it over the network: heads where they are dealt, keys between nodes."""
    model, device = preset("8b"), DEVICES["h100"]
    pack = PackCounts(36864, 10**8, np.zeros(0, np.int64), np.zeros(0, np.int64))

    def seconds(ranks: int, ulysses: int | None = None, **speeds: float) -> float:
        return ContextCost(model, ulysses=ulysses, device=replace(device, **speeds)).seconds(pack, ranks)

    layers, exposed = 36, 0.7
    assert seconds(1) == seconds(1, link_gbs=225, network_gbs=25)
    for ranks, ulysses in ((8, None), (32, 8)):
        sent = ulysses_traffic(STAGE_3, ranks, ulysses or ranks).total().bytes
        slower = seconds(ranks, ulysses, link_gbs=225) - seconds(ranks, ulysses)
        assert slower == pytest.approx(layers * exposed * sent / (0.75 * 450e9))
    assert seconds(8) == seconds(8, network_gbs=25)
    slower = seconds(32, 8, network_gbs=25) - seconds(32, 8)
    assert slower == pytest.approx(layers * exposed * ring_traffic(STAGE_3, 32, 8).total().bytes / (0.8 * 50e9))
