"""Attention of a pack that 2, 4 or 8 ranks share equals the dense oracle on one: every split of the ranks, both ways of
exchanging keys, 8 and 2 key heads, forward and gradients, consecutive tokens on each rank and runs dealt out."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from molmo2_nemo.attention.dense import dense_attention
from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.attention.ring import visible_keys
from molmo2_nemo.cost.traffic import AttentionShape, context_traffic
from tests.support.light import run_light
from tests.support.packs import random_mask_data
from tests.support.traffic import Counter, exact

torch.set_num_threads(1)
SIZE, PACKS, HEADS, SCALE = 96, 2, 8, 0.3
# ranks that share a pack, Ulysses ranks of them, exchange, key heads, visual attention, tokens dealt out
CASES = [
    (size, ulysses, exchange, kv_heads, ("image_tokens", "within_image", "none")[(n + kv_heads) % 3], dealt)
    for n, (size, ulysses, exchange, *dealt) in enumerate(
        [
            (2, 2, "ring"),
            (2, 1, "ring"),
            (2, 1, "all_gather"),
            (4, 4, "ring"),
            (4, 2, "ring"),
            (4, 2, "all_gather"),
            (4, 1, "ring"),
            (8, 8, "ring"),
            (8, 4, "ring"),
            (8, 2, "all_gather"),
            (8, 2, "ring"),
            (8, 1, "ring"),
            (2, 1, "ring", True),
            (4, 1, "all_gather", True),
            (4, 1, "ring", True),
            (8, 2, "ring", True),
            (8, 1, "ring", True),
        ]
    )
    for kv_heads in (8, 2)
]


def case_id(case: tuple) -> str:
    size, ulysses, exchange, kv_heads, _, dealt = case
    return f"{size} ranks, {ulysses} x {size // ulysses} {exchange}, {kv_heads} heads{', dealt' * bool(dealt)}"


def random_mask(seed: int, visual_attention: str) -> TokenMask:
    """Random message trees; pictures are numbered in their order, as the model numbers them."""
    data = random_mask_data(np.random.default_rng(seed), PACKS, SIZE)
    block = data["visual_block"]
    new = (block > 0) & (block != np.pad(block, ((0, 0), (1, 0)))[:, :-1])
    data["visual_block"] = np.cumsum(new, axis=1) * (block > 0)
    return TokenMask(**{k: torch.from_numpy(v) for k, v in data.items()}, visual_attention=visual_attention)


def problem(case: tuple) -> tuple[TokenMask, list[torch.Tensor], torch.Tensor]:
    """The mask, q, k, v and the gradient of the output, alike in every process; none of the pack is padding-free."""
    kv_heads, visual_attention, dealt = case[3:]
    seed = CASES.index(case)
    mask = random_mask(seed, visual_attention)
    if dealt:  # three tokens at a time, so that a rank's are in many runs
        runs = np.random.default_rng(seed).permutation(SIZE // 3).reshape(case[0] // case[1], -1)
        mask.order = (np.sort(runs)[..., None] * 3 + np.arange(3)).ravel()
    generator = torch.Generator().manual_seed(seed)
    shapes = [(SIZE, PACKS, heads, 8) for heads in (HEADS, kv_heads, kv_heads, HEADS)]
    *qkv, grad = (torch.randn(s, generator=generator) for s in shapes)
    grad[(mask.example_ids < 0).T] = 0  # nothing depends on what padding attends to
    return mask, qkv, grad


def order_of(mask: TokenMask) -> np.ndarray:
    return np.arange(SIZE) if mask.order is None else mask.order


def across_job() -> tuple[list[list[torch.Tensor]], list[tuple]]:
    """On 8 ranks, case by case: output and gradients of this rank's tokens, and what it sent (messages and bytes,
    forward and backward; its place among the ranks that exchange keys). Smaller sizes run on all aligned blocks.
    Without the garbage collector, nothing of what was planned for a case is left after it."""
    from molmo2_nemo.attention.across import attend_across
    from molmo2_nemo.attention.kernels import choose
    from molmo2_nemo.parallel.context import ContextSettings, block_groups, group_rank

    found, sent, ready, counter = [], [], {}, Counter()
    gc.disable()
    kept: list[weakref.ref] = []  # masks of cases that are over
    for case in CASES:
        size, ulysses, exchange = case[:3]
        groups = block_groups(size, list(range(8)), 1, ContextSettings(ulysses, exchange), ready)
        mask, qkv, grad = problem(case)
        mine = order_of(mask).reshape(size, -1)[groups.rank]
        q, k, v = (t[mine].clone().requires_grad_() for t in qkv)
        kernel = choose("auto", "cpu", q.dtype, 8, merged=True)
        counter.take()
        out = attend_across(q, k, v, mask, SCALE, kernel, groups)
        forward = counter.take()
        out.backward(grad[mine])
        sent.append((forward, counter.take(), group_rank(groups.ring)))
        found.append([out.detach(), q.grad, k.grad, v.grad])
        kept += [weakref.ref(mask), *map(weakref.ref, mask.regions.values())]
        del mask, out
    assert len(kept) > 2 * len(CASES) and not any(ref() for ref in kept), "a micro-batch's plans outlive it"
    return found, sent


@pytest.fixture(scope="module")
def across() -> list[tuple]:
    return run_light(across_job, ranks=8)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_one_process(across, case):
    mask, qkv, grad = problem(case)
    q, k, v = (t.requires_grad_() for t in qkv)
    expected = dense_attention(q, k, v, mask, SCALE)
    expected.backward(grad)
    real = (mask.example_ids >= 0).T[..., None, None]
    size = case[0]
    for block in range(0, 8, size):
        parts = [across[rank][0][CASES.index(case)] for rank in range(block, block + size)]
        back = np.argsort(order_of(mask))
        out, *grads = (torch.cat(tensors)[back] for tensors in zip(*parts, strict=True))
        torch.testing.assert_close(out * real, expected.detach() * real, atol=1e-5, rtol=1e-5)
        for got, tensor in zip(grads, (q, k, v), strict=True):
            torch.testing.assert_close(got, tensor.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_sends_what_the_formulas_say(across, case):
    """Counted at the collectives, on every rank; and never more than is said before the pack is known."""
    size, ulysses, exchange, kv_heads, *_ = case
    shape = AttentionShape(SIZE * PACKS, HEADS, kv_heads, 8, 4)
    bound = context_traffic(shape, size, ulysses, exchange)
    for rank in range(8):
        forward, backward, place = across[rank][1][CASES.index(case)]
        formula = exact(shape, size, ulysses, exchange, problem(case)[0], place)
        assert [forward, backward] == formula
        assert forward[1] <= bound.forward.bytes and backward[1] <= bound.backward.bytes


@pytest.mark.parametrize("visual_attention", ["image_tokens", "within_image", "none"])
@pytest.mark.parametrize("chunks", [2, 3, 8])
def test_visible_keys_cover_the_mask(chunks, visual_attention):
    """No allowed pair is left out, an end of a run that nobody sees is rare, and a pair that sees nothing is empty."""
    wasted = pairs = 0
    for seed in range(20):
        mask = random_mask(seed, visual_attention)
        allowed = mask.rows(0, SIZE) & (mask.example_ids >= 0)[:, None]
        found, size = visible_keys(mask, chunks), SIZE // chunks
        for i in range(chunks):
            for j in range(chunks):
                if i == j:
                    assert found.keys(i, j) == [slice(0, size)]
                    continue
                seen = allowed[:, i * size : (i + 1) * size, j * size : (j + 1) * size].any(0).any(0).nonzero()
                runs = found.keys(i, j) or [slice(0, 0)]
                assert len(runs) == 1
                low, high = runs[0].start, runs[0].stop
                exact = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 0)
                if len(seen):
                    assert low <= exact[0] and exact[1] <= high
                wasted += (high - low) - (exact[1] - exact[0])
                pairs += exact[1] - exact[0]
    assert wasted <= 0.02 * pairs
