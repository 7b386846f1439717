"""Equal work for the data-parallel ranks of a step: the cost of a micro-batch, and which micro-batches to swap.

Every rank reads and packs its own share of the stream, so no rank needs the size of an example that another one reads,
and a change in the number of ranks stays exact. But the finished packs differ in cost: one long video has several times
more attention pairs than twenty short texts of the same total length. So once the micro-batches of an optimizer step
are packed, the ranks gather the costs of all of them (a few integers), compute the same swaps, and send each other
those few micro-batches. A step therefore holds the same packs with and without balancing, and what a rank reads does
not depend on what it receives: resuming, waiting times and elasticity are unaffected.

The alternative, packs planned over all ranks, needs the exact sizes of all ranks' examples: either every rank plans all
of them, or a manifest has them, which would have to be rebuilt for every change of tokenizer, wordings and crops.

The limitation: only micro-batches of the same step are swapped. With one micro-batch per rank there is nothing to swap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from molmo2_nemo.data.counts import PackCounts
from molmo2_nemo.data.example import Batch

TOLERANCE = 0.01  # share of the mean cost; a smaller gain does not justify sending a pack
UNIT = 1e6  # costs are whole megaFLOPs, so that every rank computes exactly the same swaps


@dataclass(frozen=True, slots=True)
class CostModel:
    """FLOPs of one forward pass, linear in six counts. The defaults are the 8B model's (see cost/flops.py).

    token: 36 layers x 2 x 192,937,984 weights. pair: 36 layers x 4 x 4096 per allowed (query, key) pair. crop: 25
    vision blocks over 729 patches. pooled_token: the connector per visual token, without its window; window_position:
    per filled position of that window. score: the head per token with a loss weight. The backward pass scales all of
    them alike, so it does not change the comparison.
    """

    token: float = 36 * 2.0 * 192_937_984
    pair: float = 36 * 4.0 * 4096
    crop: float = 617.2e9
    pooled_token: float = 165.25e6
    window_position: float = 10.62e6
    score: float = 2.0 * 151_936 * 4096
    visual_attention: str = "image_tokens"  # what visual tokens attend to besides earlier tokens
    vocab_size: int | None = None  # base rows; see PackCounts.of

    def of(self, batch: Batch) -> int:
        """Cost of a micro-batch in whole megaFLOPs."""
        return self.of_counts(PackCounts.of(batch, self.visual_attention, self.vocab_size))

    def of_counts(self, pack: PackCounts) -> int:
        """Cost of a micro-batch, in whole megaFLOPs, from its counts."""
        total = (
            self.token * pack.tokens
            + self.pair * pack.pairs
            + self.crop * pack.crops
            + self.pooled_token * pack.pooled_tokens
            + self.window_position * pack.window_positions
            + self.score * pack.scored
        )
        return round(total / UNIT)


def spread(costs: np.ndarray) -> float:
    """Largest rank's cost over the mean; `costs` int [ranks, micro-batches]."""
    sums = costs.sum(axis=1)
    return float(sums.max() / max(sums.mean(), 1e-9))


def balance(costs: np.ndarray, tolerance: float = TOLERANCE) -> np.ndarray:
    """Which rank uses which micro-batch of a step.

    Starts with every rank keeping its own micro-batches, and lets the heaviest rank swap one with another rank as long
    as that lowers the larger of their two costs; stops at `tolerance` above the mean. Few micro-batches move, and every
    rank keeps the same number.

    Args:
        costs: int64 [R, k], cost of every micro-batch by the rank that packed it.
    Returns:
        int64 [R, k], the flat number (rank * k + index) of each micro-batch that a rank uses, in its order.
    """
    ranks, count = costs.shape
    place = np.arange(ranks * count).reshape(ranks, count)
    if ranks == 1 or count == 1:  # one each: a swap would only rename the ranks
        return place
    now = costs.astype(np.int64).copy()
    goal = now.sum() / ranks * (1 + tolerance)
    for _ in range(ranks * count):
        sums = now.sum(axis=1)
        heavy = int(np.argmax(sums))
        if sums[heavy] <= goal:
            break
        moved = now[heavy][None, :, None] - now[:, None, :]  # [R, own, other's]: what leaves the heavy rank
        worse = np.maximum(sums[heavy] - moved, sums[:, None, None] + moved)
        worse[heavy] = sums[heavy]
        best = int(np.argmin(worse))
        if worse.reshape(-1)[best] >= sums[heavy]:
            break
        other, mine, theirs = np.unravel_index(best, worse.shape)
        for table in (now, place):
            table[heavy, mine], table[other, theirs] = table[other, theirs], table[heavy, mine]
    return place
