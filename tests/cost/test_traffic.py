"""Formulas of traffic against numbers worked out by hand."""

from __future__ import annotations

import pytest

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
