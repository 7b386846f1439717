"""The CUDA route of the flash kernel on CPU: its variable-length calls, gathers, merges and sums against the oracle.

PyTorch has aten._flash_attention_forward and _backward for CUDA only. Here they are given a CPU implementation that
does what the operators promise, segment by segment in plain operations; all else is the code that runs on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from molmo2_nemo.attention import flash
from molmo2_nemo.attention.dense import dense_attention
from molmo2_nemo.attention.regions import region_of
from tests.support.trees import RULES, Tree, token_mask

SIZE = 128
PACKS = [
    [Tree((2, *[3] * 4), (8,) * 4, (1, 4)), Tree((3, 0), (12,)), Tree((9,))],
    [Tree((4, 2), (20,), (1,) * 30), Tree((1, 1), (17,), (6, 2, 9), pictures_in_branches=True)],
]


def segments(query_offsets: Tensor, key_offsets: Tensor, longest_query: int, longest_key: int):
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


def varlen_forward(q, k, v, q_offsets, k_offsets, q_max, k_max, dropout, causal, return_debug_mask, scale):
    assert dropout == 0 and all(t.is_contiguous() for t in (q, k, v)) and q.shape[0] == q_offsets[-1]
    dtype, (q, k, v) = q.dtype, (t.float() for t in (q, k, v))  # the kernels add up in fp32 too
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
    for rows, keys in segments(q_offsets, k_offsets, q_max, k_max):
        s = scores(q[rows], k[keys], causal, scale)
        lse[:, rows] = s.logsumexp(-1)
        values = v[keys].repeat_interleave(q.shape[1] // k.shape[1], 1)
        out[rows] = torch.einsum("nqk,knh->qnh", s.softmax(-1), values)
    return out.to(dtype), lse, None, None, None


def varlen_backward(grad, q, k, v, out, lse, q_offsets, k_offsets, q_max, k_max, dropout, causal, seed, offset, scale):
    assert dropout == 0 and lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous()
    assert lse.dtype == torch.float32 and len({t.dtype for t in (grad, q, k, v, out)}) == 1
    dtype, (grad, q, k, v, out) = q.dtype, (t.float() for t in (grad, q, k, v, out))
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    for rows, keys in segments(q_offsets, k_offsets, q_max, k_max):
        weights = (scores(q[rows], k[keys], causal, scale) - lse[:, rows, None]).exp()
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


@pytest.fixture(scope="module", autouse=True)
def flash_operators_on_cpu():
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", lambda *a, scale=None: varlen_forward(*a, scale=scale), "CPU")
    library.impl("_flash_attention_backward", lambda *a, scale=None: varlen_backward(*a, scale=scale), "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_variable_length_calls_equal_dense(rule, kv_heads, dtype):
    mask = token_mask(PACKS, SIZE, rule)
    region = region_of(mask)
    generator = torch.Generator().manual_seed(kv_heads)
    shapes = [(SIZE, 2, n, 16) for n in (4, kv_heads, kv_heads, 4)]
    *inputs, grad = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    out, lse = flash._forward_varlen(*inputs, region, 0.25)
    got = out, *flash._backward_varlen(grad, *inputs, out, lse, region, 0.25)
    exact = [t.float().requires_grad_() for t in inputs]
    expected = dense_attention(*exact, mask, 0.25)
    for a, b in zip(got, (expected, *torch.autograd.grad(expected, exact, grad.float())), strict=True):
        assert a.dtype == dtype
        within = (
            1e-5 if dtype == torch.float32 else 2**-7 * float(b.detach().abs().max())
        )  # two roundings of the largest
        torch.testing.assert_close(a.float(), b, atol=within, rtol=1e-5 if dtype == torch.float32 else 0)


@pytest.mark.parametrize(("queries", "keys"), [((32, 96), (0, 64)), ((0, 64), (32, 128)), ((64, 128), (0, 64))])
def test_rectangles(queries, keys):
    """Against the route of single segments, on parts of a pack: some queries see nothing there."""
    region = region_of(token_mask(PACKS, SIZE), queries, keys)
    generator = torch.Generator().manual_seed(1)
    rows, columns = region.shape
    q, k, v, grad = (torch.randn(n, 2, h, 16, generator=generator) for n, h in ((rows, 4), (columns, 2)) * 2)
    v, grad = torch.randn(columns, 2, 2, 16, generator=generator), torch.randn(rows, 2, 4, 16, generator=generator)
    got, expected = ([f(q, k, v, region, 0.25)] for f in (flash._forward_varlen, flash._forward_segments))
    for route, backward in ((got, flash._backward_varlen), (expected, flash._backward_segments)):
        out, lse = route[0]
        route.append(backward(grad, q, k, v, out, lse, region, 0.25))
    for a, b in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
