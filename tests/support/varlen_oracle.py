"""PyTorch's CUDA operators for attention of different lengths, in plain operations on CPU, as their sources promise.

    flash          aten._flash_attention_forward, _backward: log-sum-exp [N, T]
    fa4            the functions of flash_attn.cute.interface (4.0.0b36): log-sum-exp [N, T], five results
    cudnn          aten._cudnn_attention_forward, _backward up to PyTorch 2.13: log-sum-exp [T, N, 1]
    cudnn later    the same in PyTorch's main branch: log-sum-exp [N, T]

They check what the operators refuse or silently take wrongly: layouts, dtypes, strides, lengths.
"""

from __future__ import annotations

import contextlib
import sys
import types
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

LIBRARIES = ("flash", "fa4", "cudnn", "cudnn later")


def segments(query_offsets: Tensor, key_offsets: Tensor, longest_query: int, longest_key: int) -> list[tuple]:
    bounds = [list(zip(o[:-1].tolist(), o[1:].tolist(), strict=True)) for o in (query_offsets, key_offsets)]
    assert max(stop - start for start, stop in bounds[0]) == longest_query
    assert max(stop - start for start, stop in bounds[1]) == longest_key
    assert query_offsets.dtype == key_offsets.dtype == torch.int32
    return [(slice(*q), slice(*k)) for q, k in zip(*bounds, strict=True)]


def scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """[L, N, H], [M, G, H] -> [N, L, M]."""
    s = torch.einsum("qnh,knh->nqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    if causal:
        assert s.shape[1] == s.shape[2]  # elsewhere kernels differ in which corner they align
        s = s.masked_fill(torch.ones(s.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
    return s


def forward(q, k, v, q_offsets, k_offsets, q_max, k_max, causal, scale) -> tuple[Tensor, Tensor]:
    """out [T, N, H], lse [T, N]."""
    assert all(t.is_contiguous() for t in (q, k, v)) and q.shape[0] == q_offsets[-1] and k.shape[0] == k_offsets[-1]
    dtype, (q, k, v) = q.dtype, (t.float() for t in (q, k, v))  # the kernels add up in fp32 too
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    for rows, keys in segments(q_offsets, k_offsets, q_max, k_max):
        s = scores(q[rows], k[keys], causal, scale)
        lse[rows] = s.logsumexp(-1).T
        values = v[keys].repeat_interleave(q.shape[1] // k.shape[1], 1)
        out[rows] = torch.einsum("nqk,knh->qnh", s.softmax(-1), values)
    return out.to(dtype), lse


def backward(grad, q, k, v, out, lse, q_offsets, k_offsets, q_max, k_max, causal, scale) -> tuple[Tensor, ...]:
    assert lse.shape == q.shape[:2] and lse.dtype == torch.float32
    assert len({t.dtype for t in (grad, q, k, v, out)}) == 1 and all(t.is_contiguous() for t in (grad, q, k, v, out))
    dtype, (grad, q, k, v, out) = q.dtype, (t.float() for t in (grad, q, k, v, out))
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    for rows, keys in segments(q_offsets, k_offsets, q_max, k_max):
        weights = (scores(q[rows], k[keys], causal, scale) - lse[rows].T[..., None]).exp()
        values = v[keys].repeat_interleave(repeats, 1)
        drift = (grad[rows] * out[rows]).sum(-1).T[..., None]
        d_scores = weights * (torch.einsum("qnh,knh->nqk", grad[rows], values) - drift) * scale
        dq[rows] = torch.einsum("nqk,knh->qnh", d_scores, k[keys].repeat_interleave(repeats, 1))
        for total, part in (
            (dk, torch.einsum("nqk,qnh->knh", d_scores, q[rows])),
            (dv, torch.einsum("nqk,qnh->knh", weights, grad[rows])),
        ):
            total[keys] = part.unflatten(1, (-1, repeats)).sum(2)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def flash_forward(q, k, v, q_offsets, k_offsets, q_max, k_max, dropout, causal, return_debug_mask, scale=None) -> tuple:
    assert dropout == 0 and not return_debug_mask
    out, lse = forward(q, k, v, q_offsets, k_offsets, q_max, k_max, causal, scale)
    return out, lse.T.contiguous(), None, None, None


def flash_backward(
    grad, q, k, v, out, lse, q_offsets, k_offsets, q_max, k_max, dropout, causal, seed, offset, scale=None
) -> tuple[Tensor, ...]:
    assert dropout == 0 and lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous()
    return backward(grad, q, k, v, out, lse.T, q_offsets, k_offsets, q_max, k_max, causal, scale)


def fa4_module() -> types.ModuleType:
    """What fused/varlen.py uses of FlashAttention-4."""

    def fwd(q, k, v, *, softmax_scale, causal, return_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        assert return_lse
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse = forward(q, k, v, *lengths, causal, softmax_scale)
        return out, lse.T.contiguous(), None, None, None

    def bwd(q, k, v, out, dout, lse, *, softmax_scale, causal, deterministic, **given):
        assert lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous() and not deterministic
        lengths = (given[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"))
        return backward(dout, q, k, v, out, lse.T, *lengths, causal, softmax_scale)

    module = types.ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd, module._flash_attn_bwd = fwd, bwd
    return module


def cudnn(heads_first: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward with one of the two layouts of the log-sum-exp."""

    def cudnn_forward(
        q, k, v, bias, q_offsets, k_offsets, q_max, k_max, with_lse, dropout=0.0, causal=False, debug=False, scale=None
    ) -> tuple:
        assert with_lse and bias is None and dropout == 0 and not debug
        out, lse = forward(q, k, v, q_offsets, k_offsets, q_max, k_max, causal, scale)
        unused = torch.zeros((), dtype=torch.int64)
        lse = lse.T.contiguous() if heads_first else lse[..., None].contiguous()
        return out, lse, q_offsets, k_offsets, q_max, k_max, unused, unused, unused

    def cudnn_backward(
        grad, q, k, v, out, lse, seed, offset, bias, q_offsets, k_offsets, q_max, k_max, dropout, causal, scale=None
    ) -> tuple[Tensor, ...]:
        assert bias is None and dropout == 0 and lse.is_contiguous()
        assert lse.shape == ((q.shape[1], q.shape[0]) if heads_first else (*q.shape[:2], 1))
        lse = lse.T if heads_first else lse[..., 0]
        return backward(grad, q, k, v, out, lse, q_offsets, k_offsets, q_max, k_max, causal, scale)

    return cudnn_forward, cudnn_backward


@contextlib.contextmanager
def operators_on_cpu(library: str) -> Iterator[Any]:
    """PyTorch's operators have these implementations on CPU; yields the library of fused/varlen.py that calls them."""
    from molmo2_nemo.fused import varlen

    if library == "fa4":
        with unittest.mock.patch.dict(sys.modules, {"flash_attn.cute.interface": fa4_module()}):
            varlen._fa4.cache_clear()
            yield varlen.FA4
        varlen._fa4.cache_clear()
        return
    name = "flash" if library == "flash" else "cudnn"
    pair = (flash_forward, flash_backward) if library == "flash" else cudnn(library == "cudnn later")
    registered = torch.library.Library("aten", "IMPL")
    for direction, function in zip(("forward", "backward"), pair, strict=True):
        registered.impl(f"_{name}_attention_{direction}", function, "CPU")
    varlen.HEADS_FIRST.clear()
    try:
        yield varlen.PLAIN if library == "flash" else varlen.CUDNN
    finally:
        registered._destroy()
        varlen.HEADS_FIRST.clear()
