"""The allowed (query, key) pairs of a micro-batch as a sum of plain segments, found on the host from O(S) integers.

Message trees have one level, so the mask of `mask.may_attend` is exactly a sum of three kinds of plain attention, each
of which a flash kernel can do without a mask:

    causal    a part (the root of an example, or one branch) looks at its own past
    full      the branches of an example look at its root, which lies before all of them
    reverse   visual tokens of a part (within_image: of an image) look at later ones: a causal mask read backwards

No pair is in two segments and none is missing: tests compare them with the rule pair by pair, and their sum with
data/counts.py, which counts pairs without naming them. Kernels that work in tiles ask for the number of pairs in every
tile instead: none means skip, all means no mask, and only what lies between is masked by the rule itself.

A `MaskRegion` may also be a part of the pack, some runs of queries against some runs of keys, as context parallelism
needs it. Shape legend: B packs, S tokens of a pack; Q queries and K keys of the region.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from molmo2_nemo.attention.mask import TokenMask, may_attend
from molmo2_nemo.data.example import ROOT_BRANCH

Kind = Literal["causal", "full", "reverse"]
Range = tuple[int, int]  # start, stop
Runs = tuple[Range, ...]  # ascending, without overlaps


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
        queries, keys: runs of the pack, or one (start, stop); None for all of it.
        whole: the region of all of it, where that is at hand: segments are cut from its own.

    Raises:
        AssertionError: a layout that the data pipeline never writes (a branch before its root, or for within_image
            images whose numbers decrease along a part).
    """

    def __init__(
        self,
        mask: TokenMask,
        queries: Range | Runs | None = None,
        keys: Range | Runs | None = None,
        whole: MaskRegion | None = None,
    ) -> None:
        mask.on_host()  # once for all regions
        # Without the regions it holds, of which this may be one: a cycle would keep a micro-batch's plans and indices
        # until the garbage collector comes by, which training switches off or rarely runs.
        self.mask = replace(mask, regions={})
        self._whole = whole
        self.queries, self.keys = _runs(queries, mask.size), _runs(keys, mask.size)
        self.cache: dict[Any, Any] = {}  # what a kernel prepared for this region and wants to keep for the next layer

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and keys."""
        return tokens_in(self.queries), tokens_in(self.keys)

    @cached_property
    def segments(self) -> list[Segment]:
        """All allowed pairs, each in exactly one segment; causal segments first, then full, then reverse."""
        everything = ((0, self.mask.size),)
        if self.queries == self.keys == everything:
            return self._split()
        whole = self._whole or MaskRegion(self.mask)
        first_query, last_query, first_key, last_key = whole._spans
        meets = (first_query < self.queries[-1][1]) & (last_query >= self.queries[0][0])
        meets &= (first_key < self.keys[-1][1]) & (last_key >= self.keys[0][0])
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

    def pairs_of_queries(self) -> np.ndarray:
        """Keys that every query sees, int64 [B, Q]."""
        seen = np.zeros((self.mask.on_host().shape[1], self.shape[0]), np.int64)
        for segment in self.segments:
            places = np.arange(len(segment.queries))
            keys = {"full": len(segment.keys), "causal": places + 1, "reverse": len(places) - places}[segment.kind]
            seen[segment.pack, segment.queries] += keys  # a segment has each query once
        return seen

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
        rows, columns = (
            torch.cat([index[start:stop] for start, stop in runs])[slice(*part)]
            for runs, part in ((self.queries, queries), (self.keys, keys))
        )
        return may_attend(
            described[:, rows, None].unbind(),
            described[:, None, columns].unbind(),
            rows[:, None],
            columns[None],
            mask.visual_attention,
        )


def region_of(mask: TokenMask, queries: Range | Runs | None = None, keys: Range | Runs | None = None) -> MaskRegion:
    """The region of these queries and keys (runs, or one start and stop; None for all), made once and kept with the
    mask.

    Every layer, and the recomputation of every layer, shares it with what the kernels have cached on it.
    """
    everything = ((0, mask.size),)
    key = _runs(queries, mask.size), _runs(keys, mask.size)
    if key not in mask.regions:
        whole = None if key == (everything, everything) else region_of(mask)
        mask.regions[key] = MaskRegion(mask, *key, whole)
    return mask.regions[key]


def runs_of(places: np.ndarray) -> Runs:
    """Ascending places as runs."""
    ends = np.flatnonzero(np.diff(places) != 1)
    starts, stops = places[[0, *(ends + 1)]], places[[*ends, -1]] + 1
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))


def tokens_in(runs: Runs) -> int:
    """How many tokens runs have."""
    return sum(stop - start for start, stop in runs)


def _runs(where: Range | Runs | None, size: int) -> Runs:
    if where is None:
        return ((0, size),)
    return where if isinstance(where[0], tuple) else (where,)  # type: ignore[return-value]


def seen_keys(mask: TokenMask, queries: Runs) -> Range:
    """From the first to the last key of the pack that some of these queries may see."""
    whole, low, high = region_of(mask), queries[0][0], queries[-1][1]
    first_query, last_query, *_ = whole._spans
    for start, stop in queries:
        for number in np.flatnonzero((first_query < stop) & (last_query >= start)):
            segment = whole.segments[number]
            first, last = np.searchsorted(segment.queries, (start, stop))
            if first < last:
                low = min(low, int(segment.keys[first if segment.kind == "reverse" else 0]))
                high = max(high, int(segment.keys[last - 1 if segment.kind == "causal" else -1]) + 1)
    return low, high


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


def _restrict(segment: Segment, queries: Runs, keys: Runs) -> Iterator[Segment]:
    """What is left of a segment in a region, counted there: a triangle over the tokens that are both queries and keys,
    and full segments, two where the region is a rectangle, one for every turn between queries and keys where runs
    interleave."""
    if segment.kind == "full":
        rows, columns = (
            [places[a:b] - shift for a, b, shift in _inside(places, runs)]
            for places, runs in ((segment.queries, queries), (segment.keys, keys))
        )
        if rows and columns:
            yield Segment(segment.pack, "full", np.concatenate(rows), np.concatenate(columns))
        return
    # a causal segment's queries are its keys; the first query of a reverse one is no key, its last key no query
    causal = segment.kind == "causal"
    tokens = segment.queries if causal else np.concatenate((segment.queries[:1], segment.keys))
    asking, asked = _inside(tokens, queries), _inside(tokens, keys)
    edges = sorted({edge for a, b, _ in (*asking, *asked) for edge in (a, b)})
    parts = []  # tokens as queries and as keys of the region, None where they are not
    for a, b in pairwise(edges):
        shifts = (next((shift for first, last, shift in found if first <= a < last), None) for found in (asking, asked))
        parts.append(tuple(None if shift is None else tokens[a:b] - shift for shift in shifts))
    both = [(rows, columns) for rows, columns in parts if rows is not None and columns is not None]
    if both:
        i, j = (np.concatenate(side) for side in zip(*both, strict=True))
        if causal:
            yield Segment(segment.pack, "causal", i, j)
        elif len(i) > 1:
            yield Segment(segment.pack, "reverse", i[:-1], j[1:])
    # queries that are no keys see the keys on their side, those that are both the keys that are no queries
    for are_keys in (False, True):
        yield from _turns(segment, parts if causal else parts[::-1], are_keys)


def _turns(segment: Segment, parts: list[Any], are_keys: bool) -> Iterator[Segment]:
    """Full segments of parts of a triangle, ordered so that a query sees what comes before it: one for the queries
    between two keys.

    Args:
        parts: queries or None, keys or None, of each.
        are_keys: for the queries that are keys too, and the keys that are not queries; else for the queries that are no
            keys, and all keys.
    """
    ascending = slice(None, None, 1 if segment.kind == "causal" else -1)
    rows: list[np.ndarray] = []
    columns: list[np.ndarray] = []
    for asking, asked in (*parts, (None, segment.keys[:0])):  # the last ends the last turn
        if asked is not None and not (are_keys and asking is not None):
            if rows and columns:
                yield Segment(segment.pack, "full", np.concatenate(rows[ascending]), np.concatenate(columns[ascending]))
            rows = []
            columns.append(asked)
        if asking is not None and (asked is not None) == are_keys:
            rows.append(asking)


def _inside(places: np.ndarray, runs: Runs) -> list[tuple[int, int, int]]:
    """Which of ascending places lie in each run: (first, last + 1, what to subtract from a place for its number in the
    runs), runs without any left out."""
    found, before = [], 0
    for start, stop in runs:
        first, last = np.searchsorted(places, (start, stop))
        if first < last:
            found.append((int(first), int(last), start - before))
        before += stop - start
    return found
