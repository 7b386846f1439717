"""A run as NeMo-Run sees it: `stage_recipe(cfg)` is a `run.Partial` of `nemo.collections.llm.train`, or of `fit`.

There is one description of a stage, the RunConfig; the trainer, `molmo2 train` and NeMo-Run's executors (Slurm and
others) all build their objects from this recipe. The factories that `nemo llm train --factory molmo2_8b_long` finds are
registered in registration.py.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nemo.lightning as nl
import nemo_run as run
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.loggers import TensorBoardLogger
from megatron.core.distributed import DistributedDataParallelConfig
from nemo.lightning import configure_no_restart_validation_training_loop

from molmo2_nemo import compat, cpu
from molmo2_nemo.cost.parameters import parameters
from molmo2_nemo.errors import UserError
from molmo2_nemo.nemo.callbacks import (
    ProfileBegins,
    ProfileEnds,
    RotaryOfPhase,
    SeedEachStep,
    SkippedSteps,
    StopOnSignal,
)
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


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a recipe takes from where it is built, beside the settings.

    Without values it stands for a machine that is not known yet: NeMo's command shows a recipe on a login node, and a
    job builds it elsewhere.

    Attributes:
        cpu_only: whether there is no CUDA device.
        env: variables of a launcher (RANK, WORLD_SIZE, LOCAL_WORLD_SIZE) and of loggers.
    """

    cpu_only: bool | None = None
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def here(cls) -> Machine:
        return cls(cpu.is_cpu_only(), os.environ)


def fit(model: Any, data: Any, trainer: nl.Trainer, log: nl.NeMoLogger, resume: nl.AutoResume) -> None:
    """What `llm.train` does for a stage, without loading all of NeMo's models for it."""
    configure_no_restart_validation_training_loop(trainer)
    log.setup(trainer, resume_if_exists=resume.resume_if_exists)
    resume.setup(trainer, model)
    trainer.fit(model, data)


def stage_recipe(
    cfg: RunConfig, machine: Machine | None = None, train: Callable[..., Any] | None = None
) -> run.Partial:
    """The recipe of one stage, nothing built yet: model, data, trainer, log and resume.

    Args:
        machine: that builds it; default: this process.
        train: what takes these; default: `llm.train`.
    """
    if train is None:
        from nemo.collections import llm

        train = llm.train
    machine = machine or Machine.here()
    folder = paths.stage_dir(cfg)
    return run.Partial(
        train,
        model=model(cfg),
        data=run.Config(
            PackDataModule,
            as_config(data_config(cfg)),
            micro_batch_size=cfg.stage.micro_batch_size,
            global_batch_size=cfg.stage.global_batch_size,
            model=as_config(cfg.model),
            dynamic=dynamic_settings(cfg),
        ),
        trainer=trainer(cfg, folder, machine),
        log=log(cfg, folder, machine),
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
            on_host=cfg.memory.optimizer_offload,
            faults=as_config(cfg.faults),
        ),
        stage=stage,
        memory=as_config(cfg.memory),
        kernels=as_config(cfg.kernels),
        parallel=as_config(cfg.parallel),
        seed=cfg.seed,
        precision=cfg.cluster.precision,
        variable_length=bool(cfg.data.progression or cfg.data.lengths),
        task_of=task_names(cfg.data),
        features=as_config(cfg.data.feature_cache),
    )


def trainer(cfg: RunConfig, folder: Path, machine: Machine) -> run.Config:
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
            **(sharded_parameters(cfg) if parallel.fsdp == "megatron" else overlapped(cfg, machine)),
        ),
        fsdp=None if parallel.fsdp == "none" else parallel.fsdp,
        ckpt_async_save=cfg.checkpoint.async_save,
        ckpt_optim_fully_reshardable=parallel.distributed_optimizer,
        save_ckpt_format="torch_dist",
        replace_progress_bar=False,
    )
    return run.Config(
        nl.Trainer,
        devices=devices_per_node(cfg, machine),
        num_nodes=cfg.cluster.nodes,
        accelerator={True: "cpu", False: "gpu", None: "auto"}[machine.cpu_only],
        strategy=strategy,
        plugins=plugins(cfg, machine),
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
            *rotary_of_phase(cfg),
            *profile_begins(cfg, folder),
            run.Config(
                StepLog,
                str(folder),
                cfg.stage.name,
                cfg.log_every,
                max_crops=cfg.data.packing.max_crops,
                peak_tflops=cfg.log.peak_tflops,
                fp8=cfg.cluster.precision == "fp8",
                prometheus=cfg.log.prometheus,
            ),
            *([run.Config(ProfileEnds)] if cfg.log.profile else []),
            run.Config(SkippedSteps, str(folder)),
            run.Config(StopOnSignal),
            *validation(cfg, folder),
            *evaluation(cfg, folder),
        ],
    )


def overlapped(cfg: RunConfig, machine: Machine) -> dict[str, bool]:
    """What of the data-parallel communication runs beside computation, as Megatron's DDP has it.

    Where nothing is set, all of it on GPUs, and DDP's own defaults where the machine is not known. Not the gradients
    under dynamic context parallelism: a rank that is done with its micro-batches would send while others still share
    theirs, and NCCL's order of sends would differ by rank.
    """
    parallel = cfg.parallel
    asked = {
        "overlap_grad_reduce": parallel.overlap_grad_reduce,
        "overlap_param_gather": parallel.overlap_param_gather,
    }
    usual = {}
    if machine.cpu_only is not None:
        processes = int(machine.env.get("WORLD_SIZE", wanted_processes(cfg)))
        sends = not machine.cpu_only and processes > parallel.tensor * parallel.pipeline
        usual = {
            "overlap_grad_reduce": sends and not parallel.dynamic_context,
            "overlap_param_gather": sends and parallel.distributed_optimizer,
        }
    return usual | {name: value for name, value in asked.items() if value is not None}


def sharded_parameters(cfg: RunConfig) -> dict[str, Any]:
    """Megatron-FSDP's settings beside those of any DDP. It gathers one layer ahead, and up to two layers' gradients are
    on their way. Outside the layers each parameter travels alone: Megatron-FSDP pads what travels together to rows of
    all the shapes in it, which for an encoder and an embedding are more than the parameters."""
    layer = parameters(cfg.model.model_config()).layer
    return {
        "use_megatron_fsdp": True,
        "data_parallel_sharding_strategy": "optim_grads_params",
        "bucket_size": 1,
        "suggested_communication_unit_size": 2 * layer,
    }


def profile_begins(cfg: RunConfig, folder: Path) -> list[run.Config]:
    """The callback that profiles some steps, if any."""
    if cfg.log.profile is None:
        return []
    return [run.Config(ProfileBegins, str(folder), cfg.stage.name, list(cfg.log.profile), list(cfg.log.profile_ranks))]


def rotary_of_phase(cfg: RunConfig) -> list[run.Config]:
    """The callback that changes the rotary factor, if phases have one."""
    if all(phase.rope_factor is None for phase in cfg.data.progression):
        return []
    return [run.Config(RotaryOfPhase, as_config(cfg.model), as_config(cfg.data))]


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


def log(cfg: RunConfig, folder: Path, machine: Machine) -> run.Config:
    """NeMoLogger with TensorBoard, W&B or MLflow, and a checkpoint every `save_every` steps.

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
        extra_loggers=[logger] if (logger := mlflow(cfg, folder, machine)) is not None else [],
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
    refuse_missing(wandb=cfg.log.wandb)
    from lightning.pytorch.loggers import WandbLogger

    return run.Config(WandbLogger, project=cfg.log.wandb, name=run_name(cfg), save_dir=str(folder))


def mlflow(cfg: RunConfig, folder: Path, machine: Machine) -> run.Config | None:
    """The logger to MLflow, if it is asked for: to the server that MLFLOW_TRACKING_URI names, else to a folder of the
    stage.

    Raises:
        UserError: the package mlflow is not installed.
    """
    if cfg.log.mlflow is None:
        return None
    refuse_missing(mlflow=cfg.log.mlflow)
    from lightning.pytorch.loggers import MLFlowLogger

    server = machine.env.get("MLFLOW_TRACKING_URI") or f"file:{(folder / paths.MLFLOW).resolve()}"
    return run.Config(MLFlowLogger, experiment_name=cfg.log.mlflow, run_name=run_name(cfg), tracking_uri=server)


def refuse_missing(**wanted: str | None) -> None:
    """Refuse loggers whose packages are missing; in a run that NeMo starts nobody has looked before."""
    for problem in compat.logger_problems(wanted):
        raise UserError(problem)


def run_name(cfg: RunConfig) -> str:
    """What a stage is called at services that show several runs: `8b/sft`."""
    return f"{Path(cfg.output_dir).name}/{cfg.stage.name}"


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


def devices_per_node(cfg: RunConfig, machine: Machine) -> int:
    """Processes on one node: what the launcher started, else what the layout needs."""
    if "LOCAL_WORLD_SIZE" in machine.env:
        return int(machine.env["LOCAL_WORLD_SIZE"])
    return wanted_processes(cfg) // cfg.cluster.nodes


def plugins(cfg: RunConfig, machine: Machine) -> list[run.Config]:
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
    if "RANK" in machine.env and "WORLD_SIZE" in machine.env:
        found.append(run.Config(TorchElasticEnvironment))
    return found


def described_recipe(cfg: RunConfig) -> dict[str, Any]:
    """The arguments of `stage_recipe`, unbuilt and whatever the machine: the same where NeMo's command is typed and
    where a job runs it."""
    recipe = stage_recipe(cfg, Machine())
    return {name: described(getattr(recipe, name)) for name in ("model", "data", "trainer", "log", "resume")}


def described(value: Any) -> Any:
    """A recipe that is passed on as it is: built, it gives plain settings, and of everything else (trainer, strategy,
    model) what it would be made of, as `functools.partial`."""
    if isinstance(value, run.Config):
        made = value.__fn_or_cls__
        kind = run.Config if dataclasses.is_dataclass(made) else run.Partial
        return kind(made, bind_args=False, **{k: described(v) for k, v in value.__arguments__.items()})
    if isinstance(value, dict):
        return {k: described(v) for k, v in value.items()}
    if isinstance(value, list):
        return [described(v) for v in value]
    return value


def as_config(value: Any) -> Any:
    """A dataclass instance as nested `run.Config`s, which NeMo-Run can print, override and ship to a cluster."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: as_config(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return run.Config(type(value), **fields)
    if isinstance(value, dict):
        return {k: as_config(v) for k, v in value.items()}
    return value
