"""Attention of a pack that several ranks share: Ulysses inside a node, keys exchanged across nodes, either or both.

Shape legend: S tokens of the pack, T tokens of this rank, B packs, N query heads, G key heads, H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molmo2_nemo.attention.area import area_of
from molmo2_nemo.attention.kernels import Kernel, attend
from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.attention.ring import VisibleKeys, exchange_attention, visible_keys
from molmo2_nemo.attention.ulysses import gather_heads, gather_sequence, replicate_kv
from molmo2_nemo.parallel.context import ContextGroups, group_size


@torch.compiler.disable  # a compiled model breaks its graph here: what is sent differs from pack to pack
def attend_across(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TokenMask,
    scale: float,
    kernel: Kernel,
    groups: ContextGroups,
    visible: VisibleKeys | None = None,
) -> Tensor:
    """Attention of this rank's tokens.

    Args:
        q: [T, B, N, H]; k, v: [T, B, G, H].
        mask: description of all S tokens.
        kernel: one that can merge, where keys are exchanged.
        visible: what the chunks of the ranks that exchange keys may see of each other; computed if missing.

    Returns:
        [T, B, N, H].
    """
    ulysses, chunks = group_size(groups.heads), group_size(groups.keys)
    if ulysses > 1:
        k, v = (replicate_kv(t, ulysses, q.shape[2]) for t in (k, v))
        q, k, v = gather_sequence((q, k, v), groups.heads)
    if chunks > 1:
        visible = visible or visible_keys(mask, chunks)
        out = exchange_attention(q, k, v, mask, scale, kernel, groups.keys, groups.exchange, visible)
    else:
        out = attend(q, k, v, area_of(mask), scale, kernel)
    if ulysses > 1:
        out = gather_heads(out, groups.heads)
    return out
