"""Who shares a pack: the process groups of context parallelism, static or chosen pack by pack.

The C ranks of a context group hold C consecutive runs of a pack's tokens. Inside attention they work in two
dimensions: `ulysses` groups of U consecutive ranks (one node) trade tokens for heads, all-to-all; `ring` groups of
C / U ranks that lie U apart (across nodes) show each other their keys and values (attention/ring.py). U = C is plain
Ulysses, U = 1 plain ring or all-gather.

With dynamic context parallelism every aligned block of 1, 2, 4, ... C ranks is such a group as well, and each
micro-batch names the one that works on it (parallel/assignment.py).

Megatron's `hierarchical_context_parallel_sizes` makes the same two dimensions and its `hybrid_context_parallel` groups
of powers of two, but NeMo 2.7 passes on neither, and the hybrid groups come without the two dimensions and without
tensor-parallel peers, which vision needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from molmo2_nemo.parallel.partition import degrees, ulysses_degree

CommType = Literal["ring", "all_gather"]
Tokens = TypeVar("Tokens", torch.Tensor, np.ndarray)


@dataclass(frozen=True)
class ContextSettings:
    """How a context group works inside attention.

    Args:
        ulysses: U, ranks that shard heads among them; None: all C.
        cp_comm_type: how ranks that hold the same heads see each other's keys, where C / U > 1.
        dynamic: make groups of 1, 2, 4, ... too.
    """

    ulysses: int | None = None
    cp_comm_type: CommType = "ring"
    dynamic: bool = False


@dataclass(frozen=True)
class ContextGroups:
    """The groups of one rank for packs shared by `size` ranks. A group of this rank alone is None."""

    whole: Any  # the ranks that share a pack, in the order of their tokens
    ulysses: Any  # U consecutive ranks of them
    ring: Any  # the C / U ranks of them that hold the same heads inside attention, in the order of their tokens
    vision: Any  # whole x tensor-parallel group, tensor rank fastest
    cp_comm_type: CommType = "ring"

    @property
    def size(self) -> int:
        return group_size(self.whole)

    @property
    def rank(self) -> int:
        return group_rank(self.whole)

    def shard(self, tokens: Tokens) -> Tokens:
        """[B, S] -> [B, T], this rank's consecutive tokens."""
        size = tokens.shape[1] // self.size
        return tokens[:, self.rank * size : (self.rank + 1) * size]


def group_size(group: Any) -> int:
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Any) -> int:
    return 0 if group is None else dist.get_rank(group)


def context_groups(settings: ContextSettings) -> dict[int, ContextGroups]:
    """This rank's groups by the number of ranks that share a pack; a collective of Megatron's context group.

    Call it on every rank, in the same order as other collectives. Without `dynamic` there is one entry, of the whole
    context group.
    """
    from megatron.core import parallel_state

    both = dist.get_process_group_ranks(parallel_state.get_tensor_and_context_parallel_group())
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    context = parallel_state.get_context_parallel_world_size()
    mine = dist.get_process_group_ranks(parallel_state.get_context_parallel_group())
    assert both[parallel_state.get_tensor_model_parallel_rank() :: tensor] == mine, "tensor ranks must be consecutive"
    ready = {
        tuple(mine): parallel_state.get_context_parallel_group(),
        tuple(both): parallel_state.get_tensor_and_context_parallel_group(),
    }
    return {
        size: block_groups(size, both, tensor, settings, ready)
        for size in (degrees(context) if settings.dynamic else [context])
    }


def block_groups(
    size: int, both: list[int], tensor: int, settings: ContextSettings, ready: dict[tuple[int, ...], Any]
) -> ContextGroups:
    """The groups of the aligned block of `size` context ranks that this rank is in. Only members meet to make one."""

    def group(ranks: list[int]) -> Any:
        if len(ranks) == 1:
            return None
        if tuple(ranks) not in ready:
            ready[tuple(ranks)] = dist.new_group(ranks, use_local_synchronization=True)
        return ready[tuple(ranks)]

    rank, tensor_rank = divmod(both.index(dist.get_rank()), tensor)
    start = rank // size * size
    block = both[start * tensor : (start + size) * tensor]
    whole = block[tensor_rank::tensor]
    degree = ulysses_degree(size, settings.ulysses)
    inside = rank - start
    ulysses = whole[inside // degree * degree : (inside // degree + 1) * degree]
    ring = whole[inside % degree :: degree]
    groups = ContextGroups(group(whole), group(ulysses), group(ring), group(block), settings.cp_comm_type)
    if len(ring) > 1:
        _meet(groups.ring)
    return groups


def _meet(group: Any) -> None:
    """A first collective: NCCL wants one before point-to-point messages that not every rank takes part in."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dist.all_reduce(torch.zeros(1, device=device), group=group)
