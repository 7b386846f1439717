"""Ulysses context parallelism: trade the sequence dimension for the head dimension round the attention kernel.

Outside attention every rank of the group holds T = S / C consecutive tokens and all heads; inside it holds all S tokens
and 1/C of the heads. Queries, keys and values travel in one all-to-all, the output in another; the backward of one is
the other (arXiv 2309.14509).

Shape legend: S tokens of the pack, T = S / C tokens of this rank, B packs, N query heads, G key heads, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from molmo2_nemo.errors import UserError
from molmo2_nemo.parallel.partition import can_shard_heads


class _SwapSequenceAndHeads(torch.autograd.Function):
    """[T, B, N, H] -> [S, B, N / C, H] when `to_heads`, and the way back otherwise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, to_heads: bool) -> Tensor:
        ctx.group, ctx.to_heads = group, to_heads
        return _to_heads(x, group) if to_heads else _to_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        back = _to_sequence(grad, ctx.group) if ctx.to_heads else _to_heads(grad, ctx.group)
        return back, None, None


def _to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    size = dist.get_world_size(group)
    tokens, batch, heads, dim = x.shape
    send = x.reshape(tokens, batch, size, heads // size, dim).permute(2, 0, 1, 3, 4).contiguous()
    received = torch.empty_like(send)  # [source rank, T, B, N / C, H]: source order is sequence order
    dist.all_to_all_single(received, send, group=group)
    return received.reshape(size * tokens, batch, heads // size, dim)


def _to_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    size = dist.get_world_size(group)
    tokens, batch, heads, dim = x.shape
    send = x.reshape(size, tokens // size, batch, heads, dim).contiguous()
    received = torch.empty_like(send)  # [source rank, T, B, N / C, H]: source order is head order
    dist.all_to_all_single(received, send, group=group)
    return received.permute(1, 2, 0, 3, 4).reshape(tokens // size, batch, size * heads, dim)


def gather_sequence(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """This rank's tokens with all heads -> all tokens with this rank's heads; heads are sharded in contiguous runs.

    Args:
        tensors: each [T, B, heads, H], heads a multiple of the group's size; they travel together.

    Returns:
        Each as [S, B, heads / C, H].
    """
    size = dist.get_world_size(group)
    sharded = [t.unflatten(2, (size, -1)) for t in tensors]  # [T, B, C, heads / C, H]
    together = _SwapSequenceAndHeads.apply(torch.cat(sharded, dim=3).flatten(2, 3), group, True)
    return list(together.split([t.shape[3] for t in sharded], dim=2))


def gather_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All tokens, this rank's heads [S, B, heads / C, H] -> this rank's tokens, all heads [T, B, heads, H]."""
    return _SwapSequenceAndHeads.apply(x, group, False)


def replicate_kv(x: Tensor, group_size: int, query_heads: int) -> Tensor:
    """Repeat key or value heads until they can be sharded over `group_size` ranks; their gradients add up by autograd.

    Args:
        x: [T, B, G, H].

    Raises:
        UserError: the query heads of this tensor-parallel rank cannot be sharded evenly.
    """
    kv_heads = x.shape[2]
    if not can_shard_heads(query_heads, kv_heads, group_size):
        raise UserError(
            f"Ulysses over {group_size} ranks cannot shard {query_heads} query heads and {kv_heads} key heads per "
            f"tensor-parallel rank evenly; choose a parallel.context_ulysses that divides {query_heads}"
        )
    return x if kv_heads % group_size == 0 else x.repeat_interleave(group_size // kv_heads, dim=2)
