"""Assignments of packs to ranks: valid, never worse than the static layout, and near the best there is."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2_nemo.parallel.assignment import Assignment, assign, largest_load
from molmo2_nemo.parallel.partition import degrees


@st.composite
def steps(draw):
    """Costs that fall with the degree, but less than in proportion, with some degrees not allowed; degrees."""
    sizes = degrees(draw(st.sampled_from([2, 4, 6, 8])))
    count = draw(st.integers(1, 12))
    work = np.array([draw(st.integers(100, 10_000)) for _ in range(count)])
    waste = draw(st.integers(0, 100))
    costs = np.stack([work // d + waste * (d > 1) + 1 for d in sizes], axis=1)
    for row in costs:
        row[: draw(st.integers(0, len(sizes) - 1))] = -1
    return costs.astype(np.int64), sizes


@settings(max_examples=40, deadline=None)
@given(steps())
def test_assignments_are_valid_and_never_worse_than_static(step):
    costs, sizes = step
    assignments = assign(costs, sizes)
    assert sorted(t.number for t in assignments) == list(range(len(costs)))
    assert all(t.start % t.size == 0 and costs[t.number, sizes.index(t.size)] >= 0 for t in assignments)
    lists = [[t for t in assignments if t.has(rank)] for rank in range(sizes[-1])]
    assert all(lists)
    for mine in lists:  # a pack has the same place in the lists of all its ranks
        assert [t.size for t in mine] == sorted((t.size for t in mine), reverse=True)
        for place, each in enumerate(mine):
            assert all(lists[rank][place] == each for rank in range(each.start, each.start + each.size))
    static = [Assignment(n, 0, sizes[-1]) for n in range(len(costs))]
    assert largest_load(assignments, costs, sizes) <= largest_load(static, costs, sizes)


def test_near_the_best():
    """Against every choice of degrees and every placement on 4 ranks, over random steps of up to four packs."""
    generator, sizes, ratios = np.random.default_rng(0), [1, 2, 4], []
    blocks = [(d, start) for d, size in enumerate(sizes) for start in range(0, 4, size)]
    for _ in range(25):
        work, waste = generator.integers(100, 3000, generator.integers(1, 5)), generator.integers(0, 200)
        costs = np.stack([work // d + waste * (d > 1) for d in sizes], axis=1)
        loads = (
            [
                sum(costs[n, d] for n, (d, start) in enumerate(choice) if start <= rank < start + sizes[d])
                for rank in range(4)
            ]
            for choice in itertools.product(blocks, repeat=len(work))
        )
        best = min(max(of_ranks) for of_ranks in loads if min(of_ranks) > 0)  # every rank has work
        ratios.append(largest_load(assign(costs, sizes), costs, sizes) / best)
    assert np.mean(ratios) < 1.02 and max(ratios) < 1.25


def test_short_packs_get_one_rank_and_a_long_one_all():
    costs = np.array([[8000, 4100, 2100, 1100]] + [[800, 500, 350, 275]] * 8, np.int64)
    assignments = assign(costs, [1, 2, 4, 8])
    assert assignments[0] == Assignment(0, 0, 8)
    assert [t.size for t in assignments[1:]] == [1] * 8


def test_memory_decides_first():
    costs = np.array([[-1, -1, 900], [-1, 300, 200], [100, 90, 80]], np.int64)
    assert all(t.size >= {0: 4, 1: 2, 2: 1}[t.number] for t in assign(costs, [1, 2, 4]))
