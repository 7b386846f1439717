"""Memory."""

from __future__ import annotations

import resource
from typing import Any

import torch

from molmo2_nemo.training.metrics.interface import FinishedStep, Metric


class PeakMemory(Metric):
    """GiB of the process that has held most since the run began."""

    place = 90

    def largest(self, step: FinishedStep) -> list[float]:
        return [memory_gib()]

    def figures(self, step: FinishedStep, summed: list[float], largest: list[float]) -> dict[str, Any]:
        return {"memory_gib": largest[0]}


class PinnedMemory(Metric):
    """GiB of host memory that the process with the most of it has pinned for copies to and from its GPU; without a GPU
    no figure."""

    place = 91

    def largest(self, step: FinishedStep) -> list[float]:
        return [pinned_gib()]

    def figures(self, step: FinishedStep, summed: list[float], largest: list[float]) -> dict[str, Any]:
        return {"pinned_gib": largest[0]} if torch.cuda.is_available() else {}


def pinned_gib() -> float:
    """What PyTorch has pinned of the host's memory at most: batches, and pages of offload (model/host_memory.py)."""
    stats = torch.cuda.host_memory_stats() if torch.cuda.is_available() else {}
    return float(stats.get("allocated_bytes.peak", 0)) / 2**30


def memory_gib() -> float:
    """The most memory this process has held: of the device, or of the host where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
