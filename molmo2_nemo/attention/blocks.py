"""Attention tile by tile with plain tensor operations: any device, any dtype, both directions, O(S * block) memory.

Tiles without an allowed pair are skipped, tiles where every pair is allowed need no mask, and the rest are masked by
the rule itself, evaluated for just that tile. Softmax is accumulated over key tiles (arXiv 2205.14135) in fp32.

Shape legend: Q queries, K keys, B packs, N query heads, G key heads, H head size; q queries and k keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from molmo2_nemo.attention.regions import MaskRegion, Range

QUERIES = 256  # per tile
KEYS = 256
LONGEST = 2048  # keys of neighbouring unmasked tiles taken together


def problem(device: str, dtype: torch.dtype, head_size: int) -> str | None:
    """Why this kernel cannot run here, or None."""
    return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"


def implementation(device: str) -> tuple[str, str]:
    """The kernel's name in cost/efficiency.py, and its title for the log."""
    return "blocks", "plain tensor operations"


def forward(q: Tensor, k: Tensor, v: Tensor, region: MaskRegion, scale: float) -> tuple[Tensor, Tensor]:
    """See `kernels.Kernel`."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=_compute(q.dtype), device=q.device)
    for pack, rows, tiles in _rows(region):
        q_tile = _queries(q, pack, rows, k.shape[2]) * scale
        top = q_tile.new_full(q_tile.shape[:-1], -torch.inf)  # largest score so far
        total = torch.zeros_like(top)
        summed = torch.zeros_like(q_tile)
        for columns, masked in tiles:
            scores = _scores(q_tile, k, region, pack, rows, columns, masked)
            new_top = torch.maximum(top, scores.amax(-1))
            # a row that has seen nothing yet keeps -inf; subtracting 0 instead avoids -inf - -inf
            shift = torch.where(new_top == -torch.inf, 0.0, new_top)
            weights = (scores - shift[..., None]).exp_()
            fade = (top - shift).exp()
            total = total * fade + weights.sum(-1)
            summed = summed * fade[..., None] + weights @ _keys(v, pack, columns)
            top = new_top
        out[rows[0] : rows[1], pack] = _tokens(summed / total.clamp(min=1e-30)[..., None], rows).to(q.dtype)
        lse[rows[0] : rows[1], pack] = _tokens((top + total.log())[..., None], rows)[..., 0]
    return out, lse


def plan(region: MaskRegion, device: torch.device) -> None:
    """See `kernels.Kernel`."""
    _rows(region)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, region: MaskRegion, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.Kernel`."""
    groups, compute = k.shape[2], _compute(q.dtype)
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(t, dtype=compute, memory_format=torch.contiguous_format) for t in (k, v))
    for pack, rows, tiles in _rows(region):
        q_tile, g_tile, o_tile = (_queries(t, pack, rows, groups) for t in (q, grad, out))
        l_tile = _queries(lse[..., None], pack, rows, groups)
        drift = (g_tile * o_tile).sum(-1, keepdim=True)
        dq_tile = torch.zeros_like(q_tile)
        for columns, masked in tiles:
            k_tile, v_tile = _keys(k, pack, columns), _keys(v, pack, columns)
            weights = (_scores(q_tile * scale, k, region, pack, rows, columns, masked) - l_tile).exp_()
            d_scores = weights * (g_tile @ v_tile.mT - drift)
            dq_tile += d_scores @ k_tile
            dk[columns[0] : columns[1], pack] += (d_scores.mT @ q_tile).transpose(0, 1) * scale
            dv[columns[0] : columns[1], pack] += (weights.mT @ g_tile).transpose(0, 1)
        dq[rows[0] : rows[1], pack] = _tokens(dq_tile * scale, rows).to(q.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _rows(region: MaskRegion) -> list[tuple[int, Range, list[tuple[Range, bool]]]]:
    """(pack, queries, the key ranges they see, each with whether it needs a mask); queries without keys are left
    out."""
    if "rows" not in region.cache:
        region.cache["rows"] = list(_planned(region))
    return region.cache["rows"]


def _planned(region: MaskRegion) -> Iterator[tuple[int, Range, list[tuple[Range, bool]]]]:
    queries, keys = region.shape
    for pack, counts in enumerate(region.tiles(QUERIES, KEYS)):
        for i, row in enumerate(counts):
            rows = i * QUERIES, min((i + 1) * QUERIES, queries)
            tiles: list[tuple[Range, bool]] = []
            for j in np.flatnonzero(row):
                start, stop = int(j) * KEYS, min((int(j) + 1) * KEYS, keys)
                masked = int(row[j]) < (rows[1] - rows[0]) * (stop - start)
                if tiles and not masked and not tiles[-1][1]:
                    (first, end), _ = tiles[-1]
                    if end == start and stop - first <= LONGEST:
                        tiles[-1] = (first, stop), False
                        continue
                tiles.append(((start, stop), masked))
            if tiles:
                yield pack, rows, tiles


def _scores(q: Tensor, k: Tensor, region: MaskRegion, pack: int, rows: Range, columns: Range, masked: bool) -> Tensor:
    """Scores of one tile, [G, N / G * q, k]; -inf where not allowed. q is scaled."""
    scores = q @ _keys(k, pack, columns).mT
    if masked:
        allowed = region.masked(pack, rows, columns)
        scores.view(len(scores), -1, *allowed.shape).masked_fill_(~allowed, -torch.inf)
    return scores


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _queries(x: Tensor, pack: int, rows: Range, groups: int) -> Tensor:
    """[Q, B, N, H] -> [G, N / G * q, H]: the query heads of a key head one below the other."""
    x = x[rows[0] : rows[1], pack].to(_compute(x.dtype))
    return x.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).reshape(groups, -1, x.shape[-1])


def _keys(x: Tensor, pack: int, columns: Range) -> Tensor:
    """[K, B, G, H] -> [G, k, H]."""
    return x[columns[0] : columns[1], pack].transpose(0, 1).to(_compute(x.dtype))


def _tokens(x: Tensor, rows: Range) -> Tensor:
    """[G, N / G * q, H] -> [q, N, H]."""
    return x.unflatten(1, (-1, rows[1] - rows[0])).flatten(0, 1).transpose(0, 1)
