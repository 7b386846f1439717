"""What this rank's micro-batches of one step held: the figures behind the log. All of it is on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np

from molmo2_nemo.cost.flops import pack_flops, trained_flops
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.counts import PackCounts
from molmo2_nemo.data.example import Batch
from molmo2_nemo.model.config import Molmo2Config, Trainable


@dataclass
class StepStatistics:
    """Counts of one rank's micro-batches of a step."""

    tokens: int = 0  # without padding
    padded_tokens: int = 0  # with padding
    crops: int = 0
    packs: int = 0
    flops: float = 0.0  # of forward and backward, by mask area
    wait: float = 0.0  # seconds that training stood still for data
    keys: list[str] = field(default_factory=list)  # of the records

    def add(self, batch: Batch, model_config: Molmo2Config, trainable: Trainable) -> None:
        """Count a micro-batch, its FLOPs for a model of which the parts in `trainable` are trained."""
        counts = PackCounts.of(batch, model_config.visual_attention, model_config.text.vocab_size)
        self.tokens += counts.tokens
        self.padded_tokens += batch.example_ids.size
        self.crops += len(batch.crops)
        self.packs += counts.packs
        self.keys += [key for pack in batch.keys for key in pack]
        self.flops += trained_flops(pack_flops(model_config, counts), trainable).total

    def include(self, other: StepStatistics) -> None:
        """Add another's counts."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


def task_names(config: DataConfig) -> dict[str, str]:
    """Data set -> the task it is logged under: its group in the mixture, or itself."""
    return {name: source.group or name for name, source in config.sources.items()}


class Tasks:
    """What the loss is also logged for.

    Args:
        task_of: data set -> its task.
    """

    def __init__(self, task_of: Mapping[str, str]) -> None:
        self.names = sorted(set(task_of.values()))
        self._number = {source: self.names.index(task) for source, task in task_of.items()}

    def ids(self, batch: Batch) -> np.ndarray | None:
        """Which task each token belongs to, int64 [B, S]; padding counts as task 0 (its weight is 0). None where a data
        set has no task."""
        known = all(name in self._number for pack in batch.sources for name in pack)
        return task_ids(batch, self._number) if self.names and batch.sources and known else None


def task_ids(batch: Batch, number: Mapping[str, int]) -> np.ndarray:
    """Which task each token belongs to, int64 [B, S]; padding counts as task 0 (its weight is 0).

    Args:
        number: data set -> task.
    """
    rows = []
    size = batch.example_ids.shape[1]
    for sources, tokens in zip(batch.sources, batch.source_tokens, strict=True):
        found = np.repeat(np.array([number[name] for name in sources], dtype=np.int64), tokens)
        rows.append(np.pad(found, (0, size - len(found))))
    return np.stack(rows)
