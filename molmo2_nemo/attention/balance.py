"""Which tokens of a pack each rank of a ring holds, so that all have about as many (query, key) pairs to work on.

Consecutive runs of a pack do not see equally many keys: late tokens of an example see more than early ones, and text
fewer than a long video. A query's pairs are computed where the query is, so a rank's work is a sum over its tokens, and
sets of equally many tokens with equal sums are found from the mask alone (`equal_sets`), alike on every rank. Under a
plain causal mask they are the nested pairs of runs known as zigzag (Brandon et al., arXiv 2311.09431, balance the same
mask by single tokens).

Shape legend: S tokens of a pack, B packs, R ranks of the ring.
"""

from __future__ import annotations

import numpy as np

from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.attention.regions import region_of
from molmo2_nemo.data.example import PAD_EXAMPLE
from molmo2_nemo.parallel.partition import EVEN, equal_sets


def balanced_order(mask: TokenMask, ranks: int) -> np.ndarray | None:
    """The pack's places in the order in which ranks hold them, int64 [S]: rank r has the r-th of R equal parts.

    None where consecutive runs are as good. The same for all packs of the micro-batch.

    Args:
        ranks: R, which divides S.
    """
    work, padding = work_of_tokens(mask)
    size = mask.size // ranks
    runs = list(np.arange(mask.size).reshape(ranks, size))
    best, least = None, max(pairs_of(runs, work, padding)) / (1 + EVEN)
    # Padding sees only padding of the same rank, so what it costs depends on how much of it comes together. Of several
    # guesses the one that turns out best is taken.
    for guess in (0.0, size / 8, size / 4, size / 2) if padding.any() else (0.0,):
        sets = equal_sets(work + guess * padding.sum(0), ranks)
        busiest = max(pairs_of(sets, work, padding))
        if busiest < least:
            best, least = sets, busiest
    return None if best is None else np.concatenate(best)


def work_of_tokens(mask: TokenMask) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of every place, padding left out, int64 [S], and where there is padding, bool [B, S]."""
    padding = mask.on_host()[0] == PAD_EXAMPLE
    return np.where(padding, 0, region_of(mask).pairs_of_queries()).sum(0), padding


def pairs_of(sets: list[np.ndarray], work: np.ndarray, padding: np.ndarray) -> list[int]:
    """Pairs that a ring's ranks work on, those of padding with itself included.

    Args:
        sets: the places of each rank.
        work, padding: from `work_of_tokens`.
    """
    padded = [padding[:, places].sum(1) for places in sets]
    return [int(work[p].sum() + (n * (n + 1) // 2).sum()) for p, n in zip(sets, padded, strict=True)]
