"""The mask rule and Ulysses against brute force and the dense oracle, forward and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from molmo2_nemo.attention.dense import dense_attention
from molmo2_nemo.attention.mask import TokenMask
from tests.support.packs import random_mask_data


def token_mask(seed: int, packs: int, size: int, visual_attention: str = "image_tokens") -> TokenMask:
    data = random_mask_data(np.random.default_rng(seed), packs, size)
    return TokenMask(**{k: torch.from_numpy(v) for k, v in data.items()}, visual_attention=visual_attention)


def brute_force(mask: TokenMask, b: int, q: int, k: int) -> bool:
    """The published rule, one pair at a time: subsegment ids, causality, bidirectional visual tokens."""
    example, branch, block = (t[b].tolist() for t in (mask.example_ids, mask.branch_ids, mask.visual_block))

    def segment(i: int) -> int:  # root 10000, branch n: n, examples 100000 apart
        return (10000 if branch[i] == -1 else branch[i]) + 100000 * example[i]

    if example[q] == -1 or example[k] == -1:
        return example[q] == example[k] and k <= q  # padding sees itself and is seen by nobody else

    both_visual = block[q] > 0 and block[k] > 0 and example[q] == example[k]
    if mask.visual_attention == "none":
        both_visual = False
    elif mask.visual_attention == "within_image":
        both_visual = both_visual and block[k] <= block[q]
    return (k <= q or both_visual) and segment(q) <= segment(k)


@pytest.mark.parametrize("visual_attention", ["image_tokens", "within_image", "none"])
@pytest.mark.parametrize("seed", range(6))
def test_mask_equals_brute_force(seed, visual_attention):
    mask = token_mask(seed, 2, 40, visual_attention)
    got = mask.rows(0, 40)
    for b in range(2):
        for q in range(40):
            for k in range(40):
                assert bool(got[b, q, k]) == brute_force(mask, b, q, k), (b, q, k)


def test_published_example():
    """Root B S P E (S P E visual), branches q0 a0 and q1 a1: the matrix of the reference."""
    mask = TokenMask(
        torch.zeros(1, 8, dtype=torch.long),
        torch.tensor([[-1, -1, -1, -1, 0, 0, 1, 1]]),
        torch.tensor([[0, 1, 1, 1, 0, 0, 0, 0]]),
    )
    rows = ["".join(str(int(x)) for x in row) for row in mask.rows(0, 8)[0]]
    assert rows == ["10000000", "11110000", "11110000", "11110000", "11111000", "11111100", "11110010", "11110011"]


def inputs(seed: int, size: int, packs: int, heads: int, kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(size, packs, heads, 16), (size, packs, kv_heads, 16), (size, packs, kv_heads, 16)]
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


def ulysses_job(seed: int, kv_heads: int) -> tuple[torch.Tensor, ...]:
    """On every context rank: its shard through TreeAttention; returns output and gradients of its tokens."""
    from megatron.core import parallel_state

    from molmo2_nemo.attention.core import PackDescription, TreeAttention
    from molmo2_nemo.model.config import preset
    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.parallel.context import ContextSettings, context_groups
    from tests.support.pool import start_megatron

    start_megatron(context=torch.distributed.get_world_size())
    group = parallel_state.get_context_parallel_group()
    size = 96 // group.size()
    mine = slice(group.rank() * size, (group.rank() + 1) * size)
    q, k, v = (t.detach()[mine].clone().requires_grad_() for t in inputs(seed, 96, 2, 4, kv_heads))
    position_ids = torch.randint(0, 50, (2, 96), generator=torch.Generator().manual_seed(seed))
    core = TreeAttention(transformer_config(preset("tiny")), layer_number=1, softmax_scale=0.25)
    pack = PackDescription(
        mask=token_mask(seed, 2, 96),
        rotary={"plain": angles(position_ids[:, mine])},
        groups=context_groups(ContextSettings())[group.size()],
    )
    out = core(q, k, v, packed_seq_params=pack)
    weight = torch.randn(96, 2, 64, generator=torch.Generator().manual_seed(9))[mine]
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    return tuple(t.detach() for t in (out, *grads))


def angles(position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    inverse = 100.0 ** (-torch.arange(0, 16, 2) / 16)
    a = position_ids.T[..., None] * inverse
    a = torch.cat((a, a), -1)[:, :, None]
    return a.cos(), a.sin()


@pytest.mark.parametrize(("ranks", "kv_heads"), [(2, 2), (4, 4), (4, 2), (2, 1)])
def test_ulysses_equals_dense(workers, ranks, kv_heads):
    """Also with fewer key heads than ranks, where they are replicated and their gradients summed."""
    from molmo2_nemo.fused.rotary import apply_rotary

    seed = 3
    parts = workers.run(ulysses_job, seed, kv_heads, ranks=ranks)
    q, k, v = inputs(seed, 96, 2, 4, kv_heads)
    cos, sin = angles(torch.randint(0, 50, (2, 96), generator=torch.Generator().manual_seed(seed)))
    dense = dense_attention(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, token_mask(seed, 2, 96), 0.25)
    weight = torch.randn(96, 2, 64, generator=torch.Generator().manual_seed(9))
    grads = torch.autograd.grad((dense.flatten(2) * weight).sum(), (q, k, v))
    for got, expected in zip(zip(*parts, strict=True), (dense.flatten(2), *grads), strict=True):
        torch.testing.assert_close(torch.cat(got), expected, atol=1e-5, rtol=1e-5)


def test_mask_is_planned_from_what_stayed_on_the_host():
    """For a device the token arrays are kept as they came; the mask's description is the same, without a copy back."""
    from molmo2_nemo.model.inputs import PackInputs
    from tests.support.packs import demo_packs

    for batch in demo_packs(4):
        here, there = PackInputs.from_batch(batch, "cpu"), PackInputs.from_batch(batch, "meta")
        assert here.host is None and there.example_ids.is_meta
        planned = there.mask(1024, "within_image").on_host()  # a meta tensor could not be copied back
        assert (planned == here.mask(1024, "within_image").on_host()).all() and (planned[2] > 0).any()
