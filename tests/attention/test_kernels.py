"""Every kernel against the dense oracle, forward and gradients, on packs of every shape and all visual rules."""

from __future__ import annotations

import sys
import types
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from molmo2_nemo.attention import blocks, kernels
from molmo2_nemo.attention.dense import dense_attention
from molmo2_nemo.attention.kernels import attend, choose
from molmo2_nemo.attention.regions import region_of
from molmo2_nemo.compat import fits
from molmo2_nemo.cost.efficiency import EFFICIENCIES, SAME_EFFICIENCY
from molmo2_nemo.errors import UserError
from molmo2_nemo.fused import choice, varlen
from molmo2_nemo.model.config import CANNOT_MERGE, AttentionKernel, preset
from molmo2_nemo.plan.search import efficiency_of
from molmo2_nemo.settings.run import ModelSelection, RunConfig
from tests.attention.test_regions import packs, rules
from tests.support.allocations import Allocations
from tests.support.trees import RULES, Tree, mixed_pack, token_mask

SIZE, HEAD = 96, 16
KERNELS = ("flash", "blocks")
VIDEO = [Tree((2, *[3] * 7), (8,) * 7, (1, 4)), Tree((3, 0), (12,))]
FIFTY = [Tree((4, 2), (20,), (1,) * 50)]


def tensors(heads: int, kv_heads: int, packs: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(heads * 10 + kv_heads)
    shapes = [(SIZE, packs, n, HEAD) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def run(function, q, k, v, grad):
    q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
    out = function(q, k, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that packs of this size have skipped, masked and full tiles."""
    torch.set_num_threads(1)
    monkeypatch.setattr(blocks, "QUERIES", 16)
    monkeypatch.setattr(blocks, "KEYS", 16)
    monkeypatch.setattr(blocks, "LONGEST", 32)


def test_every_kernel_is_named_in_the_settings_the_costs_and_the_plan():
    assert set(get_args(AttentionKernel)) == set(kernels.NAMES)
    known = set(EFFICIENCIES) | set(SAME_EFFICIENCY)
    for name, module in kernels.KERNELS.items():
        assert module.implementation("cpu")[0] in known
        assert hasattr(module, "backward") == (name not in CANNOT_MERGE)
        cfg = RunConfig(model=ModelSelection(attention=name))
        assert efficiency_of(cfg, preset("8b"))[1] in EFFICIENCIES.values()


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_equal_dense(name, small_tiles):
    @settings(max_examples=40, deadline=None)
    @given(packs, rules, st.sampled_from([(4, 4), (4, 2), (2, 1)]))
    @example([VIDEO, FIFTY], "image_tokens", (4, 2))
    @example([VIDEO, FIFTY], "within_image", (4, 1))
    @example([[]], "image_tokens", (2, 2))  # nothing but padding
    def check(trees, rule, heads):
        mask = token_mask(trees, SIZE, rule)
        q, k, v, grad = tensors(*heads, len(trees))
        kernel = choose(name, "cpu", torch.float32, HEAD)
        got = run(lambda q, k, v: attend(q, k, v, region_of(mask), 0.25, kernel), q, k, v, grad)
        expected = run(lambda q, k, v: dense_attention(q, k, v, mask, 0.25), q, k, v, grad)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    check()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", KERNELS)
def test_bf16_within_its_rounding(name, rule):
    """No further from the exact result of the same bf16 inputs than twice what rounding that result to bf16 costs the
    dense oracle (which computes in fp32), relative to the largest element."""
    mask = token_mask([VIDEO, FIFTY], SIZE, rule)
    q, k, v, grad = tensors(4, 2, 2, torch.bfloat16)
    kernel = choose(name, "cpu", torch.bfloat16, HEAD)
    got = run(lambda q, k, v: attend(q, k, v, region_of(mask), 0.25, kernel), q, k, v, grad)
    exact = run(lambda q, k, v: dense_attention(q, k, v, mask, 0.25), *(t.double().float() for t in (q, k, v, grad)))
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == torch.bfloat16
        rounding = 2**-8 * b.abs().max()  # half a unit in the last of 8 places
        assert (a.float() - b).abs().max() <= 2 * rounding


@pytest.mark.parametrize("name", KERNELS)
def test_bf16_of_longer_packs(name):
    """The same bound where hundreds of queries of four heads add to a key's gradient: PyTorch's CPU flash kernel adds
    them up in the dtype of its inputs, which in bf16 is wrong by three roundings here and by more with every token."""
    mask = token_mask([mixed_pack(np.random.default_rng(3), 512)], 512)
    generator = torch.Generator().manual_seed(0)
    shapes = [(512, 1, n, 64) for n in (8, 2, 2, 8)]
    q, k, v, grad = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    kernel = choose(name, "cpu", torch.bfloat16, 64)
    got = run(lambda q, k, v: attend(q, k, v, region_of(mask), 0.125, kernel), q, k, v, grad)
    exact = run(lambda q, k, v: dense_attention(q, k, v, mask, 0.125), *(t.float() for t in (q, k, v, grad)))
    for a, b in zip(got, exact, strict=True):
        assert (a.float() - b).abs().max() <= 2 * 2**-8 * b.abs().max()


@pytest.mark.parametrize("name", KERNELS)
def test_double_precision(name):
    mask = token_mask([VIDEO], SIZE)
    q, k, v, grad = tensors(4, 2, 1, torch.float64)
    kernel = choose(name, "cpu", torch.float64, HEAD)
    out, lse = kernel.forward(q, k, v, region_of(mask), 0.25)
    scores = torch.einsum("qbnh,kbnh->bnqk", q, k.repeat_interleave(2, 2)) * 0.25
    scores = scores.masked_fill(~mask.rows(0, SIZE)[:, None], -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1).permute(2, 0, 1), atol=1e-12, rtol=1e-12)
    expected = torch.einsum("bnqk,kbnh->qbnh", scores.softmax(-1), v.repeat_interleave(2, 2))
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", KERNELS)
def test_areas_merge_as_in_ring_attention(name, rule):
    """Four chunks of keys for four chunks of queries: outputs merge by log-sum-exp, gradients add up."""
    mask = token_mask([VIDEO, FIFTY], SIZE, rule)
    q, k, v, grad = tensors(4, 2, 2)
    kernel = choose(name, "cpu", torch.float32, HEAD, merged=True)
    expected = run(lambda q, k, v: dense_attention(q, k, v, mask, 0.25), q, k, v, grad)
    chunks = [(i, i + SIZE // 4) for i in range(0, SIZE, SIZE // 4)]
    got = [torch.zeros_like(t) for t in (q, q, k, v)]
    for rows in chunks:
        mine = slice(*rows)
        parts = [kernel.forward(q[mine], k[slice(*c)], v[slice(*c)], region_of(mask, rows, c), 0.25) for c in chunks]
        lses = torch.stack([lse for _, lse in parts])
        lse = lses.logsumexp(0)
        out = sum((part_lse - lse).exp()[..., None] * out for out, part_lse in parts)
        got[0][mine] = out
        for c in chunks:
            keys = slice(*c)
            region = region_of(mask, rows, c)
            grads = kernel.backward(grad[mine], q[mine], k[keys], v[keys], out, lse, region, 0.25)
            for total, where, part in zip(got[1:], (mine, keys, keys), grads, strict=True):
                total[where] += part
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_queries_that_see_nothing(name):
    """Keys of the second example only: queries of the first have output 0, log-sum-exp -inf and no gradient."""
    mask = token_mask([[Tree((48,)), Tree((48,))]], SIZE)
    q, k, v, grad = tensors(2, 2, 1)
    kernel = choose(name, "cpu", torch.float32, HEAD)
    region = region_of(mask, (0, SIZE), (48, SIZE))
    out, lse = kernel.forward(q, k[48:], v[48:], region, 0.25)
    assert (out[:48] == 0).all() and (lse[:48] == -torch.inf).all() and lse[48:].isfinite().all()
    dq, dk, dv = kernel.backward(grad, q, k[48:], v[48:], out, lse, region, 0.25)
    assert (dq[:48] == 0).all() and all(t.isfinite().all() for t in (dq, dk, dv))


def test_auto_is_flash_on_cpu_and_cuda_bf16():
    assert choose("auto", "cpu", torch.float32, 32).name == "flash"
    assert choose("auto", "mps", torch.float32, 32).name == "blocks"
    assert choose("auto", "cuda", torch.float32, 128).name == "blocks"


@pytest.mark.parametrize(
    ("name", "device", "dtype", "head", "merged", "message"),
    [
        ("flesh", "cpu", torch.float32, 32, False, "did you mean 'flash'?"),
        ("flex", "cpu", torch.float32, 32, False, "no backward pass on cpu; use auto or one of: flash, blocks"),
        ("flash", "cuda", torch.float32, 32, False, "takes fp16 and bf16, not torch.float32"),
        ("flash", "cuda", torch.bfloat16, 320, False, "multiples of 8 up to 256, not 320; use auto or one of: "),
        ("flash", "mps", torch.bfloat16, 64, False, "no flash attention for mps; use auto or one of: blocks"),
    ],
)
def test_a_kernel_that_cannot_run_here_is_refused(name, device, dtype, head, merged, message):
    with pytest.raises(UserError) as error:
        choose(name, device, dtype, head, merged=merged)
    assert message in str(error.value) and f"model.attention={name}" in str(error.value)


def test_flex_without_triton_and_for_merged_results(monkeypatch):
    from molmo2_nemo.attention import flex

    monkeypatch.setattr(flex, "is_installed", lambda module: False)
    with pytest.raises(UserError, match="needs the triton package, which is not installed; use auto or one of: flash"):
        choose("flex", "cuda", torch.bfloat16, 64)
    monkeypatch.setattr(flex, "is_installed", lambda module: True)
    if fits(torch.__version__, "<2.9"):
        with pytest.raises(UserError, match="has no FlexAttention, or one before 2.9; use auto or one of: flash"):
            choose("flex", "cuda", torch.bfloat16, 64)
        return
    with pytest.raises(UserError, match="cannot merge results .* use auto or one of: flash, blocks"):
        choose("flex", "cuda", torch.bfloat16, 64, merged=True)
    assert choose("flex", "cuda", torch.bfloat16, 64).backward is None


BOTH = {"flash_attn_interface", "flash_attn.cute"}
FA2 = f"FlashAttention-2 of PyTorch {torch.__version__}"
FA3, FA4 = "FlashAttention-3 (module flash_attn_interface)", "FlashAttention-4 (module flash_attn.cute)"


@pytest.mark.parametrize(
    ("major", "installed", "broken", "wanted", "expected", "reason"),
    [
        (9, BOTH, set(), "auto", FA3, None),
        (10, BOTH, set(), "auto", FA4, "not fa3: it is for Hopper GPUs; this one is 10.x"),
        (
            8,
            BOTH,
            set(),
            "auto",
            FA2,
            "not fa3: it is for Hopper GPUs; this one is 8.x; not fa4: it is for Hopper and Bl",
        ),
        (9, set(), set(), "auto", FA2, "flash_attn_interface is not installed; not fa4: flash_attn.cute is not"),
        (
            9,
            {"flash_attn_interface"},
            {"FA3"},
            "auto",
            FA2,
            "flash_attn_interface is installed but does not work: FA3",
        ),
        (9, BOTH, {"FA3"}, "auto", FA4, "not fa3: flash_attn_interface is installed but does not work"),
        (9, {"flash_attn.cute"}, {"FA4"}, "auto", FA2, "flash_attn.cute is installed but has no _flash_attn_bwd"),
        (9, BOTH, set(), "fa4", FA4, None),
        (9, BOTH, set(), "fa2", FA2, None),
        (9, BOTH, set(), "plain", FA2, None),
    ],
)
def test_which_flash_a_gpu_gets_is_said(monkeypatch, major, installed, broken, wanted, expected, reason):
    """The choice among installed libraries; what they then do is for tests/gpu."""
    active: list[str | None] = [None]

    def activate(name: str) -> None:
        if name in broken:
            raise RuntimeError(f"{name} has no fwd\nand more")
        active.append(name)

    monkeypatch.setattr(varlen, "capability", lambda: major)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate, raising=False)  # absent in 2.6
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda: active.append(None), raising=False)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: active[-1], raising=False)
    monkeypatch.setattr(varlen, "is_installed", lambda module: module in installed)
    interface = types.ModuleType("flash_attn.cute.interface")
    for name in ("_flash_attn_fwd", "_flash_attn_bwd")[: 1 if "FA4" in broken else 2]:
        setattr(interface, name, print)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    caches = varlen._fa3_activation_problem, varlen._fa4_import_problem, varlen._fa4
    for cached in caches:
        cached.cache_clear()
    try:
        taken = choice.choose("flash", wanted, "cuda", torch.bfloat16)
        assert active[-1] is None  # tried, but not in place before it is chosen
        for _ in range(2):
            kernel = choose("auto", "cuda", torch.bfloat16, 128, library=taken.function)
        assert kernel.name == "flash" and kernel.title == expected
        assert kernel.title.startswith(f"FlashAttention-{kernel.implementation.removeprefix('flash')} ")
        assert active[-1] == ("FA3" if expected == FA3 else None)  # FlashAttention-4 is called itself
        assert (taken.fell_back is None) == (reason is None) and (reason or "") in (taken.fell_back or "")
    finally:
        for cached in caches:
            cached.cache_clear()


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "message"),
    [
        ("fa3", "cuda", torch.bfloat16, "it is for Hopper GPUs; this one is 8.x; use auto or one of: plain, fa2"),
        ("fa3", "cpu", torch.float32, "it is for GPUs, not for cpu; use auto or one of: plain"),
        ("cudnn", "cuda", torch.float32, "it takes fp16 and bf16, not torch.float32 (cluster.precision=bf16)"),
        ("fa5", "cuda", torch.bfloat16, "no such way; did you mean"),
    ],
)
def test_a_library_that_cannot_run_is_refused(monkeypatch, wanted, device, dtype, message):
    monkeypatch.setattr(varlen, "capability", lambda: 8)
    with pytest.raises(UserError) as error:
        choice.choose("flash", wanted, device, dtype)
    assert message in str(error.value) and f"kernels.flash={wanted}" in str(error.value)


@pytest.mark.parametrize("name", KERNELS)
def test_memory_grows_with_the_tokens_not_their_square(name):
    peaks, largest = [], []
    kernel = choose(name, "cpu", torch.float32, HEAD)
    for size in (128, 512):
        mask = token_mask([[Tree((size // 2, 8), (size // 4,), (4, size // 4 - 12))]], size)
        q, k, v = (torch.randn(size, 1, 2, HEAD, requires_grad=True) for _ in range(3))
        with Allocations() as allocations:
            attend(q, k, v, region_of(mask), 0.25, kernel).sum().backward()
        peaks.append(allocations.peak)
        largest.append(allocations.largest[0])
    assert peaks[1] <= 4.1 * peaks[0]
    assert largest[1] <= 512 * 2 * HEAD * 2  # rows of q, or two of them


def test_a_kernel_that_auto_takes_in_place_of_flash_says_why():
    said = choose("auto", "cuda", torch.float32, 128)
    assert said.name == "blocks" and "not flash: flash attention on CUDA takes fp16 and bf16" in said.title
    assert "cluster.precision=bf16" in said.title
    assert "not flash" not in choose("auto", "cpu", torch.float32, 128).title
    assert "not flash" not in choose("blocks", "cuda", torch.float32, 128).title  # asked for
