"""Ways of rotary, SwiGLU and residual dropout against the plain ones, forward and gradients; what dropout draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from molmo2_nemo.fused.choice import PIECES
from tests.support.equal import assert_equal

ROTARY, SWIGLU, RESIDUAL = (PIECES[piece]["compiled"].function for piece in ("rotary", "swiglu", "residual"))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("normed", [False, True])
def test_rotary(normed):
    """Keys as Megatron hands them over: a part of the fused projection, with its strides."""
    angles = random(9, 2, 1, 16) * 5
    cos, sin = (torch.cat((t, t), dim=-1) for t in (angles.cos(), angles.sin()))
    mixed = random(9, 2, 2, 3 * 32, seed=1)
    q, k = random(9, 2, 6, 32, seed=2), mixed[..., 32:64]
    weights = (1 + 0.1 * random(32, seed=3), 1 - 0.1 * random(32, seed=4)) if normed else ()

    def of(function):
        def run(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
            return function(q, k, cos.to(tables), sin.to(tables), *weights, **({"eps": 1e-6} if normed else {}))

        return run

    tables = torch.float32
    assert_equal(of(PIECES["rotary"]["plain"].function), of(ROTARY), q, k, *weights)


@pytest.mark.parametrize("shape", [(7, 2, 2 * 96), (1, 1, 2 * 33), (0, 1, 4)])
def test_swiglu(shape):
    assert_equal(PIECES["swiglu"]["plain"].function, SWIGLU, random(*shape))
    strided = random(*shape[:-1], 2 * shape[-1])[..., : shape[-1]]
    assert_equal(PIECES["swiglu"]["plain"].function, SWIGLU, strided)


def with_mask(mask: Tensor):
    """What residual dropout must give where it has drawn this mask: factors for x."""
    return lambda x, residual: residual + x * mask.to(x.dtype)


CASES = {
    "everywhere": (0.1, 0.0, False),
    "answers": (0.0, 0.25, True),
    "both": (0.1, 0.5, True),
    "none known": (0.1, 0.5, False),
    "nowhere": (0.0, 0.0, False),
}


@pytest.mark.parametrize("case", CASES)
def test_residual(case):
    """The drawn mask has the rates asked for; with it, values and gradients are those of the plain function."""
    rate, response_rate, known = CASES[case]
    x, residual = random(40, 2, 150), random(40, 2, 150, seed=1)
    response = (random(40, 2, 1, seed=2) > 0) if known else None
    rates = torch.where(response, response_rate, rate) if known else torch.tensor(rate)
    rates = rates.expand_as(x)

    def drawn(x: Tensor, residual: Tensor) -> Tensor:
        torch.manual_seed(3)
        return RESIDUAL(x, residual, rate, response_rate, response)

    mask = drawn(torch.ones_like(x), torch.zeros_like(x))
    assert torch.allclose(mask[mask != 0], (1 / (1 - rates))[mask != 0])
    for kind in {rate, response_rate} if known else {rate}:
        of_kind = mask[rates == kind] == 0
        assert abs(of_kind.double().mean() - kind) <= 5 * (kind * (1 - kind) / len(of_kind)) ** 0.5
    if max(rates.flatten()) > 0:
        assert not torch.equal(RESIDUAL(torch.ones_like(x), torch.zeros_like(x), rate, response_rate, response), mask)
    assert_equal(with_mask(mask), drawn, x, residual)


def test_a_mask_is_the_same_without_gradients():
    """Recomputation runs a forward pass without gradients first, and one with them later."""
    x, residual = random(40, 2, 150), torch.zeros(40, 2, 150)
    torch.manual_seed(3)
    with torch.no_grad():
        first = RESIDUAL(x, residual, 0.1)
    torch.manual_seed(3)
    assert torch.equal(RESIDUAL(x.requires_grad_(), residual, 0.1), first)
