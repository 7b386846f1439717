"""One stage of training: a RunConfig in, checkpoints, metrics and a summary out.

The trainer is NeMo's: `nemo.lightning.Trainer` with `MegatronStrategy`, `NeMoLogger` and `AutoResume`. Called in every
process of the run, with torchrun's (or Slurm's) environment when there are several.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

from molmo2_nemo.config import RunConfig
from molmo2_nemo.parallel import platform


def train(cfg: RunConfig) -> dict[str, Any]:
    """Run (or resume, or find finished) the stage that `cfg` describes.

    The folder is `<output_dir>/<stage name>`: checkpoints/, tb/, metrics.jsonl, and summary.json when done. If a
    finished checkpoint is there, training goes on from it, exactly; otherwise it starts from `cfg.init_from`'s weights,
    or fresh.

    Returns:
        The summary: stage, layout, steps, first and last loss, tokens, fill, checkpoint.

    Raises:
        ValueError, FileNotFoundError: something the user can mend, found before the first step.
    """
    quiet()
    platform.enable(cfg.cluster.threads)
    start_nemo()
    from molmo2_nemo.nemo.callbacks import Metrics, SeedEachStep
    from molmo2_nemo.nemo.data import PackDataModule

    folder = stage_folder(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    module = build_module(cfg)
    resume_from = latest_checkpoint(folder / "checkpoints")
    if cfg.init_from and resume_from is None:
        check_model(Path(cfg.init_from), module.molmo2)
    data = PackDataModule(cfg.data, cfg.stage.micro_batch_size, cfg.stage.global_batch_size)
    metrics = Metrics(folder, cfg.stage.name, cfg.log_every)
    trainer = build_trainer(cfg, folder, [SeedEachStep(cfg.seed), metrics])
    set_up_resume(cfg, trainer, resume_from)
    trainer.fit(module, data)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    summary = {
        "stage": cfg.stage.name,
        "layout": layout_name(cfg),
        "steps": trainer.global_step,
        "first_loss": metrics.first_loss,
        "last_loss": metrics.last_loss,
        "tokens": metrics.tokens,
        "fill": metrics.tokens / max(metrics.slots, 1),
        "checkpoint": str(checkpoint),
    }
    if trainer.is_global_zero:
        write_json(folder / "summary.json", summary)
    return summary


def start_nemo() -> None:
    """Import NeMo with the CPU stand-ins in place, and without NVIDIA's job telemetry (it would want settings of its
    own, and this project sends nothing anywhere)."""
    from nemo.lightning.callback_group import CallbackGroup

    platform.enable_megatron()
    CallbackGroup.get_instance().callbacks.clear()


def stage_folder(cfg: RunConfig) -> Path:
    return Path(cfg.output_dir) / cfg.stage.name


def build_module(cfg: RunConfig) -> Any:
    """The LightningModule with its optimizer, from a run's config."""
    from molmo2_nemo.nemo.module import Molmo2Module
    from molmo2_nemo.nemo.optimizer import Molmo2Optimizer

    stage = cfg.stage
    bf16 = cfg.cluster.precision == "bf16"
    return Molmo2Module(
        cfg.model.preset,
        Molmo2Optimizer(stage.optim, stage.max_steps, bf16=bf16, distributed=cfg.parallel.distributed_optimizer),
        seed=cfg.seed,
        z_loss=stage.z_loss,
        dropout=stage.residual_dropout,
        response_dropout=stage.response_residual_dropout,
        trainable={
            "vit": stage.train_vit,
            "connector": stage.train_connector,
            "llm": stage.train_llm,
            "base_embedding": stage.train_base_embedding,
        },
        recompute=cfg.parallel.recompute,
        float32_attention=cfg.model.float32_attention,
        visual_attention=cfg.model.visual_attention,
        dtype=cfg.cluster.precision,
    )


def build_trainer(cfg: RunConfig, folder: Path, callbacks: list[Any]) -> Any:
    """NeMo's trainer on MegatronStrategy, laid out and logging as the config says."""
    import nemo.lightning as nl
    import torch
    from lightning.pytorch.loggers import TensorBoardLogger
    from megatron.core.distributed import DistributedDataParallelConfig
    from nemo.lightning.pytorch.callbacks import ModelCheckpoint

    parallel = cfg.parallel
    on_gpu = not platform.is_cpu_only()
    strategy = nl.MegatronStrategy(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        pipeline_dtype=torch.bfloat16 if cfg.cluster.precision == "bf16" else torch.float32,
        ddp=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            check_for_nan_in_grad=False,  # the clipping optimizer checks the norms it computes anyway
            use_distributed_optimizer=parallel.distributed_optimizer,
        ),
        ckpt_async_save=False,
        ckpt_optim_fully_reshardable=parallel.distributed_optimizer,
        ckpt_load_optimizer=True,
        save_ckpt_format="torch_dist",
        replace_progress_bar=False,
    )
    trainer = nl.Trainer(
        devices=devices_per_node(cfg),
        num_nodes=cfg.cluster.nodes,
        accelerator="gpu" if on_gpu else "cpu",
        strategy=strategy,
        plugins=plugins(cfg),
        max_steps=cfg.stage.max_steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=cfg.log_every,
        use_distributed_sampler=False,
        callbacks=callbacks,
    )
    checkpoint = ModelCheckpoint(
        dirpath=str(folder / "checkpoints"),
        filename="{step}",
        monitor=None,
        save_last=True,
        save_top_k=0,
        every_n_train_steps=cfg.save_every,
        always_save_context=False,
        save_context_on_train_end=False,
    )
    logger = nl.NeMoLogger(
        name="",
        explicit_log_dir=str(folder),
        ckpt=checkpoint,
        tensorboard=TensorBoardLogger(save_dir=str(folder), name="tb", version=""),
        update_logger_directory=False,
        log_global_rank_0_only=True,
    )
    logger.setup(trainer, resume_if_exists=True)
    return trainer


def set_up_resume(cfg: RunConfig, trainer: Any, resume_from: Path | None) -> None:
    """Go on from this run's checkpoint, or start from the weights of the stage before."""
    import nemo.lightning as nl

    restore = None
    if cfg.init_from:
        restore = nl.RestoreConfig(
            path=str(cfg.init_from), load_model_state=True, load_optim_state=False, load_artifacts=False
        )
    resume = nl.AutoResume(resume_from_path=str(resume_from) if resume_from else None, restore_config=restore)
    resume.setup(trainer)


def devices_per_node(cfg: RunConfig) -> int:
    """Processes on one node: what the launcher started, else what the layout needs."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    if cfg.cluster.devices is not None:
        return cfg.cluster.devices
    parallel = cfg.parallel
    return parallel.tensor * parallel.context * parallel.pipeline * parallel.data // cfg.cluster.nodes


def plugins(cfg: RunConfig) -> list[Any]:
    """Precision, and where ranks come from."""
    import nemo.lightning as nl
    from lightning.fabric.plugins.environments import TorchElasticEnvironment

    found: list[Any] = []
    if cfg.cluster.precision == "bf16":
        found.append(nl.MegatronMixedPrecision(precision="bf16-mixed", grad_reduce_in_fp32=True))
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        found.append(TorchElasticEnvironment())
    return found


def layout_name(cfg: RunConfig) -> str:
    """A layout in a few letters, such as "TP2+SP" or "DP2"; "1 process" when nothing is split."""
    parallel = cfg.parallel
    names = {"TP": parallel.tensor, "CP": parallel.context, "PP": parallel.pipeline}
    parts = [f"{name}{size}" for name, size in names.items() if size > 1]
    if parallel.sequence:
        parts.insert(1, "SP")
    world = int(os.environ.get("WORLD_SIZE", parallel.tensor * parallel.context * parallel.pipeline * parallel.data))
    data = world // (parallel.tensor * parallel.context * parallel.pipeline)
    if data > 1:
        parts.append(f"DP{data}")
    return "+".join(parts) or "1 process"


def latest_checkpoint(folder: Path) -> Path | None:
    """The finished checkpoint of the highest step in a run's checkpoints/ folder.

    NeMo marks a checkpoint as unfinished while it is being written; a run killed then leaves the mark, and the
    checkpoint is never looked at again (NeMo removes it when the next run starts).
    """
    from nemo.lightning.pytorch.callbacks import ModelCheckpoint

    found = {}
    for path in folder.glob("step=*"):
        if path.is_dir() and not ModelCheckpoint.is_checkpoint_unfinished(path):
            found[int(path.name.removeprefix("step=").split("-")[0])] = path
    return found[max(found)] if found else None


def check_model(checkpoint: Path, molmo2: Any) -> None:
    """Refuse a checkpoint of another model before anything is built from it.

    Raises:
        ValueError: no finished checkpoint there, or its tensors are not this model's; names the differences.
    """
    from molmo2_nemo.convert.megatron_io import MegatronCheckpoint
    from molmo2_nemo.convert.names import ConversionError

    try:
        MegatronCheckpoint(checkpoint).check(molmo2)
    except ConversionError as error:
        raise ValueError(
            f"init_from={checkpoint} cannot start a {molmo2.name!r} model: {error}. Name a checkpoint of the same model, "
            "or choose the model it was made from"
        ) from None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def quiet() -> None:
    """Keep the stack's start-up chatter off a user's screen; warnings of our own still show."""
    os.environ.setdefault("NEMO_LOG_TRAIN_LOSS", "1")
    os.environ.setdefault("ONE_LOGGER_JOB_CATEGORY", "test")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "megatron", "nv_one_logger", "nemo_logger", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
