"""The data module: packs of this data-parallel rank, and the loader's state in the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from megatron.core import parallel_state
from nemo.lightning.pytorch.plugins import MegatronDataSampler

from molmo2_nemo.data.config import DataConfig


class PackSampler(MegatronDataSampler):
    """Tells Megatron's schedule the sizes of a step. The stream itself already yields this rank's micro-batches."""

    def transform_dataloader(self, dataloader: Any, consumed_samples: int = 0) -> Any:
        return dataloader


class PackDataModule(pl.LightningDataModule):
    """Packs from shards, with exact resume.

    The checkpoint holds, as JSON, the loader state after the last micro-batch that every data-parallel rank has
    consumed; what was prefetched but not consumed is read again.

    Args:
        config: the data settings; sequence length comes from its packing part.
        micro_batch_size, global_batch_size: packs per forward pass and per optimizer step.
    """

    def __init__(self, config: DataConfig, micro_batch_size: int, global_batch_size: int) -> None:
        super().__init__()
        self.config = config
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.seq_length = config.packing.sequence_length  # the three that NeMo reads from a data module
        self.data_sampler = PackSampler(
            seq_len=config.packing.sequence_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            output_log=False,
        )
        self._consumed: dict[str, Any] | None = None
        self._restored: list[dict[str, Any]] | None = None

    def train_dataloader(self) -> Any:
        from molmo2_nemo.data.loader import PackStream

        stream = PackStream(
            self.config,
            micro_batch_size=self.micro_batch_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
        )
        if self._restored is not None:
            stream.load_states(self._restored)
        return stream

    def consumed(self, state: dict[str, Any]) -> None:
        """Called for every micro-batch that training takes."""
        self._consumed = state

    def state_dict(self) -> dict[str, Any]:
        """The states of all data-parallel ranks; called on every rank."""
        group = parallel_state.get_data_parallel_group()
        states: list[dict[str, Any] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(states, self._consumed, group=group)
        return {"loader": json.dumps(states)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = json.loads(state_dict["loader"])
        self._restored = [s for s in states if s is not None] or None

    def __iter__(self) -> Iterator[Any]:
        return iter(self.train_dataloader())
