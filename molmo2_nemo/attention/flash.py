"""Tree attention as a few plain flash calls, merged by their log-sum-exps. Exact, and no mask is ever made.

The segments of a `MaskRegion` are causal, full, or causal read backwards, so any flash kernel can do them. Outputs over
disjoint keys merge as in ring attention (arXiv 2310.01889): with l = logsumexp(l_1, l_2), out = e^(l_1 - l) out_1 +
e^(l_2 - l) out_2. Backward, every segment is given the merged output and log-sum-exp, with which its own probabilities
and the softmax's correction term come out right; the gradients of the segments add up.

Two ways to run the segments:
    CPU    one call of PyTorch's CPU flash kernel for each segment, on views where the tokens lie together
    CUDA   one variable-length call of aten._flash_attention_forward for all segments whose tokens are disjoint: three
           for a batch of packs, however many examples and branches it has. PyTorch's own kernel (FlashAttention-2), or
           FlashAttention-3 or 4 where `use_newest_flash` finds one that PyTorch can put in its place.

Shape legend: Q queries, K keys, B packs, N query heads, G key heads, H head size; L tokens of a segment.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molmo2_nemo import cpu
from molmo2_nemo.attention.automatic import flash_problem
from molmo2_nemo.attention.regions import MaskRegion, Segment
from molmo2_nemo.transfer import to_device

# what PyTorch calls them, their module, and the compute capabilities (major) they are written for
NEWER_FLASH = (("FA3", "flash_attn_interface", {9}), ("FA4", "flash_attn.cute", {9, 10}))


def problem(device: str, dtype: torch.dtype, head_size: int) -> str | None:
    """Why this kernel cannot run here, or None."""
    return flash_problem(device, str(dtype).removeprefix("torch."), head_size)


def forward(q: Tensor, k: Tensor, v: Tensor, region: MaskRegion, scale: float) -> tuple[Tensor, Tensor]:
    """See `kernels.Kernel`."""
    return _forward_varlen(q, k, v, region, scale) if q.is_cuda else _forward_segments(q, k, v, region, scale)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, region: MaskRegion, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.Kernel`."""
    run = _backward_varlen if q.is_cuda else _backward_segments
    return run(grad, q, k, v, out, lse, region, scale)


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
        self.out = torch.zeros_like(q, dtype=_accumulator(q.dtype), memory_format=torch.contiguous_format)
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


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    dtype = _accumulator(q.dtype)
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

    Tokens are flat indices: place * B + pack.
    """

    causal: bool
    queries: Tensor | None  # int64 [tokens], None for all tokens in order
    keys: Tensor | None
    query_offsets: Tensor  # int32 [segments + 1]
    key_offsets: Tensor
    longest_query: int
    longest_key: int


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

    def flat(tokens: list[np.ndarray], size: int) -> Tensor | None:
        joined = np.concatenate(
            [
                (places[::-1] if segment.kind == "reverse" else places) * packs + segment.pack
                for segment, places in zip(segments, tokens, strict=True)
            ]
        )
        if len(joined) == size * packs and (np.diff(joined) == 1).all():
            return None
        return to_device(joined, device)

    def offsets(tokens: list[np.ndarray]) -> Tensor:
        counts = np.cumsum([0, *map(len, tokens)]).astype(np.int32)
        return to_device(counts, device)

    queries, keys = [segment.queries for segment in segments], [segment.keys for segment in segments]
    return Call(
        causal=segments[0].kind != "full",
        queries=flat(queries, region.shape[0]),
        keys=flat(keys, region.shape[1]),
        query_offsets=offsets(queries),
        key_offsets=offsets(keys),
        longest_query=max(map(len, queries)),
        longest_key=max(map(len, keys)),
    )


def _forward_varlen(q: Tensor, k: Tensor, v: Tensor, region: MaskRegion, scale: float) -> tuple[Tensor, Tensor]:
    merge = _Merge(q.flatten(0, 1))
    q_flat, k_flat, v_flat = (t.flatten(0, 1) for t in (q, k, v))
    for number, call in enumerate(calls(region, q.device)):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            _take(q_flat, call.queries),
            _take(k_flat, call.keys),
            _take(v_flat, call.keys),
            call.query_offsets,
            call.key_offsets,
            call.longest_query,
            call.longest_key,
            0.0,
            call.causal,
            return_debug_mask=False,
            scale=scale,
        )
        merge_in = merge.add if number else merge.put
        merge_in(slice(None) if call.queries is None else call.queries, out, lse.T)
    return merge.out.to(q.dtype).view_as(q), merge.lse.view(q.shape[:-1])


def _backward_varlen(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, region: MaskRegion, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_flat, q_flat, k_flat, v_flat, out_flat, lse_flat = (t.flatten(0, 1) for t in (grad, q, k, v, out, lse))
    sums = [torch.zeros_like(t, dtype=_accumulator(t.dtype)) for t in (q_flat, k_flat, v_flat)]
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the generator's state: there is no dropout
    for call in calls(region, q.device):
        parts = torch.ops.aten._flash_attention_backward(
            _take(grad_flat, call.queries),
            _take(q_flat, call.queries),
            _take(k_flat, call.keys),
            _take(v_flat, call.keys),
            _take(out_flat, call.queries),
            _take(lse_flat, call.queries).T.contiguous(),
            call.query_offsets,
            call.key_offsets,
            call.longest_query,
            call.longest_key,
            0.0,
            call.causal,
            unused,
            unused,
            scale=scale,
        )
        for total, part, where in zip(sums, parts, (call.queries, call.keys, call.keys), strict=True):
            if where is None:
                total += part
            else:  # rows are distinct within a call, so this is exact and always in the same order
                total[where] = total[where] + part
    return tuple(t.to(x.dtype).view_as(x) for t, x in zip(sums, (q, k, v), strict=True))  # type: ignore[return-value]


def _take(x: Tensor, where: Tensor | None) -> Tensor:
    return x.contiguous() if where is None else x.index_select(0, where)


def implementation(device: str) -> tuple[str, str]:
    """The kernel's name in cost/efficiency.py, and its title for the log."""
    return use_newest_flash() if device == "cuda" else ("flash-cpu", "PyTorch's CPU flash attention")


@functools.cache
def use_newest_flash() -> tuple[str, str]:
    """Put the fastest installed flash implementation under PyTorch's flash operators; returns its name in
    cost/efficiency.py, and its title for the log.

    FlashAttention-3 (module flash_attn_interface) on Hopper, FlashAttention-4 (flash_attn.cute) on Hopper and
    Blackwell, else what PyTorch was built with: where neither is installed, works, or can be put into this PyTorch.
    """
    own = f"FlashAttention-2 of PyTorch {torch.__version__}"
    try:
        from torch.nn.attention import activate_flash_attention_impl
    except ImportError:
        return "flash2", own
    major = torch.cuda.get_device_capability()[0]
    for name, module, majors in NEWER_FLASH:
        if major in majors and is_installed(module):
            try:
                activate_flash_attention_impl(name)
            except Exception as error:  # noqa: BLE001 - a library built for another torch fails in any way it likes
                problem = str(error).splitlines()[0] if str(error) else repr(error)
                own += f"; {module} is installed but does not work: {problem}"
                continue
            return f"flash{name[-1]}", f"FlashAttention-{name[-1]} (module {module})"
    return "flash2", own


@functools.cache
def is_installed(module: str) -> bool:
    """Whether a module could be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
