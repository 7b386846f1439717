"""Rotary of queries and keys by tables of cos and sin, in fp32, with the QK-norm per head in front of it where there is
one.

Every way takes and returns q [T, B, N, H] and k [T, B, G, H]; cos and sin are fp32 [T, B, 1, H].

Shape legend: T tokens, B packs, N query heads, G key heads, H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molmo2_nemo.fused import norm
from molmo2_nemo.fused.compiled import Compiled


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the head dimension, in fp32. x: [..., N, H]; cos, sin: [..., 1, H]."""
    x32 = x.float()
    first, second = x32.chunk(2, dim=-1)
    return (x32 * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def plain(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Rotated q and k. q_weight, k_weight: [H], of the norms in front; None: no norm."""
    if q_weight is not None and k_weight is not None:
        q, k = norm.plain(q, q_weight, eps), norm.plain(k, k_weight, eps)
    return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)


_compiled = Compiled(plain, 0, 1, 2, 3)


def by_compiler(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`plain` for q and k together, compiled."""
    if not q.numel():
        return plain(q, k, cos, sin, q_weight, k_weight, eps)
    rows = (t.flatten(0, 1) for t in (q, k, cos, sin))
    new_q, new_k = _compiled(*rows, q_weight, k_weight, eps)
    return new_q.view(q.shape), new_k.view(k.shape)
