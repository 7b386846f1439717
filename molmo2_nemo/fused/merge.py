"""Attention computed in pieces, put together: outputs over disjoint keys by their log-sum-exps, gradients by addition.

With l = logsumexp(l_1, l_2, ...), out = sum of e^(l_i - l) out_i (as in ring attention, arXiv 2310.01889), in fp32. A
row that no piece reaches has output 0 and log-sum-exp -inf.

Shape legend: R rows of the result, L of a piece, N heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molmo2_nemo.fused.compiled import Compiled


class Rows(NamedTuple):
    """Which rows of the result a piece has; each at most once."""

    places: Tensor  # int64 [L]: the row of each of the piece's
    inverse: Tensor  # int64 [R]: where a row is in the piece, -1 where it is not


class Piece(NamedTuple):
    out: Tensor  # [L, N, H]
    lse: Tensor  # fp32 [L, N], finite
    rows: Rows | None  # None: all rows in order


@dataclass(frozen=True)
class Merging:
    """merge(pieces, R) -> out [R, N, H] in the pieces' dtype, lse [R, N] fp32.

    add([(x [L, N, H], rows), ...], R) -> [R, N, H] in x's dtype. Pieces may be overwritten.
    """

    merge: Callable[[Sequence[Piece], int], tuple[Tensor, Tensor]]
    add: Callable[[Sequence[tuple[Tensor, Rows | None]], int], Tensor]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(pieces: Sequence[Piece], rows: int) -> tuple[Tensor, Tensor]:
    """By tensor operations, piece by piece."""
    first, *others = pieces
    dtype = first.out.dtype
    if first.rows is None:
        out, lse = first.out.to(accumulator(dtype)), first.lse
    else:
        out = first.out.new_zeros(rows, *first.out.shape[1:], dtype=accumulator(dtype))
        lse = first.lse.new_full((rows, first.lse.shape[1]), -torch.inf)
        _put(out, first.rows, first.out.to(out.dtype))
        _put(lse, first.rows, first.lse)
    for piece in others:
        before = _at(lse, piece.rows)
        total = torch.logaddexp(before, piece.lse)
        more = piece.out * (piece.lse - total).exp().unsqueeze(-1)
        _put(out, piece.rows, _at(out, piece.rows) * (before - total).exp().unsqueeze(-1) + more)
        _put(lse, piece.rows, total)
    return out.to(dtype), lse


def add(parts: Sequence[tuple[Tensor, Rows | None]], rows: int) -> Tensor:
    """By tensor operations, part by part."""
    (first, where), *others = parts
    if where is None:
        total = first.to(accumulator(first.dtype))
    else:
        total = first.new_zeros(rows, *first.shape[1:], dtype=accumulator(first.dtype))
        _put(total, where, first.to(total.dtype))
    for part, where in others:  # rows are distinct, so this is exact and always in the same order
        _put(total, where, _at(total, where) + part)
    return total.to(first.dtype)


def _at(x: Tensor, rows: Rows | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows.places)


def _put(x: Tensor, rows: Rows | None, values: Tensor) -> None:
    if rows is None:
        x.copy_(values)
    else:
        x.index_copy_(0, rows.places, values)


def _merge_at_once(whole: bool, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """One pass over the result: reads every piece once and writes out and lse once.

    Args:
        whole: the first piece has all rows in order, and no inverse.
        tensors: out, lse and inverse of every piece.
    """
    outs, lses = ([tensors[0].float()], [tensors[1]]) if whole else ([], [])
    rest = tensors[2:] if whole else tensors
    for out, lse, inverse in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        at, there = inverse.clamp(min=0), inverse >= 0
        outs.append(torch.where(there[:, None, None], out[at].float(), 0.0))
        lses.append(torch.where(there[:, None], lse[at], -torch.inf))
    top = lses[0]
    for lse in lses[1:]:
        top = torch.maximum(top, lse)
    finite = torch.where(top == -torch.inf, 0.0, top)
    weights = [(lse - finite).exp() for lse in lses]
    merged, sum_of_weights = weights[0][..., None] * outs[0], weights[0]
    for weight, out in zip(weights[1:], outs[1:], strict=True):
        merged, sum_of_weights = merged + weight[..., None] * out, sum_of_weights + weight
    safe = torch.where(sum_of_weights == 0, 1.0, sum_of_weights)
    out = (merged / safe[..., None]).to(tensors[0].dtype)
    # Libraries give lse as a view of [N, L], whose strides the product would take on: what comes next (a linear layer,
    # which keeps its input) would copy it. In the compiled pass this is an order of writing, not a copy.
    return out.contiguous(), finite + sum_of_weights.log()


def _add_at_once(whole: bool, *tensors: Tensor) -> Tensor:
    """One pass over the result. Args: as `_merge_at_once`; tensors: part and inverse of every one."""
    total: Any = tensors[0].float() if whole else 0.0
    rest = tensors[1:] if whole else tensors
    for part, inverse in zip(rest[::2], rest[1::2], strict=True):
        total = total + torch.where((inverse >= 0)[:, None, None], part[inverse.clamp(min=0)].float(), 0.0)
    return total.to(tensors[0].dtype)


_compiled_merge = Compiled(_merge_at_once, *range(1, 13))
_compiled_add = Compiled(_add_at_once, *range(1, 13))


def merge_by_compiler(pieces: Sequence[Piece], rows: int) -> tuple[Tensor, Tensor]:
    """All pieces in one compiled pass."""
    if len(pieces) == 1 and pieces[0].rows is None:
        return pieces[0].out, pieces[0].lse
    if any(piece.rows is None for piece in pieces[1:]) or len(pieces) > 4 or any(len(p.out) == 1 for p in pieces):
        return merge(pieces, rows)
    tensors = [t for piece in pieces for t in (piece.out, piece.lse, *_inverse(piece.rows))]
    return _compiled_merge(pieces[0].rows is None, *tensors)


def add_by_compiler(parts: Sequence[tuple[Tensor, Rows | None]], rows: int) -> Tensor:
    """All parts in one compiled pass."""
    if len(parts) == 1 and parts[0][1] is None:
        return parts[0][0]
    if any(where is None for _, where in parts[1:]) or len(parts) > 4 or any(len(part) == 1 for part, _ in parts):
        return add(parts, rows)
    tensors = [t for part, where in parts for t in (part, *_inverse(where))]
    return _compiled_add(parts[0][1] is None, *tensors)


def _inverse(rows: Rows | None) -> tuple[Tensor, ...]:
    return () if rows is None else (rows.inverse,)


PLAIN = Merging(merge, add)
COMPILED = Merging(merge_by_compiler, add_by_compiler)
