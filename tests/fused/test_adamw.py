"""Norms from fp32 chunks against fp64, also where fp32 is at its worst; the fused update against the plain one."""

from __future__ import annotations

import math

import pytest
import torch

from molmo2_nemo.fused.adamw import CHUNK, FUSED, PLAIN, squares_by_chunks, squares_in_fp64

MANY = 3_000_017  # not a multiple of anything


def hard(case: str) -> torch.Tensor:
    """A gradient whose norm is hard to add up in fp32."""
    generator = torch.Generator().manual_seed(0)
    if case == "all alike":  # every addition rounds the same way
        return torch.full((MANY,), 1 / 3)
    if case == "heavy tails":
        return torch.randn(MANY, generator=generator).pow(9)
    if case == "one large among small":
        return torch.cat((torch.full((MANY,), 1e-4), torch.tensor([1e4])))
    if case == "falling":
        return torch.linspace(1, 0, MANY) ** 8
    if case == "every magnitude":
        return 10 ** (torch.rand(MANY, generator=generator) * 24 - 12)
    return torch.randn(MANY, generator=generator) * 1e-5


CASES = ("normal", "all alike", "heavy tails", "one large among small", "falling", "every magnitude")


@pytest.mark.parametrize("case", CASES)
def test_norms_from_chunks_are_exact_to_fp32_rounding(case):
    gradient = hard(case)
    exact = math.sqrt(squares_in_fp64([gradient]))
    assert math.sqrt(squares_by_chunks([gradient])) == pytest.approx(exact, rel=2e-7)
    if case != "one large among small":  # what chunks are for: a plain fp32 sum would not do
        assert abs(float(torch.linalg.vector_norm(gradient)) / exact - 1) > 1e-6


def test_norms_from_chunks_do_not_depend_on_how_tensors_are_cut():
    gradient = hard("heavy tails")
    whole = math.sqrt(squares_by_chunks([gradient]))
    for sizes in ([1, CHUNK - 1, CHUNK, CHUNK + 1, MANY - 3 * CHUNK - 1], [MANY // 2, MANY - MANY // 2], [7, MANY - 7]):
        parts = [part.view(1, -1) for part in gradient.split(sizes)]
        assert math.sqrt(squares_by_chunks(parts)) == pytest.approx(whole, rel=2e-7)
    shards = sum(float(squares_by_chunks([part])) for part in gradient.chunk(3))
    assert math.sqrt(shards) == pytest.approx(whole, rel=2e-7)
    assert float(squares_by_chunks([])) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, CHUNK * 5 + 3, -1])
def test_what_is_not_finite_is_seen(bad, place):
    gradient = torch.ones(CHUNK * 7 + 5)
    gradient[place] = bad
    assert not math.isfinite(squares_by_chunks([gradient]))


def test_norms_that_fp32_cannot_hold_are_uncertain():
    for size in (1e-25, 1e20):
        assert not FUSED.certain(math.sqrt(squares_by_chunks([torch.full((1000,), size)])))
        assert PLAIN.certain(math.sqrt(squares_in_fp64([torch.full((1000,), size)])))
    assert FUSED.certain(1.0) and not FUSED.certain(math.nan) and not FUSED.certain(math.inf)
