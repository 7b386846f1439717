"""Counts of a micro-batch: the attention pairs that its mask allows, and the other quantities its cost follows from.

Numpy only. The mask's rule is `attention.mask.may_attend`; `allowed_pairs` counts what it allows without enumerating
pairs, and is tested against it. The attention kernels do not count by it: they split the mask into exact rectangles and
triangles (attention/regions.py), whose sum is tested against the rule too.

Shape legend: B packs, S tokens of a pack, U indivisible vision units (an image with its tiles, or one video frame).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from molmo2_nemo.data.example import PAD_EXAMPLE, ROOT_BRANCH, Batch
from molmo2_nemo.data.special_tokens import image_numbers


def allowed_pairs(
    example_ids: np.ndarray, branch_ids: np.ndarray, images: np.ndarray, visual_attention: str = "image_tokens"
) -> int:
    """Number of (query, key) pairs that the mask allows, padding left out, in O(S log S).

    Args:
        example_ids: int [B, S] or [S], PAD_EXAMPLE where padded.
        branch_ids: int, same shape; ROOT_BRANCH in the root of an example.
        images: int, same shape; 0 for text, else the number of the image or frame, which never decreases along an
            example. For "image_tokens" and "none" a 0/1 flag suffices.
        visual_attention: visual tokens of an example also see the later ones of the whole example ("image_tokens"), of
            their own image or frame ("within_image"), or none.
    """
    example_ids, branch_ids, images = (np.atleast_2d(x) for x in (example_ids, branch_ids, images))
    real = example_ids != PAD_EXAMPLE
    example = _labels(np.nonzero(real)[0], example_ids[real])
    branch, image = branch_ids[real], images[real]
    root = branch == ROOT_BRANCH
    # a token in the root is seen by all later tokens of its example, one in a branch by the rest of that branch
    place, size = _places(example)
    pairs = int((size - place)[root].sum()) + _triangles(_labels(example, branch)[~root], with_itself=True)
    if visual_attention == "none":
        return pairs
    # and a visual token is also seen by all earlier visual tokens of its group that may see its branch
    visual = image > 0
    groups = (_labels(example, image) if visual_attention == "within_image" else example)[visual]
    root, branch = root[visual], branch[visual]
    place, _ = _places(groups)
    return pairs + int(place[root].sum()) + _triangles(_labels(groups, branch)[~root], with_itself=False)


def _labels(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A label for each pair (first, second): the same integer where both agree."""
    low = second.min(initial=0)
    return first * (second.max(initial=0) - low + 1) + second - low


def _places(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each element, the number of earlier elements with its label and the total number with it; int64 [n] both."""
    _, number, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.argsort(number, kind="stable")
    places = np.empty_like(order)
    places[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return places, counts[number]


def _triangles(labels: np.ndarray, *, with_itself: bool) -> int:
    """Pairs of an element and an earlier one (or itself) with the same label."""
    counts = np.unique(labels, return_counts=True)[1]
    return int((counts * (counts + 1 if with_itself else counts - 1) // 2).sum())


@dataclass(frozen=True)
class PackCounts:
    """The counts that determine the cost and the memory of a micro-batch, summed over its packs."""

    tokens: int  # padding not counted
    pairs: int  # (query, key) pairs that the mask allows
    unit_crops: np.ndarray  # int64 [U], crops of each indivisible unit
    unit_pooled_tokens: np.ndarray  # int64 [U], pooled visual tokens of each
    window_positions: int = 0  # filled positions in the pooling windows of all pooled tokens
    scored: int = 0  # tokens with a loss weight
    length: int = 0  # of the longest pack, the padding behind it not counted
    packs: int = 1

    @classmethod
    def of(cls, batch: Batch, visual_attention: str = "image_tokens", vocab_size: int | None = None) -> PackCounts:
        """Count a micro-batch.

        Args:
            vocab_size: base vocabulary rows of the model; needed to find the images of "within_image" attention.

        Raises:
            AssertionError: `vocab_size` is needed and missing.
        """
        images = batch.visual
        if visual_attention == "within_image":
            if vocab_size is None:
                raise AssertionError("visual_attention 'within_image' needs vocab_size to tell images apart")
            images = image_numbers(batch.input_ids, batch.visual, vocab_size)
        return cls(
            tokens=int((batch.example_ids != PAD_EXAMPLE).sum()),
            pairs=allowed_pairs(batch.example_ids, batch.branch_ids, images, visual_attention),
            unit_crops=batch.unit_crops,
            unit_pooled_tokens=batch.unit_pooled_tokens,
            window_positions=int((batch.pooling >= 0).sum()),
            scored=int((batch.loss_weights > 0).sum()),
            length=used_tokens(batch),
            packs=len(batch.example_ids),
        )

    @cached_property
    def crops(self) -> int:
        return int(self.unit_crops.sum())

    @cached_property
    def pooled_tokens(self) -> int:
        return int(self.unit_pooled_tokens.sum())


def used_tokens(batch: Batch) -> int:
    """Tokens of the batch's longest pack, the padding behind it not counted; at least 1."""
    used = np.flatnonzero((batch.example_ids != PAD_EXAMPLE).any(axis=0))
    return int(used[-1]) + 1 if len(used) else 1
