"""Pieces of attention merged, and gradients added, in one compiled pass: equal to the plain way, odd shapes as well."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from molmo2_nemo.fused.merge import COMPILED, PLAIN, Merging, Piece, Rows
from tests.support.equal import BF16, FP32, assert_close

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs g++")


def rows_of(chosen: list[int], size: int) -> Rows:
    inverse = torch.full((size,), -1)
    inverse[chosen] = torch.arange(len(chosen))
    return Rows(torch.tensor(chosen), inverse)


def layouts(size: int, seed: int) -> dict[str, list[Rows | None]]:
    generator = torch.Generator().manual_seed(seed)
    some = [torch.randperm(size, generator=generator)[: size // part].tolist() for part in (2, 3, 5)]
    return {
        "one": [None],
        "part of one": [rows_of(some[0], size)],
        "whole and part": [None, rows_of(some[1], size)],
        "as in a pack": [None, rows_of(some[0], size), rows_of(some[1], size)],
        "of a rectangle": [rows_of(rows, size) for rows in some],
        "four": [None, *(rows_of(rows, size) for rows in some)],
        "five": [None, *(rows_of(rows, size) for rows in (*some, some[0]))],
    }


LAYOUTS = tuple(layouts(10, 0))


def merged(merging: Merging, layout: list[Rows | None], size: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Output and log-sum-exp, and the sum of the outputs; of the same numbers rounded to bf16 first."""
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for number, rows in enumerate(layout):
        length = size if rows is None else len(rows.places)
        out = torch.randn(length, 3, 8, generator=generator).bfloat16().to(dtype)
        lse = 4 * torch.randn(length, 3, generator=generator)
        if number % 2:  # as FlashAttention lays it out
            lse = lse.T.contiguous().T
        pieces.append(Piece(out, lse.to(torch.float64) if dtype == torch.float64 else lse, rows))
    parts = [(piece.out.clone(), piece.rows) for piece in pieces]
    return [*merging.merge([p._replace(lse=p.lse.clone()) for p in pieces], size), merging.add(parts, size)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_compiled_equals_plain(name):
    for size in (64, 77, 1001):
        layout = layouts(size, size)[name]
        exact = merged(PLAIN, layout, size, size, torch.float64)
        for dtype, bound in ((torch.float32, FP32), (torch.bfloat16, 2 * BF16)):
            for merging in (PLAIN, COMPILED):
                got = merged(merging, layout, size, size, dtype)
                assert [t.dtype for t in got] == [dtype, torch.float32, dtype]
                seen = exact[1] > -torch.inf
                assert torch.equal(got[1] > -torch.inf, seen)
                for a, b in ((exact[0], got[0]), (exact[2], got[2])):
                    assert_close(a, b, bound)
                assert_close(exact[1][seen], got[1][seen], FP32)
                assert not got[0][~seen].any()


def test_the_output_is_contiguous_where_log_sum_exps_are_views():
    """As FlashAttention lays them out, [N, L]: the linear layer that comes next keeps its input, and would copy it."""
    size = 64
    pieces = [
        Piece(torch.randn(length, 3, 8), torch.randn(3, length).T, rows)
        for rows in layouts(size, 0)["whole and part"]
        for length in [size if rows is None else len(rows.places)]
    ]
    out, _ = COMPILED.merge(pieces, size)
    assert out.is_contiguous() and out.view(size, 24).data_ptr() == out.data_ptr()
