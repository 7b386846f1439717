"""FlexAttention forward on CPU through its compiled kernel, which walks our block lists; tests/gpu has the rest."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from molmo2_nemo.attention import flex
from molmo2_nemo.attention.dense import dense_attention
from molmo2_nemo.attention.regions import region_of
from tests.support.trees import Tree, token_mask

SIZE = 700  # not a multiple of the block
PACKS = [
    [[Tree((40, 5, 9), (150, 130), (80, 1, 100)), Tree((100,))]],
    [[Tree((9,)), Tree((1, 3), (300,), (33,) * 3), Tree((60,))]],
]


def run(function, trees, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The function's attention of a pack, and the oracle's; [S, B, N, H]."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(SIZE, 1, n, 32, generator=generator) for n in (4, 2, 2))
    mask = token_mask(trees, SIZE)
    blocks = flex.block_mask(region_of(mask), q.device)
    out = function(*(t.permute(1, 2, 0, 3) for t in (q, k, v)), block_mask=blocks, scale=0.2, enable_gqa=True)
    return out.permute(2, 0, 1, 3), dense_attention(q, k, v, mask, 0.2)


def test_predicate_equals_dense_without_compiling():
    for seed, trees in enumerate(PACKS):
        out, expected = run(flex_attention, trees, seed)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs g++")
def test_compiled_kernel_equals_dense_and_is_compiled_once():
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    graphs = []
    for seed, trees in enumerate(PACKS):
        out, expected = run(compiled, trees, seed)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1], "another pack of the same length was compiled again"
