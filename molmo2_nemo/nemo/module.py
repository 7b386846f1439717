"""Molmo2 as NeMo sees it: a LightningModule on MegatronParallel, and what it hands to Megatron as a step's loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from megatron.core import parallel_state
from nemo.lightning import io
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import Tensor

from molmo2_nemo.data.config import FeatureCacheConfig
from molmo2_nemo.errors import UserError
from molmo2_nemo.features.frozen import Counts
from molmo2_nemo.fused.choice import described
from molmo2_nemo.model.config import NOTHING_TRAINS, KernelConfig, MemoryConfig, Molmo2Config
from molmo2_nemo.model.flops import crop_flops
from molmo2_nemo.model.inputs import PackInputs
from molmo2_nemo.model.loss import LossSums
from molmo2_nemo.nemo.checkpoints import weights_to_come
from molmo2_nemo.nemo.data import training_data
from molmo2_nemo.settings.precision import token_multiple
from molmo2_nemo.settings.run import (
    ClusterConfig,
    ModelSelection,
    ParallelConfig,
    Precision,
    RunConfig,
    StageConfig,
)
from molmo2_nemo.training import overlap
from molmo2_nemo.training.model import (
    build_model,
    chosen_model,
    frozen_features,
    megatron_config,
    weight_gradient_library,
)
from molmo2_nemo.training.step import MicroBatches, micro_batch_loss, step_loss
from molmo2_nemo.training.step_result import StepResult
from molmo2_nemo.training.step_statistics import Tasks
from molmo2_nemo.training.whereabouts import here


class WeightedLossReduction(MegatronLossReduction):
    """Adds up a step's sums of weighted losses and of weights; model/loss.py says what they are.

    Args:
        result: of the step; receives the loss, the sums of tasks, and this rank's sum of weights.
        num_tasks: tasks that the loss is also logged for, see PackInputs.tasks.
    """

    def __init__(self, result: StepResult, num_tasks: int = 0) -> None:
        super().__init__()
        self.result, self.num_tasks = result, num_tasks

    def forward(self, batch: PackInputs, sums: LossSums) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """One micro-batch, on the last pipeline stage, as Megatron's schedules want it."""
        return micro_batch_loss(self.result, sums, self.num_tasks)

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, Tensor]]) -> Tensor:
        return step_loss(self.result, losses_reduced_per_micro_batch)


class Molmo2Module(pl.LightningModule, io.IOMixin, io.ConnectorMixin):
    """Molmo2 for `nemo.lightning.Trainer` with `MegatronStrategy`.

    Args:
        model: what to train; a preset's name stands for that preset with the options of ModelSelection. A Molmo2Config
            is taken as it is.
        optim: optimizer module; None for inference and conversion.
        stage: trainable parts, adapters, dropout and loss; the optimizer's part of the stage is in `optim`.
        memory: what is traded for memory.
        kernels: how pieces of the model are computed.
        parallel: how ranks that share a pack work together.
        seed: fresh parameters are drawn from it, alike under every layout.
        precision: `cluster.precision`; parameters are bf16 for "fp8", too.
        variable_length: packs of one run differ in length, so pipeline stages send each other the shapes.
        task_of: data set -> the task that its loss is logged under.
        features: how a frozen encoder's features are computed and kept.

    Raises:
        UserError: there is an optimizer, but every part is frozen.
    """

    def __init__(
        self,
        model: ModelSelection | Molmo2Config | str | None = None,
        optim: Any = None,
        *,
        stage: StageConfig | None = None,
        memory: MemoryConfig | None = None,
        kernels: KernelConfig | None = None,
        parallel: ParallelConfig | None = None,
        seed: int = RunConfig.seed,
        precision: Precision = ClusterConfig.precision,
        variable_length: bool = False,
        task_of: dict[str, str] | None = None,
        features: FeatureCacheConfig | None = None,
    ) -> None:
        super().__init__()
        self.stage, self.memory = stage or StageConfig(), memory or MemoryConfig()
        self.kernels, self.precision = kernels or KernelConfig(), precision
        self.parallel, self.seed = parallel or ParallelConfig(), seed
        self.feature_cache = features or FeatureCacheConfig()
        self.model_config = chosen_model(model, self.stage)
        self.config = megatron_config(
            self.model_config, self.memory, self.parallel, precision=precision, variable_length=variable_length
        )
        self.trainable = self.stage.trainable(self.model_config)
        if optim is not None and not self.trainable.any():
            raise UserError(NOTHING_TRAINS)
        self.tasks = Tasks(task_of or {})
        self.step_result = StepResult()
        self.optim = optim
        if optim is not None:
            optim.connect(self)

    @property
    def model_transform(self) -> None:
        """None: NeMo's callbacks and connectors look here for adapters of NeMo's own kind, and Molmo2 has none.

        Raises, where it is set (`peft` of llm.finetune, `model_transform` of llm.train):
            UserError: names the settings of Molmo2's adapters.
        """
        return None

    @model_transform.setter
    def model_transform(self, transform: Any) -> None:
        if transform is not None:
            raise UserError(
                f"NeMo's {type(transform).__name__} (peft, model_transform) is not applied to Molmo2, whose layers "
                "have adapters of their own: leave it out and set stage.lora.rank=64 stage.lora.alpha=128, for example "
                "in the factory's overrides='...'; scale=gpu_lora has rates that fit them"
            )

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Build this pipeline stage's part of the model (called by the strategy, on every rank)."""
        if hasattr(self, "module"):
            return
        parts = parallel_state.get_virtual_pipeline_model_parallel_world_size()
        if parts is not None:
            raise UserError(
                f"virtual_pipeline_model_parallel_size={parts}: interleaved pipeline stages are not supported, because "
                "packs are handed to one model part per rank; leave it unset and split layers with parallel.pipeline"
            )
        self.module = build_model(
            self.model_config,
            self.config,
            stage=self.stage,
            memory=self.memory,
            kernels=self.kernels,
            parallel=self.parallel,
            seed=self.seed,
            loaded=weights_to_come(self._trainer, self.model_config),
        )
        self.features = self.module.features = frozen_features(self.module, self.feature_cache)
        self.rotary = self.module.rotary
        self.groups, self.kernel, self.choices = self.module.groups, self.module.kernel, self.module.choices
        self.micro_batches = MicroBatches(
            self.model_config,
            self.trainable,
            self.groups,
            self.tasks,
            cut_padding=self.parallel.cut_padding,
            sequence_parallel=self.config.sequence_parallel,
            token_multiple=token_multiple(self.precision),
            balance_ring=self.parallel.ring_balance == "cost",
            plan=self.module.plan,
        )

    def on_train_start(self) -> None:
        if self.trainer.is_global_zero:
            print(f"attention: {self.kernel.name}, {self.kernel.title}", flush=True)
            print(described(self.choices), flush=True)
            print(overlap.described(self.trainer.strategy.ddp_config, weight_gradient_library()), flush=True)
            if self.features is not None:
                print(self.features.described(), flush=True)

    def on_train_end(self) -> None:
        if self.features is not None:
            self.features.close()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin a step. Its data is fetched by the step itself."""
        here.begin(self.trainer.global_step + 1)
        self.step_result = StepResult()
        if self.features is not None:
            self.step_result.features = self.features.counts = Counts()
            self.step_result.crop_flops = crop_flops(self.model_config)
        self.optim.result = self.step_result

    def data_step(self, dataloader_iter: Iterator[Any]) -> PackInputs:
        """The next micro-batch, on this rank's device. Remembers the loader's state after it, for checkpoints."""
        data = training_data(self.trainer)
        batches = (item[0] if isinstance(item, tuple) else item for item in dataloader_iter)  # (batch, number, loader)
        return self.micro_batches.take(batches, self.step_result, None if data is None else data.consumed)

    def forward(self, inputs: PackInputs) -> Tensor | LossSums:
        return self.module(inputs)

    def forward_step(self, batch: PackInputs) -> Tensor | LossSums:
        return self(batch)

    def training_step(self, batch: PackInputs, batch_idx: int | None = None) -> Any:
        return self.forward_step(batch)

    @property
    def training_loss_reduction(self) -> WeightedLossReduction:
        return WeightedLossReduction(self.step_result, len(self.tasks.names))
