"""RMSNorm over the last dimension: x / rms(x) in fp32, back to x's dtype, times the weight.

Shape legend: D width; any leading shape.
"""

from __future__ import annotations

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
