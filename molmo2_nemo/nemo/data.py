"""The data module: packs of this data-parallel rank, and the loader's state in the checkpoint.

With several processes and `data.share_packs`, one rank of each model-parallel group reads for all of it and a step's
micro-batches are balanced by cost (parallel/packs.py); otherwise every rank reads for itself.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.plugins import MegatronDataSampler

from molmo2_nemo.cost.flops import forward_flops
from molmo2_nemo.data.balance import CostModel
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.parallel.packs import SharedPacks, pack_groups
from molmo2_nemo.settings.run import ModelSelection
from molmo2_nemo.training.dynamic_context import DynamicSettings, dynamic_context


class PackSampler(MegatronDataSampler):
    """Gives Megatron's schedule the sizes of a step. The stream itself already yields this rank's micro-batches."""

    packs: SharedPacks | None = None  # asked how many micro-batches this rank has, where they are assigned step by step

    def transform_dataloader(self, dataloader: Any, consumed_samples: int = 0) -> Any:
        return dataloader

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        step = super().on_megatron_step_start(step)
        if self.packs is None or self.packs.dynamic is None or step.forward_only:
            return step
        return dataclasses.replace(step, num_microbatches=self.packs.upcoming())


class PackDataModule(pl.LightningDataModule):
    """Packs from shards, with exact resume.

    The checkpoint holds, as JSON, the loader state after the last micro-batch that every data-parallel rank has
    consumed; what was prefetched but not consumed is read again.

    Args:
        config: the data settings; sequence length comes from its packing part.
        micro_batch_size, global_batch_size: packs per forward pass and per optimizer step.
        model: the model, by whose FLOPs packs are balanced.
        dynamic: how micro-batches are assigned to blocks of the context group; None: all its ranks share each.
    """

    def __init__(
        self,
        config: DataConfig,
        micro_batch_size: int,
        global_batch_size: int,
        model: ModelSelection | None = None,
        dynamic: DynamicSettings | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.model, self.dynamic = (model or ModelSelection()).model_config(), dynamic
        self.cost = cost_model(self.model)
        self.seq_length = config.packing.sequence_length  # NeMo reads this and the two sizes from a data module
        self.data_sampler = PackSampler(
            seq_len=config.packing.sequence_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            output_log=False,
        )
        self._consumed: dict[str, Any] | None = None
        self._restored: list[dict[str, Any]] | None = None

    def train_dataloader(self) -> Any:
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        count = self.global_batch_size // (self.micro_batch_size * size)

        def open_stream() -> Any:
            from molmo2_nemo.data.loader import PackStream
            from molmo2_nemo.data.ordering import CostOrder

            packs = PackStream(
                self.config,
                micro_batch_size=self.micro_batch_size,
                dp_rank=rank,
                dp_size=size,
                batches_per_step=count,
            )
            stream: PackStream | CostOrder = packs
            packing = self.config.packing
            if packing.balance and packing.balance_window > 1 and count == 1 and size > 1:
                stream = CostOrder(packs, packing.balance_window, self.cost)
            if self._restored is not None:
                stream.load_states(self._restored)
            return stream

        if not self.config.share_packs or dist.get_world_size() == 1:
            return open_stream()
        assert self.trainer is not None and self.trainer.max_steps > 0
        dynamic = None
        if self.dynamic is not None and parallel_state.get_context_parallel_world_size() > 1:
            dynamic = dynamic_context(self.dynamic, self.model)
        self.data_sampler.packs = SharedPacks(
            open_stream,
            pack_groups(rank, size),
            micro_batches=count,
            steps=self.trainer.max_steps - self.trainer.global_step,
            cost=self.cost if self.config.packing.balance else None,
            dynamic=dynamic,
        )
        return self.data_sampler.packs

    def consumed(self, state: dict[str, Any]) -> None:
        """Called for every micro-batch that training takes."""
        self._consumed = state

    @property
    def skipped(self) -> int:
        """Records this data-parallel rank could not use, up to the last micro-batch taken."""
        return sum((self._consumed or {}).get("skipped", {}).values())

    def totals(self) -> dict[str, dict[str, int]]:
        """Over all data-parallel ranks: records skipped per cause, and what was counted (examples, branches dropped,
        tokens cut, images left out). Called on every rank."""
        found: dict[str, Counter[str]] = {"skipped": Counter(), "counts": Counter()}
        for state in self._states():
            for name, counter in found.items():
                counter.update((state or {}).get(name, {}))
        return {name: dict(sorted(counter.items())) for name, counter in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """The loader states of all data-parallel ranks; called on every rank."""
        return {"loader": json.dumps(self._states())}

    def _states(self) -> list[dict[str, Any] | None]:
        if self._consumed is None and self._restored is not None:
            return list(self._restored)
        group = parallel_state.get_data_parallel_group()
        states: list[dict[str, Any] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(states, self._consumed, group=group)
        return states

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = json.loads(state_dict["loader"])
        self._restored = [s for s in states if s is not None] or None


def pack_data(trainer: Any) -> PackDataModule | None:
    """The data module that a trainer trains on; None without one that keeps a loader's state."""
    found = getattr(trainer, "datamodule", None)
    return found if isinstance(found, PackDataModule) else None


def cost_model(model_config: Molmo2Config) -> CostModel:
    """The cost of a pack for a model: its FLOPs, which are linear in every count."""

    def one(**counts: int) -> float:
        return forward_flops(model_config, **{"tokens": 0, "pairs": 0, **counts}).total

    return CostModel(
        token=one(tokens=1),
        pair=one(pairs=1),
        crop=one(crops=1),
        pooled_token=one(pooled_tokens=1),
        window_position=one(window_positions=1),
        score=one(scored_tokens=1),
        visual_attention=model_config.visual_attention,
        vocab_size=model_config.text.vocab_size,
    )
