"""Equal work for the data-parallel ranks of a step: what a micro-batch costs, and which ones change places.

Every rank reads and packs its own share of the stream, so nobody needs to know the size of an example it has not
decoded, and a change in the number of ranks stays exact. What differs is the work of the finished packs: one long video
attends to several times more pairs than twenty short texts of the same length. So once the micro-batches of an
optimizer step are packed, the ranks tell each other what theirs cost (a few integers), all compute the same exchange,
and those few micro-batches travel. A step therefore holds the same packs with and without balancing, and what a rank
has read does not depend on what it was dealt: resume, waits and elasticity are untouched.

The alternative, planning packs over all ranks before decoding, needs exact sizes from the manifest; they depend on the
tokenizer, the prompt wording drawn and the crop settings, so a manifest would have to be rebuilt for every change.

The limit: only micro-batches of one step change places. With one micro-batch per rank there is nothing to exchange.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from molmo2_nemo.data.example import PAD_EXAMPLE, ROOT_BRANCH, Batch

TOLERANCE = 0.01  # of the mean; an exchange that gains less is not worth sending a pack
UNIT = 1e6  # costs are whole megaFLOPs, so that every rank computes exactly the same exchange


@dataclass(frozen=True, slots=True)
class CostModel:
    """FLOPs of one forward pass, linear in five counts. The defaults are the 8B model's (see cost/flops.py).

    token: 36 layers x 2 x 192,937,984 weights. pair: 36 layers x 4 x 4096 per allowed (query, key) pair. crop: 25
    vision blocks over 729 patches. row: the connector per visual token without, and slot: per filled window slot.
    score: the head per token with a loss weight. The backward pass doubles all of them alike and so does not count.
    """

    token: float = 36 * 2.0 * 192_937_984
    pair: float = 36 * 4.0 * 4096
    crop: float = 617.2e9
    row: float = 165.25e6
    slot: float = 10.62e6
    score: float = 2.0 * 151_936 * 4096
    visual_attention: str = "image_tokens"  # whom visual tokens see besides what lies before them

    def of(self, batch: Batch) -> int:
        """Cost of a micro-batch in whole megaFLOPs."""
        total = (
            self.token * int((batch.example_ids != PAD_EXAMPLE).sum())
            + self.pair * allowed_pairs(batch, self.visual_attention)
            + self.crop * len(batch.crops)
            + self.row * len(batch.pooling)
            + self.slot * int((batch.pooling >= 0).sum())
            + self.score * int((batch.loss_weights > 0).sum())
        )
        return round(total / UNIT)


def allowed_pairs(batch: Batch, visual_attention: str = "image_tokens") -> int:
    """(query, key) pairs that the mask allows, for examples laid out as `tree.flatten` does: the root first, all visual
    tokens in it, the branches behind.

    Args:
        visual_attention: visual tokens of an example also see the later ones of the whole example ("image_tokens"), of
            their own picture or frame ("within_image"), or none.
    """
    total = 0
    for examples, branches in zip(batch.example_ids, batch.branch_ids, strict=True):
        real = examples != PAD_EXAMPLE
        examples, branches = examples[real], branches[real]
        count = int(examples.max(initial=-1)) + 1
        in_root = branches == ROOT_BRANCH
        roots = np.bincount(examples[in_root], minlength=count)
        width = int(branches.max(initial=-1)) + 1
        own = np.bincount(examples[~in_root] * width + branches[~in_root], minlength=count * width)
        total += int((roots * (roots + 1) // 2).sum())
        total += int((own * (own + 1) // 2 + own * np.repeat(roots, width)).sum())
    seen = {"image_tokens": _of_examples, "within_image": _of_pictures, "none": _of_nobody}[visual_attention](batch)
    return total + int(later_pairs(seen).sum())


def example_pairs(root: np.ndarray, visual: np.ndarray) -> np.ndarray:
    """Pairs inside the roots: every earlier token, and for visual tokens every later visual one too."""
    return root * (root + 1) // 2 + later_pairs(visual)


def later_pairs(visual: np.ndarray) -> np.ndarray:
    """Pairs of a token and a later one among so many."""
    return visual * (visual - 1) // 2


def _of_examples(batch: Batch) -> np.ndarray:
    """Visual tokens of each example."""
    width = int(batch.example_ids.max(initial=-1)) + 1
    numbers = np.arange(len(batch.example_ids))[:, None] * width + batch.example_ids
    return np.bincount(numbers[batch.visual])


def _of_pictures(batch: Batch) -> np.ndarray:
    """Visual tokens of each picture or frame, its markers among them.

    A run of visual tokens may hold several views of a picture, but text lies between two pictures: a marker belongs to
    the picture of the next pooled token of its run, or behind the last one to that one's.
    """
    places = np.flatnonzero(batch.visual)
    if not len(batch.pooled_positions):
        return np.zeros(0, np.int64)
    run = np.cumsum(np.diff(places, prepend=-2) > 1)
    unit = np.repeat(np.arange(len(batch.unit_pooled_tokens)), batch.unit_pooled_tokens)
    pooled_run = run[np.searchsorted(places, batch.pooled_positions)]
    after = np.searchsorted(batch.pooled_positions, places).clip(max=len(unit) - 1)
    return np.bincount(unit[np.where(pooled_run[after] == run, after, after - 1)])


def _of_nobody(batch: Batch) -> np.ndarray:
    return np.zeros(0, np.int64)


def spread(costs: np.ndarray) -> float:
    """Largest rank's cost over the mean; `costs` int [ranks, micro-batches]."""
    sums = costs.sum(axis=1)
    return float(sums.max() / max(sums.mean(), 1e-9))


def deal(costs: np.ndarray, tolerance: float = TOLERANCE) -> np.ndarray:
    """Who gets which micro-batch of a step.

    Starts from everybody's own and lets the heaviest rank swap one micro-batch with another rank as long as that lowers
    the heavier of the two; stops at `tolerance` above the mean. Few micro-batches move, none is added or taken.

    Args:
        costs: int64 [R, k], cost of every micro-batch by the rank that packed it.
    Returns:
        int64 [R, k], the flat number (rank * k + slot) of the micro-batch that each rank uses in each slot.
    """
    ranks, slots = costs.shape
    place = np.arange(ranks * slots).reshape(ranks, slots)
    if ranks == 1 or slots == 1:  # one each: an exchange would only rename the ranks
        return place
    now = costs.astype(np.int64).copy()
    goal = now.sum() / ranks * (1 + tolerance)
    for _ in range(ranks * slots):
        sums = now.sum(axis=1)
        heavy = int(np.argmax(sums))
        if sums[heavy] <= goal:
            break
        moved = now[heavy][None, :, None] - now[:, None, :]  # [R, own slot, other's slot]: what leaves the heavy rank
        worse = np.maximum(sums[heavy] - moved, sums[:, None, None] + moved)
        worse[heavy] = sums[heavy]
        best = int(np.argmin(worse))
        if worse.reshape(-1)[best] >= sums[heavy]:
            break
        other, mine, theirs = np.unravel_index(best, worse.shape)
        for table in (now, place):
            table[heavy, mine], table[other, theirs] = table[other, theirs], table[heavy, mine]
    return place
