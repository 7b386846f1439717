"""A run as NeMo-Run sees it: `stage_recipe(cfg)` is a `run.Partial` of `nemo.collections.llm.train`.

There is one description of a stage, the RunConfig; the trainer, `molmo2 train` and NeMo-Run's executors (Slurm and
others) all build their objects from this recipe. The factories that `nemo llm train --factory molmo2_8b_long` finds are
registered in registration.py.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import nemo.lightning as nl
import nemo_run as run
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.loggers import TensorBoardLogger
from megatron.core.distributed import DistributedDataParallelConfig
from nemo.collections import llm

from molmo2_nemo import compat, cpu
from molmo2_nemo.errors import UserError
from molmo2_nemo.nemo.callbacks import ProfileBegins, ProfileEnds, SeedEachStep, SkippedSteps, StopOnSignal
from molmo2_nemo.nemo.checkpoints import Resume, StageCheckpoints, VerifyingStrategy
from molmo2_nemo.nemo.data import PackDataModule
from molmo2_nemo.nemo.evaluation import Evaluation
from molmo2_nemo.nemo.module import Molmo2Module
from molmo2_nemo.nemo.optimizer import Molmo2Optimizer
from molmo2_nemo.nemo.step_log import StepLog
from molmo2_nemo.nemo.validation import Validation
from molmo2_nemo.rundir import paths
from molmo2_nemo.settings.run import RunConfig, data_config
from molmo2_nemo.settings.sizes import wanted_processes
from molmo2_nemo.training.dynamic_context import DynamicSettings
from molmo2_nemo.training.precision import FP8
from molmo2_nemo.training.step_statistics import task_names


def stage_recipe(cfg: RunConfig) -> run.Partial:
    """The recipe of one stage, nothing built yet: model, data, trainer, log and resume."""
    folder = paths.stage_dir(cfg)
    return run.Partial(
        llm.train,
        model=model(cfg),
        data=run.Config(
            PackDataModule,
            as_config(data_config(cfg)),
            micro_batch_size=cfg.stage.micro_batch_size,
            global_batch_size=cfg.stage.global_batch_size,
            model=as_config(cfg.model),
            dynamic=dynamic_settings(cfg),
        ),
        trainer=trainer(cfg, folder),
        log=log(cfg, folder),
        resume=resume(cfg, folder),
    )


def dynamic_settings(cfg: RunConfig) -> run.Config | None:
    """Settings of dynamic context parallelism; None where the run does not use it."""
    if not cfg.parallel.dynamic_context:
        return None
    return run.Config(
        DynamicSettings,
        as_config(cfg.parallel),
        as_config(cfg.memory),
        as_config(cfg.stage),
        cfg.data.packing.max_crops,
        cfg.cluster.precision,
        as_config(cfg.kernels),
    )


def model(cfg: RunConfig) -> run.Config:
    """The LightningModule with its optimizer."""
    stage = as_config(cfg.stage)
    return run.Config(
        Molmo2Module,
        as_config(cfg.model),
        run.Config(
            Molmo2Optimizer,
            stage.optim,
            cfg.stage.max_steps,
            bf16=cfg.cluster.precision != "fp32",
            distributed=cfg.parallel.distributed_optimizer,
            faults=as_config(cfg.faults),
        ),
        stage=stage,
        memory=as_config(cfg.memory),
        kernels=as_config(cfg.kernels),
        parallel=as_config(cfg.parallel),
        seed=cfg.seed,
        precision=cfg.cluster.precision,
        variable_length=bool(cfg.data.progression),
        task_of=task_names(cfg.data),
        features=as_config(cfg.data.feature_cache),
    )


def trainer(cfg: RunConfig, folder: Path) -> run.Config:
    """NeMo's trainer on MegatronStrategy, laid out as the config says."""
    parallel = cfg.parallel
    strategy = run.Config(
        VerifyingStrategy,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        pipeline_dtype=torch.float32 if cfg.cluster.precision == "fp32" else torch.bfloat16,
        ddp=run.Config(
            DistributedDataParallelConfig,
            grad_reduce_in_fp32=parallel.grad_reduce == "fp32",
            check_for_nan_in_grad=False,  # the clipping optimizer checks the norms it computes anyway
            use_distributed_optimizer=parallel.distributed_optimizer,
            **overlapped(cfg),
        ),
        ckpt_async_save=cfg.checkpoint.async_save,
        ckpt_optim_fully_reshardable=parallel.distributed_optimizer,
        save_ckpt_format="torch_dist",
        replace_progress_bar=False,
    )
    return run.Config(
        nl.Trainer,
        devices=devices_per_node(cfg),
        num_nodes=cfg.cluster.nodes,
        accelerator="cpu" if cpu.is_cpu_only() else "gpu",
        strategy=strategy,
        plugins=plugins(cfg),
        max_steps=cfg.stage.max_steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        logger=False,  # NeMoLogger adds those that the run uses
        enable_model_summary=False,
        log_every_n_steps=cfg.log_every,
        use_distributed_sampler=False,
        callbacks=[
            run.Config(SeedEachStep, cfg.seed),
            *profile_begins(cfg, folder),
            run.Config(
                StepLog,
                str(folder),
                cfg.stage.name,
                cfg.log_every,
                max_crops=cfg.data.packing.max_crops,
                peak_tflops=cfg.log.peak_tflops,
                fp8=cfg.cluster.precision == "fp8",
            ),
            *([run.Config(ProfileEnds)] if cfg.log.profile else []),
            run.Config(SkippedSteps, str(folder)),
            run.Config(StopOnSignal),
            *validation(cfg, folder),
            *evaluation(cfg, folder),
        ],
    )


def overlapped(cfg: RunConfig) -> dict[str, bool]:
    """What of the data-parallel communication runs beside computation, as Megatron's DDP has it.

    Where nothing is set, all of it on GPUs. Not the gradients under dynamic context parallelism: a rank that is done
    with its micro-batches would send while others still share theirs, and NCCL's order of sends would differ by rank.
    """
    parallel = cfg.parallel
    processes = int(os.environ.get("WORLD_SIZE", wanted_processes(cfg)))
    sends = not cpu.is_cpu_only() and processes > parallel.tensor * parallel.pipeline
    reduce, gather = parallel.overlap_grad_reduce, parallel.overlap_param_gather
    return {
        "overlap_grad_reduce": sends and not parallel.dynamic_context if reduce is None else reduce,
        "overlap_param_gather": sends and parallel.distributed_optimizer if gather is None else gather,
    }


def profile_begins(cfg: RunConfig, folder: Path) -> list[run.Config]:
    """The callback that profiles some steps, if any."""
    if cfg.log.profile is None:
        return []
    return [run.Config(ProfileBegins, str(folder), cfg.stage.name, list(cfg.log.profile), list(cfg.log.profile_ranks))]


def validation(cfg: RunConfig, folder: Path) -> list[run.Config]:
    """The callback that scores held-out data, if there is any."""
    if not cfg.validation.sources:
        return []
    return [run.Config(Validation, as_config(cfg.validation), as_config(data_config(cfg)), str(folder), cfg.stage.name)]


def evaluation(cfg: RunConfig, folder: Path) -> list[run.Config]:
    """The callback that evaluates tasks, if there are any."""
    if not cfg.evaluation.tasks:
        return []
    return [run.Config(Evaluation, as_config(cfg.evaluation), as_config(data_config(cfg)), str(folder), cfg.stage.name)]


def log(cfg: RunConfig, folder: Path) -> run.Config:
    """NeMoLogger with TensorBoard or W&B, and a checkpoint every `save_every` steps.

    NeMo's own logs get a folder of their own: on resume it moves whatever files it finds there into run_0, run_1, ...
    """
    return run.Config(
        nl.NeMoLogger,
        name="",
        explicit_log_dir=str(folder / paths.LOGS),
        ckpt=run.Config(StageCheckpoints, str(folder / paths.CHECKPOINTS), cfg.save_every, as_config(cfg.checkpoint)),
        tensorboard=run.Config(TensorBoardLogger, save_dir=str(folder), name=paths.TENSORBOARD, version="")
        if cfg.log.tensorboard
        else None,
        wandb=wandb(cfg, folder),
        update_logger_directory=False,
        log_global_rank_0_only=True,
    )


def wandb(cfg: RunConfig, folder: Path) -> run.Config | None:
    """The logger to Weights & Biases, if it is asked for.

    Raises:
        UserError: the package wandb is not installed.
    """
    if cfg.log.wandb is None:
        return None
    if (problem := compat.wandb_problem(cfg.log.wandb)) is not None:
        raise UserError(problem)
    from lightning.pytorch.loggers import WandbLogger

    name = f"{Path(cfg.output_dir).name}/{cfg.stage.name}"
    return run.Config(WandbLogger, project=cfg.log.wandb, name=name, save_dir=str(folder))


def resume(cfg: RunConfig, folder: Path) -> run.Config:
    """Resume from this stage's checkpoint, or start from the weights of the stage before."""
    restore = None
    if cfg.init_from:
        restore = run.Config(
            nl.RestoreConfig,
            path=str(cfg.init_from),
            load_model_state=True,
            load_optim_state=False,
            load_artifacts=False,
        )
    return run.Config(
        Resume,
        restore_config=restore,
        resume_from_directory=str(folder / paths.CHECKPOINTS),
        resume_if_exists=True,
        resume_ignore_no_checkpoint=True,
    )


def devices_per_node(cfg: RunConfig) -> int:
    """Processes on one node: what the launcher started, else what the layout needs."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return wanted_processes(cfg) // cfg.cluster.nodes


def plugins(cfg: RunConfig) -> list[run.Config]:
    """Plugins for precision, and for where ranks come from."""
    found = []
    if cfg.cluster.precision != "fp32":
        # Without params_dtype NeMo builds the model in fp32 before it casts it.
        found.append(
            run.Config(
                nl.MegatronMixedPrecision,
                precision="bf16-mixed",
                params_dtype=torch.bfloat16,
                **(FP8 if cfg.cluster.precision == "fp8" else {}),  # NeMo sets the model's fields from these
                grad_reduce_in_fp32=cfg.parallel.grad_reduce == "fp32",
            )
        )
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        found.append(run.Config(TorchElasticEnvironment))
    return found


def as_config(value: Any) -> Any:
    """A dataclass instance as nested `run.Config`s, which NeMo-Run can print, override and ship to a cluster."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: as_config(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return run.Config(type(value), **fields)
    if isinstance(value, dict):
        return {k: as_config(v) for k, v in value.items()}
    return value
