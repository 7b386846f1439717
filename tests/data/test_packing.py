"""Packing against brute force, the official trace, and the bounds it promises."""

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2_nemo.data.packing import Item, Packer, SubsetSums, knapsack, pack_score
from molmo2_nemo.errors import DataError

SIZES = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 6)), min_size=1, max_size=9)


def subsets(sizes):
    for count in range(1, len(sizes) + 1):
        for pick in itertools.combinations(range(len(sizes)), count):
            yield pick, sum(sizes[i][0] for i in pick), sum(sizes[i][1] for i in pick)


@settings(max_examples=150, deadline=None)
@given(SIZES, st.integers(40, 64), st.integers(6, 9))
def test_knapsack_is_optimal(sizes, tokens, crops):
    best = max(t + 30 * c for _, t, c in subsets(sizes) if t <= tokens and c <= crops)
    chosen = knapsack(sizes, tokens, crops, 30.0)
    total = sum(sizes[i][0] for i in chosen), sum(sizes[i][1] for i in chosen)
    assert total[0] <= tokens and total[1] <= crops and total[0] + 30 * total[1] == best
    assert chosen == sorted(chosen, reverse=True)


def test_knapsack_trace_of_the_reference():
    """S=64, 4 crops, buffer 4: published steps, newest first, ties to older examples."""
    packer = Packer(64, 4, buffer_size=4, crop_value=30, mode="knapsack")
    names = "ABCDEFG"
    sizes = [(20, 1), (30, 2), (40, 1), (10, 0), (24, 1), (64, 4), (12, 3)]
    packs = [packer.add(Item(i, *size)) for i, size in enumerate(sizes)]
    assert [None if p is None else "".join(names[i.id] for i in p) for p in packs] == [
        None, None, None, None, "DBA", "F", None,
    ]  # fmt: skip
    assert "".join(names[i.id] for i in packer.waiting) == "CEG"
    assert knapsack([(30, 1)] * 3, 64, 4, 30) == [1, 0]


@settings(max_examples=150, deadline=None)
@given(SIZES, st.integers(40, 64), st.integers(6, 9), st.booleans())
def test_balanced_choice_is_the_best_subset(sizes, tokens, crops, force):
    sums = SubsetSums(tokens, crops)
    chosen = sums.choose(sizes, forced=0 if force else None)
    demand = (sum(c for _, c in sizes) / crops) / (sum(t for t, _ in sizes) / tokens)

    def score(t, c):
        return pack_score(t / tokens, c / crops, demand)

    feasible = [(p, t, c) for p, t, c in subsets(sizes) if t <= tokens and c <= crops and (not force or 0 in p)]
    got = score(sum(sizes[i][0] for i in chosen), sum(sizes[i][1] for i in chosen))
    assert got == pytest.approx(max(score(t, c) for _, t, c in feasible), abs=1e-12)
    assert chosen == sorted(set(chosen)) and (not force or 0 in chosen)
    assert sum(sizes[i][0] for i in chosen) <= tokens and sum(sizes[i][1] for i in chosen) <= crops


def stream(count, tokens, crops, seed):
    rng = random.Random(seed)
    for _ in range(count):
        kind = rng.random()
        if kind < 0.2:
            yield min(tokens, int(rng.lognormvariate(6, 1)) + 1), 0
        elif kind < 0.6:
            c = min(crops, rng.randint(2, 9))
            yield min(tokens, c * 160 + rng.randint(20, 900)), c
        else:
            c = min(crops, int(rng.lognormvariate(4, 1)) + 2)
            yield min(tokens, c * 89 + rng.randint(20, 900)), c


@pytest.mark.parametrize("mode", ["balanced", "knapsack"])
@pytest.mark.parametrize("tokens, crops", [(16384, 128), (1000, 30)])
def test_nothing_is_lost_and_budgets_hold(mode, tokens, crops):
    packer = Packer(tokens, crops, buffer_size=20, mode=mode)
    sizes = list(stream(300, tokens, crops, 1))
    packs = [p for p in (packer.add(Item(i, *s)) for i, s in enumerate(sizes)) if p] + packer.flush()
    assert sorted(item.id for pack in packs for item in pack) == list(range(300))
    for pack in packs:
        assert sum(i.tokens for i in pack) <= tokens and sum(i.crops for i in pack) <= crops


@pytest.mark.parametrize("max_wait", [None, 3])
def test_waits_are_bounded(max_wait):
    """Awkward and full examples in turn: nobody starves, not even behind a row of full ones."""
    packer = Packer(1000, 16, buffer_size=8, max_wait=max_wait)
    rng, longest = random.Random(0), 0
    for i in range(3000):
        size = (
            (1000, 16) if rng.random() < 0.5 or 500 < i < 900 else (rng.choice([510, 700, 30]), rng.choice([0, 9, 16]))
        )
        for item in packer.add(Item(i, *size)) or []:
            longest = max(longest, packer.emitted - 1 - item.arrived)
    assert longest <= (8 if max_wait is None else max_wait) + 8


@pytest.mark.parametrize("tokens, crops, goal", [(16384, 128, 0.97), (36864, 384, 0.97)])
def test_better_than_the_knapsack(tokens, crops, goal):
    sizes = list(stream(700, tokens, crops, 2))
    used = {}
    for mode in ("balanced", "knapsack"):
        packer = Packer(tokens, crops, mode=mode)
        used[mode] = sum(packer.add(Item(i, *s)) is not None for i, s in enumerate(sizes))
        left = packer.waiting
        bound = max(
            (sum(t for t, _ in sizes) - sum(i.tokens for i in left)) / tokens,
            (sum(c for _, c in sizes) - sum(i.crops for i in left)) / crops,
        )
        used[mode] = bound / used[mode]
    assert used["balanced"] >= goal and used["balanced"] > used["knapsack"] - 0.002


def test_state_round_trip():
    sizes = list(stream(200, 4096, 64, 3))
    whole = Packer(4096, 64, buffer_size=10)
    packs = [[i.id for i in p] for p in (whole.add(Item(i, *s)) for i, s in enumerate(sizes)) if p]
    first = Packer(4096, 64, buffer_size=10)
    got = [[i.id for i in p] for p in (first.add(Item(i, *sizes[i])) for i in range(90)) if p]
    state = json.loads(json.dumps(first.state()))
    second = Packer(4096, 64, buffer_size=10)
    second.restore(state, lambda i: Item(i, *sizes[i]))
    got += [[i.id for i in p] for p in (second.add(Item(i, *sizes[i])) for i in range(90, 200)) if p]
    assert got == packs


def test_refusals():
    packer = Packer(100, 4)
    with pytest.raises(DataError, match="101 tokens"):
        packer.add(Item(0, 101, 0))
    with pytest.raises(DataError, match="5 crops"):
        packer.add(Item(0, 1, 5))
    with pytest.raises(DataError, match="mode"):
        Packer(100, 4, mode="best")  # type: ignore[arg-type]


def test_text_only_budget():
    packer = Packer(100, 0, buffer_size=2)
    assert [p is not None for p in (packer.add(Item(i, 50, 0)) for i in range(4))] == [False, False, True, False]
