"""Ways of a vision block and of the connector's pooling against the plain ones, forward and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from molmo2_nemo.fused.choice import PIECES
from molmo2_nemo.model.config import VisionConfig
from molmo2_nemo.model.vision import VisionBlock
from tests.support.equal import assert_equal

SMALL = VisionConfig(image_size=56, hidden_size=48, num_heads=3, ffn_size=80, num_layers=2, feature_layers=(-1, -2))
BLOCK = PIECES["vision"]


def block(function=None) -> VisionBlock:
    made = VisionBlock(SMALL, torch.float32, function)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2 + 0.1
    return made


@pytest.mark.parametrize("float32", [False, True])
@pytest.mark.parametrize("crops", [3, 1, 0])
def test_block(crops, float32):
    x = torch.randn(crops, SMALL.num_patches, SMALL.hidden_size, generator=torch.Generator().manual_seed(1))
    parameters = [p.detach() for p in block().parameters()]

    def of(way: str):
        return lambda x, *parameters: BLOCK[way].function(x, SMALL.num_heads, 1e-6, float32, *parameters)

    assert_equal(of("plain"), of("compiled"), x, *parameters, chain=True)


def test_the_plain_function_is_what_the_modules_compute():
    x = torch.randn(2, SMALL.num_patches, SMALL.hidden_size, generator=torch.Generator().manual_seed(1))
    assert torch.equal(block(BLOCK["plain"].function)(x), block()(x))


def test_modules_whose_parameters_are_used_are_announced():
    made, seen = block(BLOCK["plain"].function), []
    for name, module in made.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    made(torch.zeros(1, SMALL.num_patches, SMALL.hidden_size))
    assert sorted(seen) == sorted(name for name, _ in made.named_modules())


HEADS, WIDTH, FEATURES, PATCHES = 3, 24, 20, 37


def windows(n: int, size: int) -> Tensor:
    """Each patch in at most one window; some positions are empty, the first among them, but never all."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(PATCHES, generator=generator)[: n * size].view(n, size)
    empty = torch.rand(n, size, generator=generator) < 0.4
    empty[:, -1] = False
    return torch.where(empty, -1, rows)


@pytest.mark.parametrize("way", [way for way in PIECES["pooling"] if way != "plain"])
@pytest.mark.parametrize(("n", "size"), [(4, 9), (9, 4), (1, 4), (0, 4)])
def test_pooling(way, n, size):
    """The query, and attention over what was gathered; patches of empty positions differ, and do not matter."""
    places, generator = windows(n, size), torch.Generator().manual_seed(2)
    features = torch.randn(PATCHES, FEATURES, generator=generator)
    q, k, v = (torch.randn(*shape, WIDTH, generator=generator) for shape in ((n,), (n, size), (n, size)))
    plain, fast = (PIECES["pooling"][name].function for name in ("plain", way))

    def gathered(function):
        def run(features):
            patches, query, valid = function.gather(features, places)
            return patches * valid[..., None], query

        return run

    def attended(function, float32):
        return lambda q, k, v: function.attend(q, k, v, places >= 0, HEADS, float32)

    assert_equal(gathered(plain), gathered(fast), features)
    for float32 in (False, True):
        assert_equal(attended(plain, float32), attended(fast, float32), q, k, v)


@pytest.mark.parametrize("way", [way for way in PIECES["pooling"] if way != "plain"])
def test_empty_positions_read_their_own_window_and_leave_no_gradient(way):
    places = windows(9, 4)
    features = torch.randn(PATCHES, FEATURES, generator=torch.Generator().manual_seed(2)).requires_grad_()
    patches, query, valid = PIECES["pooling"][way].function.gather(features, places)
    for row, own, real in zip(patches, places, valid, strict=True):
        assert all(any(torch.equal(patch, features[i]) for i in own[real]) for patch in row)
    query.sum().backward()
    unused = torch.ones(PATCHES, dtype=bool)
    unused[places[valid]] = False
    assert unused.any() and not features.grad[unused].any() and features.grad[~unused].all()
