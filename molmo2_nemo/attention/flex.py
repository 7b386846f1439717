"""Tree attention on PyTorch's FlexAttention: one block-sparse kernel, its block mask listed on the host.

The lists say, for every block of queries, which blocks of keys hold allowed pairs (some: masked by the rule inside the
kernel; all: not masked), and the same for every block of keys, which the backward pass walks. They come from the pair
counts of the region's tiles, so nothing larger than (S / 128)^2 integers is made.

FlexAttention has no backward pass on CPU; there only `forward` without gradients works (used by the tests).

Shape legend: Q queries, K keys, B packs, N query heads, G key heads, H head size; R and C numbers of blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from molmo2_nemo.attention.mask import may_attend
from molmo2_nemo.attention.regions import MaskRegion
from molmo2_nemo.fused.varlen import is_installed
from molmo2_nemo.transfer import to_device

if TYPE_CHECKING:  # importing it takes a while, and an old PyTorch lacks parts of it
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # FlexAttention's default for both queries and keys


def problem(device: str, dtype: torch.dtype, head_size: int) -> str | None:
    """Why this kernel cannot train here, or None."""
    if device != "cuda":
        return f"FlexAttention has no backward pass on {device}"
    if not is_installed("triton"):
        return "FlexAttention needs the triton package, which is not installed"
    try:
        from torch.nn.attention.flex_attention import AuxRequest  # noqa: F401
    except ImportError:
        return f"PyTorch {torch.__version__} has no FlexAttention, or one before 2.9"
    return None


def implementation(device: str) -> tuple[str, str]:
    """The kernel's name in cost/efficiency.py, and its title for the log."""
    return "flex", f"FlexAttention of PyTorch {torch.__version__}"


def forward(q: Tensor, k: Tensor, v: Tensor, region: MaskRegion, scale: float) -> tuple[Tensor, Tensor]:
    """See `kernels.Kernel`, but differentiable by autograd, in out and in lse."""
    from torch.nn.attention.flex_attention import AuxRequest

    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    out, aux = _compiled()(
        q,
        k,
        v,
        block_mask=block_mask(region, q.device),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return out.permute(2, 0, 1, 3), aux.lse.permute(2, 0, 1)


def plan(region: MaskRegion, device: torch.device) -> None:
    """See `kernels.Kernel`."""
    block_mask(region, device)


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def block_mask(region: MaskRegion, device: torch.device) -> BlockMask:
    """The region as FlexAttention takes it, cached on the region."""
    key = ("block_mask", device)
    if key not in region.cache:
        region.cache[key] = _block_mask(region, device)
    return region.cache[key]


def _block_mask(region: MaskRegion, device: torch.device) -> BlockMask:
    from torch.nn.attention.flex_attention import BlockMask

    lists: dict[str, Any] = {
        name: to_device(array, device) for name, array in block_lists(region.tiles(BLOCK, BLOCK)).items()
    }
    return BlockMask(seq_lengths=region.shape, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=_predicate(region, device), **lists)


def block_lists(counts: np.ndarray) -> dict[str, np.ndarray]:
    """FlexAttention's lists from the allowed pairs of every tile.

    Tiles at a ragged edge are never called full, so that the kernel masks what lies beyond the last token.

    Args:
        counts: int64 [B, R, C].

    Returns:
        int32 arrays for one head: numbers of blocks [B, 1, R] (or C) and indices [B, 1, R, C] (or [B, 1, C, R]), the
        listed blocks first.
    """
    full = counts == BLOCK * BLOCK
    some = (counts > 0) & ~full
    lists = {}
    for prefix, chosen in (("", some), ("full_", full)):
        for name, table in (("kv", chosen), ("q", chosen.transpose(0, 2, 1))):
            lists[f"{prefix}{name}_num_blocks"] = table.sum(-1, dtype=np.int32)[:, None]
            lists[f"{prefix}{name}_indices"] = np.argsort(~table, axis=-1, kind="stable").astype(np.int32)[:, None]
    return lists


def _predicate(region: MaskRegion, device: torch.device) -> Callable[..., Tensor]:
    """`may_attend` on the token arrays, as the kernel evaluates it inside mixed blocks."""
    example, branch, block = (to_device(array.astype(np.int32), device) for array in region.mask.on_host())
    ((first_query, _),), ((first_key, _),) = region.queries, region.keys  # one run: not a part of what ranks share
    visual_attention = region.mask.visual_attention

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q, k = q + first_query, k + first_key
        queries = example[b, q], branch[b, q], block[b, q]
        keys = example[b, k], branch[b, k], block[b, k]
        return may_attend(queries, keys, q, k, visual_attention)

    return allowed
