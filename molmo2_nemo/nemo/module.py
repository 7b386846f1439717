"""Molmo2 as NeMo sees it: a LightningModule on MegatronParallel, and what it hands to Megatron as a step's loss."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from nemo.lightning import io
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import Tensor

from molmo2_nemo.errors import UserError
from molmo2_nemo.model.config import NOTHING_TRAINS, MemoryConfig, Molmo2Config, Trainable, with_options
from molmo2_nemo.model.decoder import transformer_config
from molmo2_nemo.model.inputs import PackInputs
from molmo2_nemo.model.loss import LossSums, global_loss, global_sums
from molmo2_nemo.model.molmo2 import Molmo2Model
from molmo2_nemo.nemo.data import pack_data
from molmo2_nemo.parallel.context import ContextSettings
from molmo2_nemo.parallel.dynamic import without_padding
from molmo2_nemo.settings.run import ClusterConfig, ModelSelection, ParallelConfig, RunConfig, StageConfig
from molmo2_nemo.training.step_result import StepResult
from molmo2_nemo.training.step_statistics import task_ids


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
        self.result.weight = self.result.weight + sums.weight
        # Megatron adds the middle value to an integer count that Molmo2's optimizer module does not use.
        unused = torch.zeros((), dtype=torch.int, device=sums.loss.device)
        return sums.loss, unused, {"sums": sums.numbers(self.num_tasks)}

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, Tensor]]) -> Tensor:
        """Mean loss of the global batch, over micro-batches, data and context parallel ranks."""
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        total = global_sums([x["sums"] for x in losses_reduced_per_micro_batch], group)
        self.result.loss, self.result.task_sums = global_loss(total), total[2:].tolist()
        return self.result.loss


class Molmo2Module(pl.LightningModule, io.IOMixin, io.ConnectorMixin):
    """Molmo2 for `nemo.lightning.Trainer` with `MegatronStrategy`.

    Args:
        model: what to train; a preset's name stands for that preset with the options of ModelSelection. A Molmo2Config
            is taken as it is.
        optim: optimizer module; None for inference and conversion.
        stage: trainable parts, adapters, dropout and loss; the optimizer's part of the stage is in `optim`.
        memory: what is traded for memory.
        parallel: how ranks that share a pack work together.
        seed: fresh parameters are drawn from it, alike under every layout.
        precision: dtype of parameters, "fp32" or "bf16".
        variable_length: packs of one run differ in length, so pipeline stages send each other the shapes.
        task_of: data set -> the task that its loss is logged under.

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
        parallel: ParallelConfig | None = None,
        seed: int = RunConfig.seed,
        precision: str = ClusterConfig.precision,
        variable_length: bool = False,
        task_of: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.stage, self.memory = stage or StageConfig(), memory or MemoryConfig()
        self.parallel, self.seed = parallel or ParallelConfig(), seed
        self.model_config = chosen_model(model, self.stage)
        params_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.config = transformer_config(
            self.model_config,
            self.memory,
            params_dtype=params_dtype,
            pipeline_dtype=params_dtype,
            # of what pipeline stages send each other
            variable_seq_lengths=variable_length or self.parallel.dynamic_context or self.parallel.cut_padding,
            bf16=precision == "bf16",
            use_cpu_initialization=not torch.cuda.is_available(),
        )
        self.trainable = self.stage.trainable(self.model_config)
        if optim is not None and not self.trainable.any():
            raise UserError(NOTHING_TRAINS)
        self.tasks = sorted(set((task_of or {}).values()))  # what the loss is also logged for
        self.task_number = {source: self.tasks.index(task) for source, task in (task_of or {}).items()}
        self.step_result = StepResult()
        self.model_transform = None  # NeMo's callbacks look for it (adapters); Molmo2 has none
        self.optim = optim
        if optim is not None:
            optim.connect(self)

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
        self.module = Molmo2Model(
            self.model_config,
            self.config,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            training=self.stage.training_options(),
            memory=self.memory,
            context=context_settings(self.parallel),
            seed=self.seed,
        )
        self.groups, self.kernel = self.module.groups, self.module.kernel
        freeze(self.module, self.trainable)

    def on_train_start(self) -> None:
        if self.trainer.is_global_zero:
            print(f"attention: {self.kernel.name}, {self.kernel.title}", flush=True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin a step. Its data is fetched by the step itself."""
        self.step_result = StepResult()
        self.optim.result = self.step_result

    def data_step(self, dataloader_iter: Iterator[Any]) -> PackInputs:
        """The next micro-batch, on this rank's device. Remembers the loader's state after it, for checkpoints."""
        statistics = self.step_result.statistics
        start = time.perf_counter()
        batch = next(dataloader_iter)
        statistics.wait += time.perf_counter() - start
        if isinstance(batch, tuple):
            batch = batch[0]
        if (data := pack_data(self.trainer)) is not None:
            data.consumed(batch.state)
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        groups = self.groups[batch.context_ranks or max(self.groups)]
        if groups.rank == 0 and is_first_of_replica(context=False):
            statistics.add(batch, self.model_config, self.trainable)
        if self.parallel.cut_padding:
            tensor = parallel_state.get_tensor_model_parallel_world_size() if self.config.sequence_parallel else 1
            batch = without_padding(batch, groups.size * tensor)
        inputs = PackInputs.from_batch(batch, device)
        inputs.groups = groups
        if self.tasks and batch.sources and all(name in self.task_number for pack in batch.sources for name in pack):
            inputs.tasks = torch.as_tensor(task_ids(batch, self.task_number)).to(device, non_blocking=True)
            inputs.num_tasks = len(self.tasks)
        return inputs

    def forward(self, inputs: PackInputs) -> Tensor | LossSums:
        return self.module(inputs)

    def forward_step(self, batch: PackInputs) -> Tensor | LossSums:
        return self(batch)

    def training_step(self, batch: PackInputs, batch_idx: int | None = None) -> Any:
        return self.forward_step(batch)

    @property
    def training_loss_reduction(self) -> WeightedLossReduction:
        return WeightedLossReduction(self.step_result, len(self.tasks))


def is_first_of_replica(*, context: bool = True) -> bool:
    """True on one of the ranks that work on the same packs; without `context`, on one for each context rank."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.is_pipeline_first_stage()
        and (not context or parallel_state.get_context_parallel_rank() == 0)
    )


def chosen_model(model: ModelSelection | Molmo2Config | str | None, stage: StageConfig) -> Molmo2Config:
    """The configuration of the selected model, with the stage's adapters."""
    if isinstance(model, Molmo2Config):
        return with_options(model, lora=stage.lora, attention=model.attention)
    if isinstance(model, str):
        model = ModelSelection(preset=model)
    return (model or ModelSelection()).model_config(stage.lora)


def context_settings(parallel: ParallelConfig) -> ContextSettings:
    """How ranks that share a pack work together in attention."""
    return ContextSettings(parallel.context_ulysses, parallel.cp_comm_type, parallel.dynamic_context)


def freeze(model: Molmo2Model, trainable: Trainable) -> None:
    """Switches off gradients of parts that are not trainable. Parameters' names decide; `OptimConfig` has the
    groups."""
    from molmo2_nemo.nemo.optimizer import group_of

    for name, parameter in model.named_parameters():
        part = group_of(name)
        if name == "embedding.base.weight":
            part = "base_embedding"
        elif name == "output_layer.weight":
            part = "head"
        elif "lora_" in name:
            part = "adapters"
        parameter.requires_grad_(getattr(trainable, part))
