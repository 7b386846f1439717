"""RMSNorm over the last dimension: x / rms(x) in fp32, back to x's dtype, times the weight. And over two dimensions
that are sharded over ranks (`full_width`).

Shape legend: D width, N heads, H head size; any leading shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from molmo2_nemo.fused.compiled import Compiled


def plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] -> [..., D] in x's dtype."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def by_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`plain` by F.rms_norm, one kernel a direction on CUDA."""
    return F.rms_norm(x, weight.shape, weight, eps)


_compiled = Compiled(plain, 0)


def by_compiler(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`plain`, compiled."""
    return _compiled(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape) if x.numel() else plain(x, weight, eps)


def full_width(x: Tensor, weight: Tensor, width: int, eps: float, total: Callable[[Tensor], Tensor]) -> Tensor:
    """One RMS over all heads of all ranks, x [..., N, H] and weight [N * H] of this one -> [..., N, H].

    Args:
        width: values of all ranks together.
        total: adds up a tensor over the ranks.
    """
    x32 = x.float()
    squares = total(x32.square().sum((-2, -1), keepdim=True))
    return (x32 * torch.rsqrt(squares / width + eps)).to(x.dtype) * weight.view(x.shape[-2:])


def _squares(x: Tensor) -> Tensor:
    return x.float().square().sum((-2, -1), keepdim=True)


def _scaled(x: Tensor, squares: Tensor, weight: Tensor, width: int, eps: float) -> Tensor:
    return (x.float() * torch.rsqrt(squares / width + eps)).to(x.dtype) * weight.view(x.shape[-2:])


_compiled_squares, _compiled_scaled = Compiled(_squares, 0), Compiled(_scaled, 0, 1)


def full_width_by_compiler(
    x: Tensor, weight: Tensor, width: int, eps: float, total: Callable[[Tensor], Tensor]
) -> Tensor:
    """`full_width`, compiled before and after the sum over ranks."""
    if not x.numel():
        return full_width(x, weight, width, eps, total)
    rows = x.flatten(0, -3)
    return _compiled_scaled(rows, total(_compiled_squares(rows)), weight, width, eps).view(x.shape)


FULL_WIDTH = {"compiled": full_width_by_compiler}  # other ways: the plain one
