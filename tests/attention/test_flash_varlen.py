"""The CUDA route of the flash kernel on CPU: its variable-length calls, gathers, merges and sums against the oracle.

PyTorch has the operators for CUDA only. Here they are given a CPU implementation that does what they promise
(tests/support/varlen_oracle.py), in the layouts of every library; all else is the code that runs on a GPU. What the
calls hand over is also checked on fake CUDA tensors, which have devices, dtypes and shapes.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from molmo2_nemo.attention import flash, flex
from molmo2_nemo.attention.dense import dense_attention
from molmo2_nemo.attention.regions import region_of
from molmo2_nemo.fused import merge, varlen
from tests.attention.test_regions import packs, rules
from tests.support.trees import RULES, Tree, long_video_pack, mixed_pack, token_mask
from tests.support.varlen_oracle import LIBRARIES, operators_on_cpu

SIZE = 128
PACKS = [
    [Tree((2, *[3] * 4), (8,) * 4, (1, 4)), Tree((3, 0), (12,)), Tree((9,))],
    [Tree((4, 2), (20,), (1,) * 30), Tree((1, 1), (17,), (6, 2, 9), pictures_in_branches=True)],
]
MERGINGS = {"plain": merge.PLAIN, "compiled": merge.COMPILED}


@pytest.fixture(params=LIBRARIES)
def library(request):
    with operators_on_cpu(request.param) as chosen:
        yield chosen


def attend(library, merging, inputs, grad, region):
    out, lse = flash._forward_varlen(*inputs, region, 0.25, library, merging)
    return out, lse, *flash._backward_varlen(grad, *inputs, out, lse, region, 0.25, library, merging)


def tensors(size: int, heads: int, kv_heads: int, packs: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(kv_heads)
    shapes = [(size, packs, n, 16) for n in (heads, kv_heads, kv_heads, heads)]
    *inputs, grad = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return inputs, grad


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_variable_length_calls_equal_dense(library, rule, kv_heads, dtype):
    mask = token_mask(PACKS, SIZE, rule)
    inputs, grad = tensors(SIZE, 4, kv_heads, 2, dtype)
    got = attend(library, merge.PLAIN, inputs, grad, region_of(mask))
    exact = [t.float().requires_grad_() for t in inputs]
    expected = dense_attention(*exact, mask, 0.25)
    assert got[1].dtype == torch.float32
    for a, b in zip((got[0], *got[2:]), (expected, *torch.autograd.grad(expected, exact, grad.float())), strict=True):
        assert a.dtype == dtype
        # two roundings of the largest
        within = 1e-5 if dtype == torch.float32 else 2**-7 * float(b.detach().abs().max())
        torch.testing.assert_close(a.float(), b, atol=within, rtol=1e-5 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("name", LIBRARIES)
def test_random_trees(name):
    with operators_on_cpu(name) as library:

        @settings(max_examples=25, deadline=None)
        @given(packs, rules, st.sampled_from([(4, 4), (4, 2), (2, 1)]))
        def check(trees, rule, heads):
            mask = token_mask(trees, 96, rule)
            inputs, grad = tensors(96, *heads, len(trees))
            out, _, *grads = attend(library, merge.PLAIN, inputs, grad, region_of(mask))
            exact = [t.clone().requires_grad_() for t in inputs]
            expected = dense_attention(*exact, mask, 0.25)
            for a, b in zip((out, *grads), (expected, *torch.autograd.grad(expected, exact, grad)), strict=True):
                torch.testing.assert_close(a, b.detach(), atol=1e-5, rtol=1e-5)

        check()


@pytest.mark.parametrize(("queries", "keys"), [((32, 96), (0, 64)), ((0, 64), (32, 128)), ((64, 128), (0, 64))])
@pytest.mark.parametrize("merging", MERGINGS)
def test_rectangles(library, merging, queries, keys):
    """Against the route of single segments, on parts of a pack: some queries see nothing there."""
    if merging == "compiled" and shutil.which("g++") is None:
        pytest.skip("torch.compile on CPU needs g++")
    region = region_of(token_mask(PACKS, SIZE), queries, keys)
    generator = torch.Generator().manual_seed(1)
    rows, columns = region.shape
    q, grad = (torch.randn(rows, 2, 4, 16, generator=generator) for _ in range(2))
    k, v = (torch.randn(columns, 2, 2, 16, generator=generator) for _ in range(2))
    got = attend(library, MERGINGS[merging], (q, k, v), grad, region)
    out, lse = flash._forward_segments(q, k, v, region, 0.25)
    expected = out, lse, *flash._backward_segments(grad, q, k, v, out, lse, region, 0.25)
    assert (lse == -torch.inf).any()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_nothing_to_see():
    """A region in which no query sees any key makes no call."""
    region = region_of(token_mask([[Tree((64,)), Tree((64,))]], SIZE), (0, 64), (64, 128))
    assert flash.calls(region, torch.device("cpu")) == []
    inputs, grad = tensors(64, 4, 2, 1)
    out, lse, *grads = attend(varlen.PLAIN, merge.PLAIN, inputs, grad, region)
    assert not out.any() and (lse == -torch.inf).all() and not any(t.any() for t in grads)


def fewest_calls(region) -> int:
    """A call is causal or not, and has a token once as a query and once as a key: no fewer calls than the token that is
    in most segments needs, of each kind."""
    total = 0
    for causal in (False, True):
        most = np.zeros((2, len(region.mask.example_ids), max(region.shape)), np.int64)
        for segment in region.segments:
            if causal == (segment.kind != "full"):
                most[0, segment.pack, segment.queries] += 1
                most[1, segment.pack, segment.keys] += 1
        total += most.max()
    return int(total)


@pytest.mark.parametrize("rule", RULES)
def test_calls_are_as_few_as_can_be(rule):
    """In packs of stage 2 and of stage 3, and in two of them together: three, two where nothing is seen later."""
    rng = np.random.default_rng(0)
    stages = [[mixed_pack(rng, 16384)], [mixed_pack(rng, 4096), mixed_pack(rng, 4096)], [long_video_pack(36864, 384)]]
    for trees, size in zip(stages, (16384, 4096, 36864), strict=True):
        region = region_of(token_mask(trees, size, rule))
        groups = flash.group_segments(region)
        assert len(groups) == fewest_calls(region) == (2 if rule == "none" else 3)
        assert sum(map(len, groups)) == len(region.segments)


def test_a_gather_is_shared_where_places_are_the_same():
    """Causal calls of several packs gather queries and keys at the same places and share their offsets."""
    causal, full, _ = flash.calls(region_of(token_mask(PACKS, SIZE)), torch.device("cpu"))
    assert causal.lengths.causal and causal.queries is not None and causal.queries is causal.keys
    assert causal.lengths.query_offsets is causal.lengths.key_offsets
    assert not full.lengths.causal and full.queries is not full.keys


@pytest.fixture
def fake_cuda(monkeypatch):
    """Tensors that are said to be on a GPU. They know of no pinned memory."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize("name", ["flash", "cudnn"])
@pytest.mark.parametrize("packs", [1, 2])
def test_fake_cuda_tensors(fake_cuda, name, packs):
    """Shapes, dtypes and devices through the whole route, on tensors that are said to be on a GPU; nothing is copied to
    the host, which a fake tensor would refuse."""
    mask = token_mask(PACKS[:packs], SIZE)
    region = region_of(mask)
    region.segments  # noqa: B018 - on the host, as `plan` does
    library = varlen.PLAIN if name == "flash" else varlen.CUDNN
    registered = torch.library.Library("aten", "IMPL")
    seen = []

    def forward(q, k, v, bias, q_offsets, k_offsets, *rest, scale=None):
        seen.append({t.device.type for t in (q, k, v, q_offsets, k_offsets)})
        lse, unused = q.new_empty(*q.shape[:2], 1, dtype=torch.float32), q.new_empty((), dtype=torch.int64)
        return torch.empty_like(q), lse, q_offsets, k_offsets, *rest[:2], unused, unused, unused

    def backward(grad, q, k, v, out, lse, seed, offset, bias, q_offsets, k_offsets, *rest, scale=None):
        seen.append({t.device.type for t in (grad, q, k, v, out, lse, seed, q_offsets, k_offsets)})
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    registered.impl("_cudnn_attention_forward", forward, "Meta")
    registered.impl("_cudnn_attention_backward", backward, "Meta")
    try:
        with fake_cuda:
            q, grad = (torch.empty(SIZE, packs, 4, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
            k, v = (torch.empty(SIZE, packs, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
            out, lse = flash.forward(q, k, v, region, 0.1, library)
            grads = flash.backward(grad, q, k, v, out, lse, region, 0.1, library)
    finally:
        registered._destroy()
        varlen.HEADS_FIRST.clear()
    assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
    for got, like in zip((out, *grads), (q, q, k, v), strict=True):
        assert got.shape == like.shape and got.dtype == torch.bfloat16 and got.device.type == "cuda"
    assert lse.device.type == "cuda"
    assert len(seen) == (6 if name == "cudnn" else 0)


def test_flex_lists_of_fake_cuda_tensors(fake_cuda):
    """FlexAttention's block lists go where the queries are."""
    region = region_of(token_mask(PACKS, SIZE))
    with fake_cuda:
        blocks = flex.block_mask(region, torch.device("cuda", 0))
        lists = [blocks.kv_num_blocks, blocks.kv_indices, blocks.full_q_num_blocks, blocks.full_q_indices]
        assert {t.device.type for t in lists} == {"cuda"} and {t.dtype for t in lists} == {torch.int32}


def test_cudnn_refuses_what_its_offsets_cannot_hold():
    with FakeTensorMode():
        x = torch.empty(2**22, 8, 128, dtype=torch.bfloat16, device="cuda")
        with pytest.raises(ValueError, match="kernels.flash=cudnn takes at most 2147483647 elements"):
            varlen._check_offsets(x)
