"""Ways of RMSNorm against the plain one, forward and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from molmo2_nemo.fused import compiled, norm
from molmo2_nemo.fused.choice import PIECES
from tests.support.allocations import Allocations
from tests.support.equal import assert_equal

WAYS = ("compiled", "torch")


def inputs(shape: tuple[int, ...], strided: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape[:-1], 2 * shape[-1] if strided else shape[-1], generator=generator) * 3
    x = x[..., : shape[-1]]
    return x, 1 + 0.1 * torch.randn(shape[-1], generator=generator)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", [(7, 2, 192), (1, 1, 33), (5, 1, 4, 32), (0, 2, 16)])
def test_equal(way, strided, shape):
    x, weight = inputs(shape, strided)
    ways = PIECES["norm"]
    assert_equal(ways["plain"].function, ways[way].function, x, weight, eps=1e-6)


@pytest.mark.parametrize("shape", [(5, 2, 3, 16), (0, 1, 2, 8)])
def test_full_width(shape):
    def of(function):
        return lambda x, w: function(x, w, 2 * w.numel(), 1e-6, lambda squares: 2 * squares)  # of two ranks

    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator), torch.randn(shape[-2] * shape[-1], generator=generator)
    assert_equal(of(norm.full_width), of(norm.full_width_by_compiler), x, weight)


def test_whoever_watches_operations_sees_them(capsys):
    """Under a dispatch mode, which PyTorch does not compile for, the plain function runs, and that is said once."""
    x, weight = inputs((5, 2, 16), False)
    compiled._say_uncompiled.cache_clear()
    for _ in range(2):
        with Allocations() as seen:
            got = norm.by_compiler(x, weight, 1e-6)
        assert torch.equal(got, norm.plain(x, weight, 1e-6)) and seen.peak > 0
    with FlopCounterMode(display=False), Allocations():
        norm.by_compiler(x, weight, 1e-6)
    lines = [line.partition(" under ")[2] for line in capsys.readouterr().out.splitlines()]
    ours, end = "tests.support.allocations.Allocations", ", for which PyTorch does not compile"
    assert lines == [ours + end, f"torch.utils.flop_counter._FlopCounterMode and {ours}{end}"]
    norm.by_compiler(x, weight, 1e-6)
    assert capsys.readouterr().out == ""
