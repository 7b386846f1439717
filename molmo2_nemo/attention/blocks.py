"""Attention block by block of queries: exact, differentiable on every device, and never an S x S tensor.

Each block of queries is given the smallest range of keys that any of its tokens may see, and the mask of just that
block. On CPU this is the training kernel; on GPU it is the one to compare faster kernels with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from molmo2_nemo.attention.mask import TokenMask

BLOCK = 256  # queries per block


def block_attention(q: Tensor, k: Tensor, v: Tensor, mask: TokenMask, scale: float, block: int = BLOCK) -> Tensor:
    """Attention of a pack through scaled_dot_product_attention, one block of queries at a time.

    Args:
        q: [S, B, N, H]; k, v: [S, B, G, H], N a multiple of G.
        mask: description of the same S tokens.
        scale: multiplies the scores, 1/sqrt(H) for Molmo2.
        block: queries per block; memory is O(B * block * S).

    Returns:
        [S, B, N, H].
    """
    heads_per_group = q.shape[2] // k.shape[2]
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))  # [B, heads, S, H]
    if heads_per_group > 1:
        k = k.repeat_interleave(heads_per_group, dim=1)
        v = v.repeat_interleave(heads_per_group, dim=1)
    outputs = []
    for start in range(0, mask.size, block):
        stop = min(start + block, mask.size)
        allowed = mask.rows(start, stop)  # [B, Q, S]
        seen = allowed.any(dim=1).any(dim=0).nonzero()
        low, high = int(seen[0]), int(seen[-1]) + 1
        outputs.append(
            F.scaled_dot_product_attention(
                q[:, :, start:stop],
                k[:, :, low:high],
                v[:, :, low:high],
                attn_mask=allowed[:, None, :, low:high],
                scale=scale,
            )
        )
    return torch.cat(outputs, dim=2).permute(2, 0, 1, 3)
