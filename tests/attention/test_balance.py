"""Which tokens ranks of a ring hold: even shares of the pairs, counted pair by pair in the dense mask."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo2_nemo.attention.balance import balanced_order
from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.attention.regions import runs_of
from molmo2_nemo.parallel.partition import equal_sets
from tests.support.trees import RULES, Tree, mixed_pack, token_mask


def worked_on(mask: TokenMask, order: np.ndarray, ranks: int) -> np.ndarray:
    """Pairs of every rank. Padding sees the padding of its own rank."""
    allowed = mask.rows(0, mask.size).numpy()
    padding = mask.example_ids.numpy() < 0
    sets = order.reshape(ranks, -1)
    found = [(allowed[:, own] & ~padding[:, own, None]).sum() for own in sets]
    return np.array(found) + [allowed[:, own[:, None], own][padding[:, own]].sum() for own in sets]


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("rule", RULES)
def test_mixed_packs_are_shared_evenly(rule, ranks):
    size, before, after = 2048, [], []
    for seed in range(4):
        trees = mixed_pack(np.random.default_rng(seed), size)
        mask = token_mask([trees], size, rule)
        order = balanced_order(mask, ranks)
        plain = np.arange(size)
        order = plain if order is None else order
        assert np.array_equal(np.sort(order), plain)
        assert all((np.diff(own) > 0).all() for own in order.reshape(ranks, -1))
        before.append(worked_on(mask, plain, ranks).max())
        shares = worked_on(mask, order, ranks)
        after.append(shares.max() / shares.mean())
        assert shares.max() <= before[-1]
    assert max(after) <= 1.1


def test_a_causal_pack_is_cut_into_nested_pairs():
    """One text: zigzag, up to what counts as equal."""
    size = 1024
    mask = token_mask([[Tree((size,))]], size)
    order = balanced_order(mask, 4)
    assert worked_on(mask, np.arange(size), 4).max() / (size * (size + 1) / 8) > 1.7
    assert worked_on(mask, order, 4).max() / (size * (size + 1) / 8) < 1.03
    runs = [runs_of(own) for own in order.reshape(4, -1)]
    assert sorted(map(len, runs)) == [1, 2, 2, 2]
    for outer, inner in zip(runs, runs[1:], strict=False):  # each lies between the two runs of the one before
        assert outer[0][1] <= inner[0][0] and inner[-1][1] <= outer[1][0]


def test_what_is_even_stays_in_order():
    assert balanced_order(token_mask([[Tree((16,))] * 8], 128), 8) is None


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(1, 8))
def test_equal_sets(costs, sets):
    costs = np.repeat(costs, sets)
    found = equal_sets(costs, sets)
    assert [len(one) for one in found] == [len(costs) // sets] * sets
    assert sorted(np.concatenate(found)) == list(range(len(costs)))
    assert sum(len(runs_of(one)) for one in found) <= 2 * sets - 1
    # each set is off by half a step at most, or by EVEN; the mean of what is left moves by as much, shared out
    sums, step = np.array([costs[one].sum() for one in found]), costs.max() - costs.min()
    off = max(step / 2, 0.01 * costs.sum() / sets) * (1 + sum(1 / n for n in range(1, sets)))
    assert np.abs(sums - sums.mean()).max() <= off * 1.1 + 1e-9
