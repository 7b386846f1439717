"""Attention of a layer's queries, one chunk at a time, over keys and values of all its tokens, which are carried along.

A decoder layer that works in chunks (model/chunks.py) first computes keys and values of all chunks, then queries and
all else of one chunk after another. In backward the gradients of keys and values are added up over the chunks, in fp32.
Which keys a chunk sees is asked of the pack's mask (regions.py), so that trees, and pictures whose tokens see each
other across the borders of chunks, come out as without chunks; of earlier tokens only, it would be ChunkFlow's way
(arXiv 2503.02356).

A chunk is some rows of the rank's residual stream. Inside attention those are several runs of the pack: some of every
rank that shards the stream (sequence parallelism), times some of every rank of the Ulysses group. Ranks of a ring send
each other the keys that are visible there once for all chunks, and their gradients once.

Shape legend: S tokens of the pack; Q = S / ring tokens of the Ulysses group, in `stretches` of R rows each; c rows of a
chunk, L = c * stretches its queries; B packs, N query heads and G key heads inside attention, H head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molmo2_nemo.attention.kept import Results
from molmo2_nemo.attention.kernels import Kernel
from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.attention.regions import MaskRegion, Range, Runs, region_of, runs_of, seen_keys, tokens_in
from molmo2_nemo.attention.ring import VisibleKeys, chunk_runs, merge, return_gradients, show_keys, shown_keys
from molmo2_nemo.attention.ulysses import gather_heads, gather_sequence, replicate_kv
from molmo2_nemo.fused.merge import accumulator
from molmo2_nemo.parallel.context import ContextGroups, group_rank, group_size


@dataclass(frozen=True)
class ChunkedPack:
    """How the tokens of a pack lie in chunks on this rank.

    Args:
        sharded: ranks that shard the residual stream of this rank's tokens; 1 without sequence parallelism.
        visible: what the parts of the ring's ranks see of each other; None where there is no ring.
    """

    mask: TokenMask
    groups: ContextGroups
    sharded: int
    visible: VisibleKeys | None = None

    @property
    def stretches(self) -> int:
        return group_size(self.groups.ulysses) * self.sharded

    @property
    def rows(self) -> int:
        """R, of this rank's residual stream."""
        return self.mask.size // group_size(self.groups.ring) // self.stretches

    def chunks(self, tokens: int) -> list[Range]:
        """Rows of each chunk of so many tokens of this context rank; the last may have fewer."""
        size = max(1, tokens // self.sharded)
        return [(start, min(start + size, self.rows)) for start in range(0, self.rows, size)]

    @cached_property
    def _places(self) -> np.ndarray:
        """Of the tokens that attention has as queries here, int64 [stretches, R]."""
        held = chunk_runs(self.mask, group_size(self.groups.ring))[group_rank(self.groups.ring)]
        return np.concatenate([np.arange(*run) for run in held]).reshape(self.stretches, self.rows)

    def queries(self, rows: Range) -> Runs:
        """Those of a chunk, in the pack."""
        return runs_of(self._places[:, slice(*rows)].ravel())

    def keys(self) -> list[Runs]:
        """Places in the pack of the keys that this rank carries: its own, and what others show it."""
        if self.visible is None:
            return [((0, self.mask.size),)]
        return shown_keys(self.mask, self.groups, self.visible)

    def regions(self, rows: Range, carried: list[Runs]) -> list[tuple[int, slice, MaskRegion]]:
        """What the queries of a chunk see: which of the carried keys, places among them, and the region of the mask."""
        queries, found = self.queries(rows), []
        first, last = seen_keys(self.mask, queries)
        for number, runs in enumerate(carried):
            seen = tuple((max(low, first), min(high, last)) for low, high in runs if low < last and high > first)
            before = tokens_in(tuple((low, min(high, first)) for low, high in runs if low < first))
            if seen:
                keys = slice(before, before + tokens_in(seen))
                found.append((number, keys, region_of(self.mask, queries, seen)))
        return found

    def plan(self, kernel: Kernel, tokens: int, device: torch.device) -> None:
        """Plan the kernel's work for every chunk, and keep it with the mask."""
        carried = self.keys()
        for rows in self.chunks(tokens):
            for _, _, region in self.regions(rows, carried):
                kernel.plan(region, device)


class CarriedKeys:
    """Keys and values of one layer in one pass, and in backward the sums of their gradients.

    Chunks are put in (`fill`); then, once for all, ranks show each other keys (`show`); then chunks of queries look at
    them (`ChunkOfQueries`). After backward through all chunks `collect` returns what other ranks have added up, and
    `gradients` has a chunk's.
    """

    def __init__(self, pack: ChunkedPack, kernel: Kernel, scale: float) -> None:
        self.pack, self.kernel, self.scale = pack, kernel, scale
        self.places = pack.keys()
        self._own: Tensor | None = None  # [2, stretches, R, B, G, H]
        self.parts: list[Tensor] = []  # for each of these [2, keys, B, G, H]
        self.sums: list[Tensor] = []  # their gradients

    def exchanged(self, heads: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a chunk as attention holds them, differentiable: [c * sharded, B, all G, H] ->
        [L, B, G, H]. heads: query heads of this tensor-parallel rank."""
        ulysses = group_size(self.pack.groups.ulysses)
        if ulysses > 1:
            k, v = (replicate_kv(t, ulysses, heads) for t in (k, v))
            k, v = gather_sequence((k, v), self.pack.groups.ulysses)
        return k, v

    def fill(self, rows: Range, k: Tensor, v: Tensor) -> None:
        """Keys and values of a chunk, [L, B, G, H] from `exchanged`."""
        if self._own is None:
            self._own = k.new_empty(2, self.pack.stretches, self.pack.rows, *k.shape[1:])
        for own, chunk in zip(self._own, (k, v), strict=True):
            own[:, slice(*rows)] = chunk.unflatten(0, (self.pack.stretches, -1))

    def show(self) -> None:
        assert self._own is not None
        own, self._own = self._own.flatten(1, 2), None
        visible = self.pack.visible
        self.parts = [own] if visible is None else show_keys(own, self.pack.mask, self.pack.groups, visible)

    def look(self, rows: Range, q: Tensor) -> Results:
        """Attention of a chunk's queries [L, B, N, H] over all they may see: out in q's dtype, lse fp32."""
        merged: Results | None = None
        for number, keys, region in self.pack.regions(rows, self.places):
            k, v = self.parts[number][:, keys]
            more = self.kernel.forward(q, k, v, region, self.scale)
            merged = more if merged is None else merge(merged[0].to(more[1].dtype), merged[1], *more)
        assert merged is not None  # every query sees itself
        return merged[0].to(q.dtype), merged[1]

    def look_back(self, rows: Range, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        """Backward of `look`: adds up gradients of keys and values, and returns that of the queries."""
        assert self.kernel.backward is not None
        if not self.sums:
            self.sums = [torch.zeros_like(part, dtype=accumulator(part.dtype)) for part in self.parts]
        total = torch.zeros_like(q, dtype=accumulator(q.dtype))
        for number, keys, region in self.pack.regions(rows, self.places):
            k, v = self.parts[number][:, keys]
            dq, dk, dv = self.kernel.backward(grad, q, k, v, out, lse, region, self.scale)
            total += dq
            sums = self.sums[number][:, keys]
            sums[0] += dk
            sums[1] += dv
        return total.to(q.dtype)

    def collect(self) -> None:
        own, visible = self.sums[0], self.pack.visible
        if visible is not None:
            own = return_gradients(self.sums, self.parts[0].dtype, self.pack.mask, self.pack.groups, visible)
        self._own = own.unflatten(1, (self.pack.stretches, -1))
        self.parts, self.sums = [], []

    def gradients(self, rows: Range, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of a chunk's keys and values, [L, B, G, H], after `collect`."""
        assert self._own is not None
        dk, dv = (own[:, slice(*rows)].flatten(0, 1).to(dtype) for own in self._own)
        return dk, dv


@dataclass
class ChunkOfQueries:
    """The queries that a layer has at work, as its attention finds them in the description of the pack.

    Args:
        kept: where all chunks' results wait for backward, out [stretches, R, B, N, H] and lse [stretches, R, B, N];
            None: nowhere.
        again: this is the pass in backward, which takes what is kept.
    """

    carried: CarriedKeys
    rows: Range
    kept: KeptChunks | None = None
    again: bool = False

    @torch.compiler.disable  # as in `attend_across`
    def attend(self, q: Tensor) -> Tensor:
        """[c * sharded, B, all N, H] -> the same, differentiable in q; gradients of keys are summed in `carried`."""
        ulysses = self.carried.pack.groups.ulysses
        if group_size(ulysses) > 1:
            (q,) = gather_sequence((q,), ulysses)
        out = _Attend.apply(q, self)
        return gather_heads(out, ulysses) if group_size(ulysses) > 1 else out

    def results(self, q: Tensor) -> Results:
        if self.kept is not None and self.again:
            return self.kept.of(self.rows)
        out, lse = self.carried.look(self.rows, q)
        if self.kept is not None:
            self.kept.put(self.rows, out, lse)
        return out, lse


class KeptChunks:
    """Attention's results of all chunks of a layer."""

    def __init__(self, pack: ChunkedPack, tensors: tuple[Tensor, ...] = ()) -> None:
        self.pack, self.tensors = pack, tensors

    def put(self, rows: Range, *results: Tensor) -> None:
        shape = self.pack.stretches, self.pack.rows
        if not self.tensors:
            self.tensors = tuple(part.new_empty(*shape, *part.shape[1:]) for part in results)
        for all_, part in zip(self.tensors, results, strict=True):
            all_[:, slice(*rows)] = part.unflatten(0, (self.pack.stretches, -1))

    def of(self, rows: Range) -> Results:
        out, lse = (all_[:, slice(*rows)].flatten(0, 1) for all_ in self.tensors)
        return out, lse


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, chunk: ChunkOfQueries) -> Tensor:
        out, lse = chunk.results(q)
        ctx.save_for_backward(q, out, lse)
        ctx.chunk = chunk
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.chunk.carried.look_back(ctx.chunk.rows, grad, *ctx.saved_tensors), None
