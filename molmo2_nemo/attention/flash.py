"""Tree attention as a few plain flash calls, merged by their log-sum-exps. Exact, and no mask is ever made.

The segments of a `MaskRegion` are causal, full, or causal read backwards, so any flash kernel can do them. Outputs over
disjoint keys merge as in ring attention (arXiv 2310.01889): with l = logsumexp(l_1, l_2), out = e^(l_1 - l) out_1 +
e^(l_2 - l) out_2. Backward, every segment is given the merged output and log-sum-exp, with which its own probabilities
and the softmax's correction term come out right; the gradients of the segments add up.

Two ways to run the segments:
    CPU    one call of PyTorch's CPU flash kernel for each segment, on views where the tokens lie together
    CUDA   one variable-length call for all segments whose tokens are disjoint: three for a batch of packs, however many
           examples and branches it has. Which library does it is fused/varlen.py's, how results merge fused/merge.py's.

Shape legend: Q queries, K keys, B packs, N query heads, G key heads, H head size; L tokens of a segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molmo2_nemo import cpu
from molmo2_nemo.attention.automatic import flash_problem
from molmo2_nemo.attention.regions import MaskRegion, Segment
from molmo2_nemo.fused.merge import PLAIN as PLAIN_MERGING
from molmo2_nemo.fused.merge import Merging, Piece, Rows, accumulator
from molmo2_nemo.fused.varlen import PLAIN as OWN_LIBRARY
from molmo2_nemo.fused.varlen import Lengths, Library
from molmo2_nemo.transfer import to_device


def problem(device: str, dtype: torch.dtype, head_size: int) -> str | None:
    """Why this kernel cannot run here, or None."""
    return flash_problem(device, str(dtype).removeprefix("torch."), head_size)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    region: MaskRegion,
    scale: float,
    library: Library = OWN_LIBRARY,
    merging: Merging = PLAIN_MERGING,
) -> tuple[Tensor, Tensor]:
    """See `kernels.Kernel`. `library` and `merging` are for CUDA."""
    if q.is_cuda:
        return _forward_varlen(q, k, v, region, scale, library, merging)
    return _forward_segments(q, k, v, region, scale)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    region: MaskRegion,
    scale: float,
    library: Library = OWN_LIBRARY,
    merging: Merging = PLAIN_MERGING,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.Kernel`."""
    if q.is_cuda:
        return _backward_varlen(grad, q, k, v, out, lse, region, scale, library, merging)
    return _backward_segments(grad, q, k, v, out, lse, region, scale)


def plan(region: MaskRegion, device: torch.device) -> None:
    """See `kernels.Kernel`."""
    if device.type == "cuda":
        calls(region, device)
        return
    for segment in region.segments:
        _places(segment, region)


class _Merge:
    """Output and log-sum-exp so far, in fp32 (or fp64); rows that no segment has reached have lse -inf and output 0."""

    def __init__(self, q: Tensor) -> None:
        self.out = torch.zeros_like(q, dtype=accumulator(q.dtype), memory_format=torch.contiguous_format)
        self.lse = torch.full(q.shape[:-1], -torch.inf, dtype=self.out.dtype, device=q.device)

    def put(self, where: Any, out: Tensor, lse: Tensor) -> None:
        """Store the result of the first segment to reach the rows `where`; out [L, N, H], lse [L, N]."""
        self.out[where], self.lse[where] = out.to(self.out.dtype), lse

    def add(self, where: Any, out: Tensor, lse: Tensor) -> None:
        """Merge in a further segment over the rows `where`; out [L, N, H], lse [L, N]."""
        before = self.lse[where]
        total = torch.logaddexp(before, lse)
        self.out[where] = self.out[where] * (before - total).exp()[..., None] + out * (lse - total).exp()[..., None]
        self.lse[where] = total


# --- CPU: one call for each segment. Segments are small: going through the CPU shims would cost as much as the work


@cpu.suspended()
def _forward_segments(q: Tensor, k: Tensor, v: Tensor, region: MaskRegion, scale: float) -> tuple[Tensor, Tensor]:
    merge = _Merge(q)
    groups = k.shape[2]
    for segment in region.segments:
        rows, columns = _places(segment, region)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _heads(q[rows, segment.pack], groups),
            _heads(k[columns, segment.pack], groups, q.shape[2]),
            _heads(v[columns, segment.pack], groups, q.shape[2]),
            0.0,
            segment.kind != "full",
            scale=scale,
        )
        # causal segments come first and share no query
        merge_in = merge.put if segment.kind == "causal" else merge.add
        merge_in((rows, segment.pack), _tokens(out), lse.flatten(0, 1).T)
    return merge.out.to(q.dtype), merge.lse


@cpu.suspended()
def _backward_segments(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, region: MaskRegion, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(q.dtype)
    dq, dk, dv = (torch.zeros_like(t, dtype=dtype) for t in (q, k, v))
    groups, heads = k.shape[2], q.shape[2]
    for segment in region.segments:
        rows, columns = _places(segment, region)
        # PyTorch's CPU kernel adds up dk and dv block by block in the dtype of its inputs: in bf16 one plain call over
        # 4,096 tokens is wrong by 3 roundings, and more the longer the pack. So it is given fp32.
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads(grad[rows, segment.pack].to(dtype), groups),
            _heads(q[rows, segment.pack].to(dtype), groups),
            _heads(k[columns, segment.pack].to(dtype), groups, heads),
            _heads(v[columns, segment.pack].to(dtype), groups, heads),
            _heads(out[rows, segment.pack].to(dtype), groups),
            lse[rows, segment.pack].T.unflatten(0, (groups, -1)).contiguous(),
            0.0,
            segment.kind != "full",
            scale=scale,
        )
        dq[rows, segment.pack] += _tokens(parts[0])
        dk[columns, segment.pack] += parts[1].sum(1).transpose(0, 1)
        dv[columns, segment.pack] += parts[2].sum(1).transpose(0, 1)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _heads(x: Tensor, groups: int, heads: int | None = None) -> Tensor:
    """[L, N, H] -> [G, N / G, L, H], one batch entry for each key head; keys are seen by N / G heads without a copy."""
    if heads is None:
        return x.transpose(0, 1).unflatten(0, (groups, -1))
    return x.transpose(0, 1)[:, None].expand(-1, heads // groups, -1, -1)


def _tokens(x: Tensor) -> Tensor:
    """[G, N / G, L, H] -> [L, N, H]."""
    return x.flatten(0, 1).transpose(0, 1)


def _places(segment: Segment, region: MaskRegion) -> tuple[slice | Tensor, slice | Tensor]:
    """Where a segment's queries and keys are: slices where they lie together, else indices; reversed for "reverse"."""
    key = ("places", id(segment))
    if key not in region.cache:
        step = -1 if segment.kind == "reverse" else 1
        region.cache[key] = _place(segment.queries[::step]), _place(segment.keys[::step])
    return region.cache[key]


def _place(tokens: np.ndarray) -> slice | Tensor:
    if tokens[-1] - tokens[0] + 1 == len(tokens):
        return slice(int(tokens[0]), int(tokens[-1]) + 1)
    return torch.from_numpy(np.ascontiguousarray(tokens))


# --- CUDA: variable-length calls


@dataclass(frozen=True)
class Call:
    """Segments with disjoint queries and disjoint keys as one variable-length call.

    Rows are flat: place * B + pack.
    """

    lengths: Lengths
    queries: Rows | None  # None for all tokens in order
    keys: Rows | None


def calls(region: MaskRegion, device: torch.device) -> list[Call]:
    """The variable-length calls of a region, cached on the region."""
    key = ("calls", device)
    if key not in region.cache:
        region.cache[key] = [_call(segments, region, device) for segments in group_segments(region)]
    return region.cache[key]


def group_segments(region: MaskRegion) -> list[list[Segment]]:
    """The region's segments in as few groups as a first-fit pass finds. A group is all causal (or reverse) or all full
    and has each token once as a query and once as a key, so that no two segments of it add gradients to the same
    row."""
    groups: list[_Group] = []
    packs = region.mask.on_host().shape[1]
    for segment in region.segments:
        chosen = next((g for g in groups if g.has_room(segment)), None)
        if chosen is None:
            chosen = _Group(segment.kind != "full", np.ones((2, packs, max(region.shape)), bool), [])
            groups.append(chosen)
        chosen.free[0, segment.pack, segment.queries] = False
        chosen.free[1, segment.pack, segment.keys] = False
        chosen.segments.append(segment)
    return [g.segments for g in groups]


@dataclass(frozen=True)
class _Group:
    causal: bool
    free: np.ndarray  # bool [2, B, tokens]: not yet a query, not yet a key
    segments: list[Segment]

    def has_room(self, segment: Segment) -> bool:
        if self.causal != (segment.kind != "full"):
            return False
        free_queries, free_keys = self.free[:, segment.pack]
        return bool(free_queries[segment.queries].all() and free_keys[segment.keys].all())


def _call(segments: list[Segment], region: MaskRegion, device: torch.device) -> Call:
    packs = region.mask.on_host().shape[1]
    queries, keys = [segment.queries for segment in segments], [segment.keys for segment in segments]
    causal = segments[0].kind != "full"
    assert not causal or all(map(np.array_equal, map(len, queries), map(len, keys))), "libraries align other corners"

    def flat(tokens: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(
            [
                (places[::-1] if segment.kind == "reverse" else places) * packs + segment.pack
                for segment, places in zip(segments, tokens, strict=True)
            ]
        )

    def offsets(tokens: list[np.ndarray]) -> Tensor:
        return to_device(np.cumsum([0, *map(len, tokens)]).astype(np.int32), device)

    places = flat(queries), flat(keys)
    same = region.shape[0] == region.shape[1] and np.array_equal(*places)
    rows = _rows(places[0], region.shape[0] * packs, device)
    query_offsets = offsets(queries)
    return Call(
        Lengths(
            causal=causal,
            query_offsets=query_offsets,
            key_offsets=query_offsets if causal else offsets(keys),
            longest_query=max(map(len, queries)),
            longest_key=max(map(len, keys)),
        ),
        queries=rows,
        keys=rows if same else _rows(places[1], region.shape[1] * packs, device),
    )


def _rows(places: np.ndarray, size: int, device: torch.device) -> Rows | None:
    if len(places) == size and (np.diff(places) == 1).all():
        return None
    inverse = np.full(size, -1)
    inverse[places] = np.arange(len(places))
    return Rows(to_device(places, device), to_device(inverse, device))


def _forward_varlen(
    q: Tensor, k: Tensor, v: Tensor, region: MaskRegion, scale: float, library: Library, merging: Merging
) -> tuple[Tensor, Tensor]:
    q_flat, k_flat, v_flat = (t.flatten(0, 1) for t in (q, k, v))
    pieces = []
    for call in calls(region, q.device):
        parts = _take(q_flat, call.queries), _take(k_flat, call.keys), _take(v_flat, call.keys)
        pieces.append(Piece(*library.forward(*parts, call.lengths, scale), call.queries))
    if not pieces:  # no query sees any key
        return torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf, dtype=accumulator(q.dtype))
    out, lse = merging.merge(pieces, len(q_flat))
    return out.view_as(q), lse.view(q.shape[:-1])


def _backward_varlen(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    region: MaskRegion,
    scale: float,
    library: Library,
    merging: Merging,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_flat, q_flat, k_flat, v_flat, out_flat, lse_flat = (t.flatten(0, 1) for t in (grad, q, k, v, out, lse))
    parts: tuple[list[tuple[Tensor, Rows | None]], ...] = ([], [], [])
    for call in calls(region, q.device):
        at_queries = (_take(t, call.queries) for t in (grad_flat, q_flat, out_flat, lse_flat))
        grad_part, q_part, out_part, lse_part = at_queries
        k_part, v_part = _take(k_flat, call.keys), _take(v_flat, call.keys)
        found = library.backward(grad_part, q_part, k_part, v_part, out_part, lse_part, call.lengths, scale)
        for list_, part, rows in zip(parts, found, (call.queries, call.keys, call.keys), strict=True):
            list_.append((part, rows))
    if not parts[0]:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dq, dk, dv = (
        merging.add(found, x.shape[0] * x.shape[1]).view_as(x) for found, x in zip(parts, (q, k, v), strict=True)
    )
    return dq, dk, dv


def _take(x: Tensor, rows: Rows | None) -> Tensor:
    return x.contiguous() if rows is None else x.index_select(0, rows.places)


def implementation(device: str, library: Library | None = None) -> tuple[str, str]:
    """The kernel's name in cost/efficiency.py, and its title for the log; on CUDA a library is put in its place."""
    if device != "cuda":
        return "flash-cpu", "PyTorch's CPU flash attention"
    if library is not None:
        library.prepare()
    chosen = library or OWN_LIBRARY
    return chosen.implementation, chosen.title
