"""How work is divided among ranks: contiguous runs of about equal cost, and sizes of groups. No torch here."""

from __future__ import annotations

import math

import numpy as np

EVEN = 0.01  # of the mean: costs this near count as equal


def even_runs(costs: np.ndarray, ranks: int) -> list[int]:
    """Cut units into `ranks` contiguous runs, some perhaps empty, with the smallest possible largest cost.

    Among the cuts that reach it, those nearest to equal shares.

    Returns:
        `ranks` + 1 ends, the first 0 and the last the number of units.
    """
    ends = np.concatenate(([0.0], np.cumsum(costs, dtype=np.float64)))
    slack = 1e-9 * ends[-1]
    low, high = max(float(costs.max(initial=0.0)), ends[-1] / ranks), float(ends[-1])
    for _ in range(40):
        if high - low <= slack:
            break
        middle = (low + high) / 2
        if _first_starts(ends, ranks, middle + slack)[0] == 0:
            high = middle
        else:
            low = middle
    capacity = high + slack
    earliest = _first_starts(ends, ranks, capacity)
    bounds = [0]
    for rank in range(1, ranks):
        latest = int(np.searchsorted(ends, ends[bounds[-1]] + capacity, side="right")) - 1
        start = max(earliest[rank], bounds[-1])
        nearest = int(np.abs(ends[start : latest + 1] - ends[-1] * rank / ranks).argmin())
        bounds.append(start + nearest)
    return [*bounds, len(costs)]


def _first_starts(ends: np.ndarray, ranks: int, capacity: float) -> list[int]:
    """For each rank the first unit from which all that follow fit into this rank and those behind it."""
    starts = [len(ends) - 1]
    for _ in range(ranks):
        starts.append(int(np.searchsorted(ends, ends[starts[-1]] - capacity, side="left")))
    return starts[:0:-1]


def equal_sets(costs: np.ndarray, sets: int) -> list[np.ndarray]:
    """Share out elements among sets of the same size and about the same cost, of few runs.

    Of the elements that are left, each set in turn takes those of the first window whose cost is within `EVEN` of the
    mean, or the nearest to it. Windows that lie side by side have the mean on average, so that some window is nearer to
    it than half of what it changes by moving on by one. All sets together have at most 2 * sets - 1 runs, which is also
    the bound that necklaces have (Goldberg and West 1985: two kinds of beads, here elements and cost).

    Args:
        costs: not negative, [n], n a multiple of `sets`.

    Returns:
        The elements of each set, ascending; sets by their first element.
    """
    left, size, found = np.arange(len(costs)), len(costs) // sets, []
    for share in range(sets, 1, -1):
        ends = np.concatenate(([0.0], np.cumsum(costs[left], dtype=np.float64)))
        mean = ends[-1] / share
        off = np.abs(ends[size:] - ends[:-size] - mean)
        start = int(np.argmax(off <= max(EVEN * mean, off.min())))
        found.append(left[start : start + size])
        left = np.delete(left, slice(start, start + size))
    return sorted([*found, left], key=lambda one: one[0])


def degrees(context: int) -> list[int]:
    """Numbers of ranks that may share a pack: powers of two that divide the context size, and that size."""
    return [d for d in (2**n for n in range(context.bit_length())) if context % d == 0 and d < context] + [context]


def can_shard_heads(heads: int, kv_heads: int, ranks: int) -> bool:
    """Whether `ranks` ranks get equal shares of query heads, and of key heads once those are repeated."""
    return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def ulysses_degree(size: int, ulysses: int | None) -> int:
    """How many of `size` ranks that share a pack shard heads: all, or the largest divisor they share with `ulysses`."""
    return size if ulysses is None else math.gcd(size, ulysses)
