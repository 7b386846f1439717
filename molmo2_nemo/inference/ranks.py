"""Prompts dealt out to data-parallel ranks, and what they answered brought together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch.distributed as dist

TOGETHER = 8  # neighbouring items that one replica gets, at most


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


def from_first(value: Any) -> Any:
    """The first rank's value, on every rank. A collective of all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def runs_of(count: int, own: Place) -> list[int]:
    """The items, of 0 to `count` - 1, that a replica works on. Neighbours, which are often about the same film, stay
    together where there are many for each replica."""
    together = max(1, min(TOGETHER, count // (4 * own.replicas)))
    return [item for item in range(count) if item // together % own.replicas == own.replica]


def summed(counts: Mapping[str, int], *, replicas: bool) -> dict[str, int]:
    """The sums over all ranks, or over the replicas. A collective of all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return dict(counts)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, dict(counts) if place().speaks or not replicas else {})
    return {name: sum(part.get(name, 0) for part in found) for name in counts}


def is_first() -> bool:
    """Whether this rank shows and writes what all have found."""
    return not dist.is_initialized() or dist.get_rank() == 0
