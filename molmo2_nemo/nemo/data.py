"""The data module: training/data.py as Lightning and NeMo's schedule see it."""

from __future__ import annotations

import dataclasses
from typing import Any

import lightning.pytorch as pl
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.plugins import MegatronDataSampler

from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.settings.run import ModelSelection
from molmo2_nemo.training.data import TrainingData
from molmo2_nemo.training.dynamic_context import DynamicSettings


class PackSampler(MegatronDataSampler):
    """Gives Megatron's schedule the sizes of a step. The stream itself already yields this rank's micro-batches.

    Args:
        packs: asked how many micro-batches this rank has, where they are assigned step by step.
    """

    def __init__(self, packs: TrainingData) -> None:
        super().__init__(
            seq_len=packs.config.packing.sequence_length,
            micro_batch_size=packs.micro_batch_size,
            global_batch_size=packs.global_batch_size,
            output_log=False,
        )
        self.packs = packs

    def transform_dataloader(self, dataloader: Any, consumed_samples: int = 0) -> Any:
        return dataloader

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        step = super().on_megatron_step_start(step)
        number = None if step.forward_only else self.packs.upcoming()
        return step if number is None else dataclasses.replace(step, num_microbatches=number)


class PackDataModule(pl.LightningDataModule):
    """Packs from shards, with exact resume.

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
        model_config = (model or ModelSelection()).model_config()
        self.packs = TrainingData(config, micro_batch_size, global_batch_size, model_config, dynamic)
        # NeMo reads these from a data module
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.seq_length = config.packing.sequence_length
        self.data_sampler = PackSampler(self.packs)

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        module = self.trainer.lightning_module
        ahead = module.choices["inputs"].function
        steps = self.trainer.max_steps - self.trainer.global_step
        return self.packs.open(steps, module.micro_batches if ahead else None)

    def state_dict(self) -> dict[str, Any]:
        """Called on every rank."""
        return {"loader": self.packs.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.packs.load(state_dict["loader"])


def training_data(trainer: Any) -> TrainingData | None:
    """The packs that a trainer trains on; None without a data module that keeps a loader's state."""
    found = getattr(trainer, "datamodule", None)
    return found.packs if isinstance(found, PackDataModule) else None
