"""The activation of a gated MLP: silu(gate) * up, of the two halves of the last dimension.

Shape legend: F width of the MLP (of this tensor-parallel rank); any leading shape.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from molmo2_nemo.fused.compiled import Compiled


def plain(x: Tensor) -> Tensor:
    """[gate; up] [..., 2 * F] -> [..., F]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


_compiled = Compiled(plain, 0)


def by_compiler(x: Tensor) -> Tensor:
    """`plain`, compiled; for backward it keeps x alone."""
    return _compiled(x.flatten(0, -2)).view(*x.shape[:-1], -1) if x.numel() else plain(x)
