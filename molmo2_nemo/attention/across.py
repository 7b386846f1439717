"""Attention of a pack that several ranks share: Ulysses inside a node, a ring across nodes, either or both.

Shape legend: S tokens of the pack, T tokens of this rank, B packs, N query heads, G key heads, H head size.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from molmo2_nemo.attention.kept import KeptResults, slot_of
from molmo2_nemo.attention.kernels import Kernel, attend
from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.attention.regions import region_of
from molmo2_nemo.attention.ring import VisibleKeys, regions_of_rank, ring_attention, visible_keys
from molmo2_nemo.attention.ulysses import gather_heads, gather_sequence, replicate_kv
from molmo2_nemo.parallel.context import ContextGroups, group_size


def plan_attention(
    mask: TokenMask, groups: ContextGroups, visible: VisibleKeys | None, kernel: Kernel, device: torch.device
) -> None:
    """Plan the kernel's work for every region of the mask that `attend_across` will ask for, and keep it with the
    mask."""
    regions = [region_of(mask)] if group_size(groups.ring) == 1 else regions_of_rank(mask, groups, visible)
    for region in regions:
        kernel.plan(region, device)


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
    kept: KeptResults | None = None,
    layer: Hashable = None,
) -> Tensor:
    """Attention of this rank's tokens over all tokens of the pack that they may see.

    Args:
        q: [T, B, N, H]; k, v: [T, B, G, H].
        mask: description of all S tokens.
        kernel: one that can merge, where ranks show each other their keys.
        visible: which keys the chunks of the ring's ranks may see of each other; None: computed from the mask.
        kept: where the layer's results outlive recomputation; None: nowhere.
        layer: its key there.

    Returns:
        [T, B, N, H].
    """
    slot = slot_of(kept, layer)
    ulysses, chunks = group_size(groups.ulysses), group_size(groups.ring)
    if ulysses > 1:
        k, v = (replicate_kv(t, ulysses, q.shape[2]) for t in (k, v))
        q, k, v = gather_sequence((q, k, v), groups.ulysses)
    if chunks > 1:
        visible = visible or visible_keys(mask, chunks)
        out = ring_attention(q, k, v, mask, scale, kernel, groups.ring, groups.cp_comm_type, visible, slot)
    else:
        out = attend(q, k, v, region_of(mask), scale, kernel, slot)
    if ulysses > 1:
        out = gather_heads(out, groups.ulysses)
    return out
