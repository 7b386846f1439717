"""Dynamic context parallelism: which ranks of a context group work on which of a step's packs. No torch here.

A pack may be shared by 1, 2, 4, ... ranks, always an aligned block of them. Ranks go through their packs from the
widest block to the narrowest, so that all ranks of a block have the same packs before it: nobody waits inside a step, a
pack has the same place in the lists of all its ranks (which pipelines rely on), and a step lasts as long as the largest
sum of a rank. Which degree each pack gets is searched for: few ranks waste less on messages and uneven shares, many
even out a pack that is longer than the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TARGETS = (1.0, 0.75, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08)  # of an even share: what one pack may take
TRIALS = 600  # placements tried per step beyond those,
PLACED = 8192  # while they place no more packs than this: some 30 ms either way, beside training


@dataclass(frozen=True)
class Assignment:
    """One pack, assigned to ranks start..start + size of the context group."""

    number: int
    start: int
    size: int

    def has(self, rank: int) -> bool:
        return self.start <= rank < self.start + self.size


def assign(costs: np.ndarray, degrees: Sequence[int]) -> list[Assignment]:
    """Assign a step's packs to blocks of ranks.

    Args:
        costs: int64 [k, D], microseconds of pack k on degrees[d] ranks; negative where it does not fit into memory.
        degrees: ascending, each a divisor of the next; the last is the size of the context group, where all packs fit.

    Returns:
        One for each pack, in the order in which every rank works on those it shares in; every rank has at least one.
    """
    allowed = costs >= 0
    assert allowed[:, -1].all(), "every pack fits on all ranks of the context group"
    best = np.full(len(costs), len(degrees) - 1)
    span = _place(best, costs, degrees)[1]
    share = int(np.where(allowed, costs * np.array(degrees), np.iinfo(np.int64).max).min(axis=1).sum()) / degrees[-1]
    wide_enough = [allowed & (costs <= target * share) for target in TARGETS]
    wide_enough += [allowed & (np.arange(len(degrees)) >= least) for least in range(len(degrees))]
    for quick in wide_enough:
        quick[:, -1] = True
        choice = quick.argmax(axis=1)
        found = _place(choice, costs, degrees)[1]
        if found < span:
            best, span = choice, found
    best = _improve(best, span, costs, allowed, degrees)
    return _place(best, costs, degrees)[0]


def _improve(best: np.ndarray, span: int, costs: np.ndarray, allowed: np.ndarray, degrees: Sequence[int]) -> np.ndarray:
    """Move a pack to the next wider or narrower degree while that shortens the step; then some at random."""
    trials = min(TRIALS, PLACED // len(costs))
    while trials > 0:
        better = None
        for pack in np.argsort(-costs[np.arange(len(costs)), best], kind="stable"):
            for step in (1, -1):
                degree = best[pack] + step
                if trials == 0 or not 0 <= degree < len(degrees) or not allowed[pack, degree]:
                    continue
                trials -= 1
                choice = best.copy()
                choice[pack] = degree
                found = _place(choice, costs, degrees)[1]
                if found < span:
                    better, span = choice, found
            if better is not None:
                break
        if better is None:
            break
        best = better
    draw = np.random.default_rng(0)
    for _ in range(trials):
        choice = best.copy()
        for pack in draw.integers(0, len(costs), draw.integers(2, 5)):
            degree = choice[pack] + draw.choice((-1, 1))
            if 0 <= degree < len(degrees) and allowed[pack, degree]:
                choice[pack] = degree
        found = _place(choice, costs, degrees)[1]
        if found <= span:  # an equal one will do too: the next draw starts from there
            best, span = choice, found
    return best


def _place(choice: np.ndarray, costs: np.ndarray, degrees: Sequence[int]) -> tuple[list[Assignment], int]:
    """Place each pack on the least loaded block of its degree: wide blocks before narrow ones, costly packs first.

    Returns:
        The assignments, and the largest load of a rank; a rank without a pack makes it more than any real one.
    """
    ranks = degrees[-1]
    loads = [0] * ranks
    assignments = []
    chosen = costs[np.arange(len(costs)), choice]
    for pack in np.lexsort((np.arange(len(costs)), -chosen, -choice)).tolist():
        size = degrees[choice[pack]]
        start = min(range(0, ranks, size), key=loads.__getitem__)  # all ranks of a block have the same load so far
        assignments.append(Assignment(pack, start, size))
        after = loads[start] + int(chosen[pack])
        loads[start : start + size] = [after] * size
    return assignments, max(loads) if min(loads) > 0 else int(np.iinfo(np.int64).max)


def largest_load(assignments: Sequence[Assignment], costs: np.ndarray, degrees: Sequence[int]) -> int:
    """The busiest rank's sum of costs, in the unit of `costs`: how long the step lasts.

    Nothing here needs it; it is the figure by which plan/groups.py and the tests judge assignments."""
    loads = np.zeros(degrees[-1], np.int64)
    for each in assignments:
        loads[each.start : each.start + each.size] += costs[each.number, list(degrees).index(each.size)]
    return int(loads.max())
