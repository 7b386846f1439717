"""The oracle: attention with the whole mask as a matrix. O(S^2) memory; for tests only."""

from __future__ import annotations

import torch
from torch import Tensor

from molmo2_nemo.attention.mask import TokenMask


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: TokenMask, scale: float) -> Tensor:
    """Softmax attention over the full mask, in fp32.

    Args:
        q: [S, B, N, H]; k, v: [S, B, G, H] with N a multiple of G (query head n reads key head n // (N / G)).

    Returns:
        [S, B, N, H] in q's dtype.
    """
    heads_per_group = q.shape[2] // k.shape[2]
    k = k.repeat_interleave(heads_per_group, dim=2)
    v = v.repeat_interleave(heads_per_group, dim=2)
    scores = torch.einsum("qbnh,kbnh->bnqk", q.float(), k.float()) * scale
    scores = scores.masked_fill(~mask.rows(0, mask.size)[:, None], float("-inf"))
    return torch.einsum("bnqk,kbnh->qbnh", scores.softmax(-1), v.float()).to(q.dtype)
