"""Prompts dealt out to data-parallel ranks, and what they answered brought together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist


class Place(NamedTuple):
    """Where this rank is among those that answer."""

    replica: int
    replicas: int
    speaks: bool  # for its replica: one of the ranks that share a model


def place() -> Place:
    """This rank's place; a process without groups is alone."""
    from megatron.core import parallel_state

    if not dist.is_initialized():
        return Place(0, 1, True)
    shared = parallel_state.get_tensor_model_parallel_rank() + parallel_state.get_context_parallel_rank()
    return Place(parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size(), shared == 0)


def gathered(lines: list[Any]) -> list[Any]:
    """The lines of all replicas, on every rank. A collective of all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return lines
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, lines if place().speaks else [])
    return [line for part in found for line in part]


def is_first() -> bool:
    """Whether this rank shows and writes what all have found."""
    return not dist.is_initialized() or dist.get_rank() == 0
