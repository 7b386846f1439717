"""RMSNorm over the last dimension: x / rms(x) in fp32, back to x's dtype, times the weight. And over two dimensions
that are sharded over ranks, in two functions with a sum over the ranks between them (`FullWidth`).

Shape legend: D width, N heads, H head size; any leading shape.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class FullWidth:
    """squares(x [..., N, H]) -> fp32 [..., 1, 1], the sum of this rank's squares.

    scaled(x, squares, weight [N * H], width, eps) -> [..., N, H]; squares: of all ranks, width: their values together.
    """

    squares: Callable[[Tensor], Tensor]
    scaled: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]


def _squares(x: Tensor) -> Tensor:
    return x.float().square().sum((-2, -1), keepdim=True)


def _scaled(x: Tensor, squares: Tensor, weight: Tensor, width: int, eps: float) -> Tensor:
    normed = x.float() * torch.rsqrt(squares / width + eps)
    return normed.to(x.dtype) * weight.view(x.shape[-2:])


_compiled_squares, _compiled_scaled = Compiled(_squares, 0), Compiled(_scaled, 0, 1)


def _squares_by_compiler(x: Tensor) -> Tensor:
    if not x.numel():
        return _squares(x)
    return _compiled_squares(x.flatten(0, -3)).view(*x.shape[:-2], 1, 1)


def _scaled_by_compiler(x: Tensor, squares: Tensor, weight: Tensor, width: int, eps: float) -> Tensor:
    if not x.numel():
        return _scaled(x, squares, weight, width, eps)
    return _compiled_scaled(x.flatten(0, -3), squares.flatten(0, -3), weight, width, eps).view(x.shape)


PLAIN_FULL_WIDTH = FullWidth(_squares, _scaled)
FULL_WIDTH = {"compiled": FullWidth(_squares_by_compiler, _scaled_by_compiler)}  # other ways: the plain one


def te_problem(device: str, dtype: torch.dtype) -> str | None:
    """Why Transformer Engine's fused norm and linear layer cannot be taken: it is a choice without code behind it."""
    if device != "cuda":
        return "Transformer Engine needs CUDA"
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    return "Transformer Engine's fused norm and linear layer is not built in: it could not be run anywhere yet"
