"""The kernels on a CUDA device, flash with every library that is there, against the dense oracle computed in fp32 on
the same inputs; and attention's results kept outside recomputation."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint

from molmo2_nemo.attention.dense import dense_attention
from molmo2_nemo.attention.kept import KeptResults, slot_of
from molmo2_nemo.attention.kernels import Kernel, attend, choose
from molmo2_nemo.attention.regions import region_of
from molmo2_nemo.fused import choice
from tests.support.trees import Tree, long_video_pack, token_mask

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PACKS = [
    [Tree((2, *[3] * 7), (83,) * 7, (60, 1, 130)), Tree((90, 0), (200,)), Tree((4, 2), (150,), (1,) * 50)],
    [Tree((1, 5, 5, 40), (410, 752, 300)), Tree((700,))],
]


def close(got: torch.Tensor, exact: torch.Tensor, times: float = 3.0) -> None:
    """Within a few bf16 roundings of the largest element; fp32: 1e-4, as TF32 is off."""
    unit = 2**-8 if got.dtype == torch.bfloat16 else 1e-4
    assert (got.float() - exact).abs().max() <= times * unit * exact.abs().max()


LIBRARIES = ("fa2", "fa3", "fa4", "cudnn")
MERGINGS = ("plain", "compiled")


def kernel_called(name: str, dtype: torch.dtype, **options: bool) -> Kernel:
    """A kernel such as "flex" or "flash[fa3, compiled]"; skips the test with the reason where it is not to be had."""
    name, _, ways = name.rstrip("]").partition("[")
    library, merging = ways.split(", ") if ways else ("plain", "plain")
    for piece, way in (("flash", library), ("merge", merging)):
        problem = choice.PIECES[piece][way].problem("cuda", dtype)
        if problem is not None:
            pytest.skip(f"kernels.{piece}={way}: {problem}")
    found = {
        piece: choice.choose(piece, way, "cuda", dtype).function
        for piece, way in (("flash", library), ("merge", merging))
    }
    return choose(name, "cuda", dtype, 128, library=found["flash"], merging=found["merge"], **options)


@pytest.mark.parametrize("rule", ["image_tokens", "within_image", "none"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((f"flash[{library}, {merging}]", torch.bfloat16) for library in LIBRARIES for merging in MERGINGS),
        ("flex", torch.bfloat16),
        ("flex", torch.float32),
        ("blocks", torch.bfloat16),
        ("blocks", torch.float32),
    ],
)
def test_kernels_equal_dense(name, dtype, rule):
    size = 2048
    mask = token_mask(PACKS, size, rule, "cuda")
    generator = torch.Generator().manual_seed(0)
    shapes = [(size, 2, n, 128) for n in (4, 2, 2, 4)]
    q, k, v, grad = (torch.randn(s, generator=generator).to("cuda", dtype) for s in shapes)
    found = []
    kernel = kernel_called(name, dtype)
    for run, inputs in (
        (lambda q, k, v: attend(q, k, v, region_of(mask), 0.1, kernel), (q, k, v)),
        (lambda q, k, v: dense_attention(q, k, v, mask, 0.1), (q.float(), k.float(), v.float())),
    ):
        inputs = tuple(t.clone().requires_grad_() for t in inputs)
        out = run(*inputs)
        found.append((out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))))
    for got, exact in zip(*found, strict=True):
        close(got, exact)


@pytest.mark.parametrize("name", [*(f"flash[{library}, compiled]" for library in LIBRARIES), "blocks"])
def test_areas_merge(name):
    """Two chunks of keys for two chunks of queries, as ring attention does it."""
    size, half = 2048, 1024
    mask = token_mask(PACKS, size, "image_tokens", "cuda")
    generator = torch.Generator().manual_seed(0)
    shapes = [(size, 2, n, 128) for n in (4, 2, 2, 4)]
    q, k, v, grad = (torch.randn(s, generator=generator).to("cuda", torch.bfloat16) for s in shapes)
    kernel = kernel_called(name, torch.bfloat16, merged=True)
    exact_inputs = tuple(t.float().requires_grad_() for t in (q, k, v))
    exact = dense_attention(*exact_inputs, mask, 0.1)
    exact_grads = torch.autograd.grad(exact, exact_inputs, grad.float())
    sums = [torch.zeros_like(t, dtype=torch.float32) for t in (q, k, v)]
    chunks = [(0, half), (half, size)]
    for rows in chunks:
        mine = slice(*rows)
        parts = [kernel.forward(q[mine], k[slice(*c)], v[slice(*c)], region_of(mask, rows, c), 0.1) for c in chunks]
        lse = torch.logaddexp(parts[0][1], parts[1][1])
        out = sum((part_lse - lse).exp()[..., None] * part.float() for part, part_lse in parts).to(q.dtype)
        close(out, exact[mine].detach())
        for c in chunks:
            keys = slice(*c)
            region = region_of(mask, rows, c)
            grads = kernel.backward(grad[mine], q[mine], k[keys], v[keys], out, lse, region, 0.1)
            for total, where, part in zip(sums, (mine, keys, keys), grads, strict=True):
                total[where] += part
    for got, expected in zip(sums, exact_grads, strict=True):
        close(got.bfloat16(), expected, 6)


def test_flash_memory_is_linear():
    """Four times the tokens of one video take at most four times the memory."""
    peaks = []
    kernel = choose("flash", "cuda", torch.bfloat16, 128)
    for size in (9216, 36864):
        mask = token_mask([long_video_pack(size, 384 * size // 36864)], device="cuda")
        q, k, v = (torch.randn(size, 1, n, 128, device="cuda", dtype=torch.bfloat16) for n in (4, 1, 1))
        q.requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attend(q, k, v, region_of(mask), 0.1, kernel).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 4.2 * peaks[0]


def test_forward_and_backward_do_not_wait_for_the_device():
    """The plan comes from the host's arrays: nothing synchronises."""
    mask = token_mask(PACKS, 2048, "image_tokens", "cuda")
    kernel = choose("flash", "cuda", torch.bfloat16, 128)
    q = torch.randn(2048, 2, 4, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    attend(q, q, q, region_of(mask), 0.1, kernel).sum().backward()  # whatever is set up once
    mask = token_mask(PACKS, 2048, "image_tokens", "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(q, q, q, region_of(mask), 0.1, kernel).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", [f"flash[{library}, compiled]" for library in LIBRARIES])
def test_kept_results_are_those_of_a_second_run(name):
    """In a reentrant checkpoint, as Megatron's: the same bits with kept results as with a kernel that runs again, where
    the kernel adds up in the same order, and random numbers behind attention that no kernel has moved on."""
    kernel = kernel_called(name, torch.bfloat16)
    mask = token_mask(PACKS, 2048, "image_tokens", "cuda")
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2048, 2, n, 128, generator=generator).to("cuda", torch.bfloat16) for n in (4, 2, 2, 4))

    def step(kept: KeptResults | None) -> tuple[torch.Tensor, ...]:
        inputs = tuple(t.clone().requires_grad_() for t in (q, k, v))

        def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = attend(q, k, v, region_of(mask), 0.1, kernel, slot_of(kept, "layer"))
            return torch.nn.functional.dropout(out, 0.5)

        torch.cuda.manual_seed(3)
        out = torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=True)
        out.backward(grad)
        return out.detach(), *(t.grad for t in inputs)

    kept = KeptResults()
    again, given = step(None), step(kept)
    assert len(kept) == 0 and torch.equal(again[0], given[0])
    for a, b in zip(again[1:], given[1:], strict=True):  # backward adds up by atomics: the last bit may differ
        close(b, a.float(), 1.0)
