"""The allowed (query, key) pairs of a micro-batch as a sum of plain segments, found on the host from O(S) integers.

Message trees have one level, so the mask of `mask.may_attend` is exactly a sum of three kinds of plain attention, each
of which a flash kernel can do without a mask:

    causal    a part (the root of an example, or one branch) looks at its own past
    full      the branches of an example look at its root, which lies before all of them
    reverse   visual tokens of a part (within_image: of an image) look at later ones: a causal mask read backwards

No pair is in two segments and none is missing: tests compare them with the rule pair by pair, and their sum with
data/counts.py, which counts pairs without naming them. Kernels that work in tiles ask for the number of pairs in every
tile instead: none means skip, all means no mask, and only what lies between is masked by the rule itself.

A `MaskRegion` may also be a rectangle of the pack, some queries against some keys, as context parallelism needs it.
Shape legend: B packs, S tokens of a pack; Q queries and K keys of the region.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from molmo2_nemo.attention.mask import TokenMask, may_attend
from molmo2_nemo.data.example import ROOT_BRANCH

Kind = Literal["causal", "full", "reverse"]
Range = tuple[int, int]  # start, stop


@dataclass(frozen=True)
class Segment:
    """Queries of one pack that look at keys of the same pack; both are ascending places within the region.

    full: every query sees every key. causal: as many keys as queries, query i sees keys 0..i. reverse: as many keys as
    queries, query i sees keys i and later.
    """

    pack: int
    kind: Kind
    queries: np.ndarray  # int64
    keys: np.ndarray  # int64

    @property
    def pairs(self) -> int:
        count = len(self.queries)
        return count * len(self.keys) if self.kind == "full" else count * (count + 1) // 2


class MaskRegion:
    """Which of the queries may look at which of the keys, and what kernels derive from that (once, then cached).

    Args:
        mask: description of the whole pack.
        queries, keys: (start, stop) in the pack; None for all of it.
        whole: the region of all of it, where that is at hand: segments are cut from its own.

    Raises:
        AssertionError: a layout that the data pipeline never writes (a branch before its root, or for within_image
            images whose numbers decrease along a part).
    """

    def __init__(
        self, mask: TokenMask, queries: Range | None = None, keys: Range | None = None, whole: MaskRegion | None = None
    ) -> None:
        mask.on_host()  # once for all regions
        # Without the regions it holds, of which this may be one: a cycle would keep a micro-batch's plans and indices
        # until the garbage collector comes by, which training switches off or rarely runs.
        self.mask = replace(mask, regions={})
        self._whole = whole
        self.queries, self.keys = queries or (0, mask.size), keys or (0, mask.size)
        self.cache: dict[Any, Any] = {}  # what a kernel prepared for this region and wants to keep for the next layer

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and keys."""
        return self.queries[1] - self.queries[0], self.keys[1] - self.keys[0]

    @cached_property
    def segments(self) -> list[Segment]:
        """All allowed pairs, each in exactly one segment; causal segments first, then full, then reverse."""
        everything = 0, self.mask.size
        if self.queries == self.keys == everything:
            return self._split()
        whole = self._whole or MaskRegion(self.mask)
        first_query, last_query, first_key, last_key = whole._spans
        meets = (first_query < self.queries[1]) & (last_query >= self.queries[0])
        meets &= (first_key < self.keys[1]) & (last_key >= self.keys[0])
        found = [cut for n in np.flatnonzero(meets) for cut in _restrict(whole.segments[n], self.queries, self.keys)]
        return _in_order(found)

    def _split(self) -> list[Segment]:
        found: list[Segment] = []
        for pack, (example, branch, block) in enumerate(self.mask.on_host().transpose(1, 0, 2)):
            found += _split(pack, example, branch, block, self.mask.visual_attention)
        return _in_order(found)

    @cached_property
    def _spans(self) -> np.ndarray:
        """First and last query, first and last key of every segment, int64 [4, segments]."""
        spans = [(p.queries[0], p.queries[-1], p.keys[0], p.keys[-1]) for p in self.segments]
        return np.array(spans, np.int64).reshape(-1, 4).T

    @property
    def pairs(self) -> int:
        """Allowed (query, key) pairs of all packs; 4 * pairs * heads * head size operations go forward."""
        return sum(segment.pairs for segment in self.segments)

    def tiles(self, query_block: int, key_block: int) -> np.ndarray:
        """Allowed pairs in every tile, int64 [B, ceil(Q / query_block), ceil(K / key_block)]."""
        key = ("tiles", query_block, key_block)
        if key not in self.cache:
            self.cache[key] = self._count_tiles(query_block, key_block)
        return self.cache[key]

    def _count_tiles(self, query_block: int, key_block: int) -> np.ndarray:
        rows, columns = -(-self.shape[0] // query_block), -(-self.shape[1] // key_block)
        counts = np.zeros((self.mask.on_host().shape[1], rows, columns), np.int64)
        for segment in self.segments:
            first, last = segment.queries[0] // query_block, segment.queries[-1] // query_block + 1
            per_row = np.bincount(segment.queries // query_block - first, minlength=last - first)
            left, right = segment.keys[0] // key_block, segment.keys[-1] // key_block + 1
            tile = counts[segment.pack, first:last, left:right]
            if segment.kind == "full":
                tile += per_row[:, None] * np.bincount(segment.keys // key_block - left, minlength=right - left)
                continue
            # query i of the segment sees its keys up to i (or from i on): count keys before each tile edge
            edges = np.searchsorted(segment.keys, np.arange(left, right + 1) * key_block)
            if segment.kind == "causal":
                seen = _sums_of_clipped(np.cumsum(per_row), edges)
            else:
                seen = per_row[:, None] * edges - _sums_below(np.cumsum(per_row), edges)
            tile += np.diff(seen, axis=1)
        return counts

    def masked(self, pack: int, queries: Range, keys: Range) -> Tensor:
        """The mask of one tile by the rule itself, bool [q, k] on the mask's device. Ranges are within the region."""
        mask = self.mask
        described = torch.stack((mask.example_ids[pack], mask.branch_ids[pack], mask.visual_block[pack]))
        index = torch.arange(mask.size, device=described.device)
        rows = slice(self.queries[0] + queries[0], self.queries[0] + queries[1])
        columns = slice(self.keys[0] + keys[0], self.keys[0] + keys[1])
        return may_attend(
            described[:, rows, None].unbind(),
            described[:, None, columns].unbind(),
            index[rows, None],
            index[None, columns],
            mask.visual_attention,
        )


def region_of(mask: TokenMask, queries: Range | None = None, keys: Range | None = None) -> MaskRegion:
    """The region of these queries and keys (start, stop; None for all), made once and kept with the mask.

    Every layer, and the recomputation of every layer, shares it with what the kernels have cached on it.
    """
    everything = 0, mask.size
    key = queries or everything, keys or everything
    if key not in mask.regions:
        whole = None if key == (everything, everything) else region_of(mask)
        mask.regions[key] = MaskRegion(mask, *key, whole)
    return mask.regions[key]


def _in_order(segments: list[Segment]) -> list[Segment]:
    return sorted(segments, key=lambda segment: ("causal", "full", "reverse").index(segment.kind))


def _sums_of_clipped(ends: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """For every run of queries (run r is ends[r-1]..ends[r]) the sum over its i of min(i + 1, edge), [runs, edges]."""

    def up_to(i: np.ndarray) -> np.ndarray:  # sum of min(j + 1, edge) over j < i
        clipped = np.minimum(i[:, None], edges[None])
        return clipped * (clipped + 1) // 2 + (i[:, None] - clipped) * edges[None]

    return np.diff(up_to(np.concatenate(([0], ends))), axis=0)


def _sums_below(ends: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """For every run of queries the sum over its i of min(i, edge): keys that a reverse segment hides from it."""

    def up_to(i: np.ndarray) -> np.ndarray:  # sum of min(j, edge) over j < i
        clipped = np.minimum(i[:, None], edges[None] + 1)
        return clipped * (clipped - 1) // 2 + (i[:, None] - clipped) * edges[None]

    return np.diff(up_to(np.concatenate(([0], ends))), axis=0)


def _split(
    pack: int, example_ids: np.ndarray, branch_ids: np.ndarray, visual_block: np.ndarray, visual_attention: str
) -> Iterator[Segment]:
    """The segments of one pack. Padding is an example of its own with a causal root."""
    order = _by_part(example_ids, branch_ids)
    example, branch = example_ids[order], branch_ids[order]
    new = np.flatnonzero((np.diff(example) != 0) | (np.diff(branch) != 0)) + 1
    parts = np.split(order, new)
    for part in parts:
        yield Segment(pack, "causal", part, part)
    starts = np.concatenate(([0], new))
    for number in np.unique(example[starts]):
        mine = np.flatnonzero(example[starts] == number)
        root = parts[mine[0]]
        if len(mine) == 1 or branch_ids[root[0]] != ROOT_BRANCH:
            continue
        branches = np.sort(np.concatenate([parts[i] for i in mine[1:]]), kind="stable")  # one run, as a rule
        if branches[0] < root[-1]:
            raise AssertionError(
                f"token {branches[0]} of pack {pack} is in a branch of example {number} but comes before token "
                f"{root[-1]} of its root; attention kernels need every root before its branches"
            )
        yield Segment(pack, "full", branches, root)
    if visual_attention != "none":
        for part in parts:
            yield from _later_visual(pack, part, visual_block, visual_attention)


def _by_part(example_ids: np.ndarray, branch_ids: np.ndarray) -> np.ndarray:
    """Tokens by example and branch, those of a part ascending: runs of tokens are sorted, of which there are few."""
    change = (np.diff(example_ids) != 0) | (np.diff(branch_ids) != 0)
    starts = np.concatenate(([0], np.flatnonzero(change) + 1))
    lengths = np.diff(starts, append=len(example_ids))
    order = np.lexsort((branch_ids[starts], example_ids[starts]))  # stable
    lengths = lengths[order]
    before = np.cumsum(lengths) - lengths  # tokens in front of each run in its new place
    return np.arange(len(example_ids)) + np.repeat(starts[order] - before, lengths)


def _later_visual(pack: int, part: np.ndarray, visual_block: np.ndarray, visual_attention: str) -> Iterator[Segment]:
    visual = part[visual_block[part] > 0]
    groups = [visual]
    if visual_attention == "within_image":
        step = np.diff(visual_block[visual])
        if (step < 0).any():
            raise AssertionError(
                f"images of pack {pack} are not numbered in their order (token {visual[1:][step < 0][0]}); "
                "visual_attention 'within_image' needs numbers that never decrease"
            )
        groups = np.split(visual, np.flatnonzero(step) + 1)
    for group in groups:
        if len(group) > 1:
            yield Segment(pack, "reverse", group[:-1], group[1:])


def _restrict(segment: Segment, queries: Range, keys: Range) -> Iterator[Segment]:
    """What is left of a segment in a rectangle, counted from its corner: a triangle and up to two full segments."""
    i0, i1 = np.searchsorted(segment.queries, queries)
    j0, j1 = np.searchsorted(segment.keys, keys)

    def cut(kind: Kind, i: Range, j: Range) -> Iterator[Segment]:
        if i[0] < i[1] and j[0] < j[1]:
            rows, columns = segment.queries[i[0] : i[1]] - queries[0], segment.keys[j[0] : j[1]] - keys[0]
            yield Segment(segment.pack, kind, rows, columns)

    if segment.kind == "full":
        yield from cut("full", (i0, i1), (j0, j1))
        return
    both = max(i0, j0), min(i1, j1)  # places that are both among these queries and these keys
    yield from cut(segment.kind, both, both)
    if segment.kind == "causal":
        yield from cut("full", (max(i0, j1), i1), (j0, j1))
        yield from cut("full", both, (j0, both[0]))
    else:
        yield from cut("full", (i0, min(i1, j0)), (j0, j1))
        yield from cut("full", both, (both[1], j1))
