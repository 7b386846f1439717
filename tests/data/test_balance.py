"""Costs are the operations that cost/flops.py counts, and its pairs those that the mask of every token allows, which is
counted independently; balancing against what it promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.data.balance import UNIT, CostModel, balance, spread
from molmo2_nemo.data.counts import PackCounts
from molmo2_nemo.data.example import PAD_EXAMPLE, ROOT_BRANCH
from molmo2_nemo.data.special_tokens import image_numbers
from molmo2_nemo.model.config import preset
from molmo2_nemo.training.data import cost_model
from tests.support.batches import batch_flops
from tests.support.packs import demo_packs

torch.set_num_threads(1)


@pytest.mark.parametrize("rule", ["image_tokens", "within_image", "none"])
def test_cost_is_the_flops_of_real_packs(rule):
    config = preset("tiny", visual_attention=rule)
    cost = cost_model(config)
    packs = demo_packs(12)
    assert any((batch.branch_ids != ROOT_BRANCH).any() for batch in packs) and any(len(batch.crops) for batch in packs)
    for batch in packs:
        ids, visual = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.visual)
        blocks = image_numbers(ids, visual, config.text.vocab_size)
        assert cost.of(batch) == pytest.approx(batch_flops(config, batch).total / UNIT, rel=1e-3)
        mask = TokenMask(torch.from_numpy(batch.example_ids), torch.from_numpy(batch.branch_ids), blocks, rule)
        allowed = mask.rows(0, mask.size).sum(2) * torch.from_numpy(batch.example_ids != PAD_EXAMPLE)
        assert PackCounts.of(batch, rule, config.text.vocab_size).pairs == allowed.sum()


def test_rules_differ_on_pictures():
    pairs = [
        sum(PackCounts.of(batch, rule, 1024).pairs for batch in demo_packs(12))
        for rule in ("none", "within_image", "image_tokens")
    ]
    assert pairs[0] < pairs[1] < pairs[2]


def test_default_constants_are_those_of_8b():
    default, computed = CostModel(), cost_model(preset("8b"))
    for name in ("token", "pair", "crop", "pooled_token", "window_position", "score"):
        assert getattr(default, name) == pytest.approx(getattr(computed, name), rel=1e-3), name


COSTS = st.integers(1, 8).flatmap(
    lambda slots: st.lists(st.lists(st.integers(0, 10**9), min_size=slots, max_size=slots), min_size=1, max_size=6)
)


@settings(max_examples=200, deadline=None)
@given(COSTS)
def test_balancing_loses_nothing_and_never_makes_it_worse(costs):
    table = np.array(costs, np.int64)
    place = balance(table)
    assert sorted(place.reshape(-1).tolist()) == list(range(table.size))
    assert spread(table.reshape(-1)[place]) <= spread(table) + 1e-12
    np.testing.assert_array_equal(place, balance(table.copy()))  # every rank computes the same


def test_balancing_moves_few_and_stops_when_even():
    even = np.full((4, 4), 7)
    np.testing.assert_array_equal(balance(even), np.arange(16).reshape(4, 4))
    one_heavy = np.array([[9, 9, 1, 1], [5, 5, 5, 5], [1, 9, 5, 5]]) + np.array([[4], [0], [-4]])
    place = balance(one_heavy)
    assert spread(one_heavy.reshape(-1)[place]) < spread(one_heavy)
    assert (place // 4 != np.arange(3)[:, None]).sum() <= 6
    single = np.array([[1], [9]])
    np.testing.assert_array_equal(balance(single), [[0], [1]])
