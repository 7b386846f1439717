"""The end of a branch: dropout of its output, then the residual added. Tokens that answer may have their own rate.

The compiled way draws other numbers than the plain one from the same state of the generator; both follow from that
state alone, so a step repeats bit by bit, and so does its recomputation.

Shape legend: T tokens, B packs, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from molmo2_nemo.fused.compiled import Compiled


def plain(
    x: Tensor, residual: Tensor, rate: float, response_rate: float = 0.0, response: Tensor | None = None
) -> Tensor:
    """residual + dropout(x), [T, B, D].

    Args:
        rate: share of values that are dropped; the others are scaled by 1 / (1 - rate).
        response_rate: the same for tokens that answer; 0: they are as all others.
        response: bool [T, B, 1]: which tokens answer; None: not known, none has a rate of its own.
    """
    if response_rate and response is not None:
        keep = 1 - torch.where(response, response_rate, rate).to(x.dtype).expand_as(x)
        x = x * torch.bernoulli(keep) / keep
    elif rate:
        x = F.dropout(x, rate)
    return residual + x


def _one_rate(x: Tensor, residual: Tensor, rate: float) -> Tensor:
    kept = torch.rand(x.shape, device=x.device) >= rate
    return (residual.float() + torch.where(kept, x.float() / (1 - rate), 0.0)).to(x.dtype)


def _two_rates(x: Tensor, residual: Tensor, rate: float, response_rate: float, response: Tensor) -> Tensor:
    drop = torch.where(response, response_rate, rate)
    kept = torch.rand(x.shape, device=x.device) >= drop
    return (residual.float() + torch.where(kept, x.float() / (1 - drop), 0.0)).to(x.dtype)


_compiled_one, _compiled_two = Compiled(_one_rate, 0, 1), Compiled(_two_rates, 0, 1, 4)


def by_compiler(
    x: Tensor, residual: Tensor, rate: float, response_rate: float = 0.0, response: Tensor | None = None
) -> Tensor:
    """`plain` with one rounding, compiled; for backward it keeps the state of the generator in place of a mask."""
    if not x.numel():
        return residual + x
    rows = x.flatten(0, 1), residual.flatten(0, 1)
    if response_rate and response is not None:
        return _compiled_two(*rows, rate, response_rate, response.flatten(0, 1)).view(x.shape)
    return _compiled_one(*rows, rate).view(x.shape) if rate else residual + x
