"""Configurations of the NeMo Framework Launcher (`run:`, `trainer:`, `exp_manager:`, `model:`): what each key is here.

They describe other models, so none is run as it is. The error that such a file gets has the command of ours that its
values make, and names every key that has no counterpart.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from molmo2_nemo.errors import nearest

# Top-level keys of the launcher's files that no file of ours has
MARKS = (
    "trainer",
    "run",
    "exp_manager",
    "cluster_type",
    "launcher_scripts_path",
    "base_results_dir",
    "training_config",
)

SAME = {  # theirs -> ours
    "run.results_dir": "output_dir",
    "run.time_limit": "cluster.slurm.time",
    "trainer.max_steps": "stage.max_steps",
    "trainer.num_nodes": "cluster.nodes",
    "trainer.devices": "cluster.devices",
    "trainer.log_every_n_steps": "log_every",
    "trainer.val_check_interval": "validation.every",
    "trainer.gradient_clip_val": "stage.optim.clip_grad",
    "exp_manager.wandb_logger_kwargs.project": "log.wandb",
    "exp_manager.create_tensorboard_logger": "log.tensorboard",
    "exp_manager.checkpoint_callback_params.every_n_train_steps": "save_every",
    "exp_manager.checkpoint_callback_params.save_top_k": "checkpoint.keep_last",
    "model.seed": "seed",
    "model.micro_batch_size": "stage.micro_batch_size",
    "model.global_batch_size": "stage.global_batch_size",
    "model.tensor_model_parallel_size": "parallel.tensor",
    "model.pipeline_model_parallel_size": "parallel.pipeline",
    "model.context_parallel_size": "parallel.context",
    "model.sequence_parallel": "parallel.sequence",
    "model.encoder_seq_length": "data.packing.sequence_length",
    "model.restore_from_path": "init_from",
    "model.optim.lr": "stage.optim.llm.lr",
    "model.optim.weight_decay": "stage.optim.weight_decay",
    "model.optim.sched.warmup_steps": "stage.optim.llm.warmup_steps",
    "model.activations_checkpoint_granularity": "memory.recompute",
    "model.peft.lora_tuning.adapter_dim": "stage.lora.rank",
    "model.peft.lora_tuning.alpha": "stage.lora.alpha",
    "container": "cluster.slurm.container",
    "container_mounts": "cluster.slurm.mounts",
    "env_vars": "cluster.slurm.env",
}
PRECISIONS = {"bf16": "bf16", "bf16-mixed": "bf16", "32": "fp32", "32-true": "fp32"}
OF_COURSE = (  # how every run is here, whatever they say
    *("trainer.accelerator", "trainer.logger", "trainer.enable_checkpointing", "trainer.use_distributed_sampler"),
    *("trainer.replace_sampler_ddp", "exp_manager.resume_if_exists", "exp_manager.resume_ignore_no_checkpoint"),
    *("exp_manager.create_checkpoint_callback", "exp_manager.exp_dir", "exp_manager.explicit_log_dir"),
    *("exp_manager.create_wandb_logger", "exp_manager.name", "run.name", "run.dependency", "stages"),
)
STAGES = {  # the launcher's -> what does it here
    "data_preparation": "molmo2 prepare",
    "training": "the stages pretrain, sft and long",
    "fine_tuning": "the stage sft",
    "peft": "a stage with stage.lora.rank=64 stage.lora.alpha=128",
    "prompt_learning": "nothing",
    "adapter_learning": "nothing",
    "ia3_learning": "nothing",
    "conversion": "molmo2 convert export",
    "export": "molmo2 convert export",
    "evaluation": "molmo2 evaluate",
    "rlhf_rm": "nothing",
    "rlhf_ppo": "nothing",
    "fw_inference": "molmo2 generate",
}


def is_launchers(values: Any) -> bool:
    """Whether a file's values are a configuration of the NeMo Framework Launcher."""
    return isinstance(values, Mapping) and any(mark in values for mark in MARKS)


def of_launcher(values: Mapping[str, Any], settings: Sequence[str], path: str) -> str:
    """The error for such a file: the command that its values make, and what of it has no counterpart.

    Args:
        values: the file's.
        settings: dotted keys of ours, to name the nearest.
        path: of the file.
    """
    taken, lost = [], []
    for key, value in _flat(_resolved(values)).items():
        found = _ours(key, value, values)
        if found is None and key not in OF_COURSE and value is not None:
            lost.append(f"{key}{_near(key, settings)}")
        taken += found or []
    command = shlex.join(["molmo2", "train", "recipe=8b", "stage=sft", *taken])
    said = f"{path} is a configuration of the NeMo Framework Launcher, which nothing here runs; as a command: {command}"
    if lost:
        said += f". Without a counterpart: {', '.join(lost)}"
    if isinstance(values.get("stages"), list):
        listed = (f"{name}: {STAGES.get(str(name), 'unknown')}" for name in values["stages"])
        said += f". Its stages are here: {'; '.join(listed)}"
    return said


def of_stage(name: str) -> str:
    """What a stage of the launcher is here, for the error that a name of a stage gets; "" for other names."""
    return f"; {name} of the NeMo Framework Launcher is {STAGES[name]} here" if name in STAGES else ""


def _ours(key: str, value: Any, values: Mapping[str, Any]) -> list[str] | None:
    """Overrides for one of their keys, none where it has its usual meaning of nothing; None where there is none."""
    if key in SAME:
        if value is None or isinstance(value, list) and not any(value):
            return []
        return [f"{SAME[key]}={_text(value)}"]
    if key == "trainer.precision":
        return [f"cluster.precision={PRECISIONS[str(value)]}"] if str(value) in PRECISIONS else None
    if key == "model.optim.betas" and isinstance(value, list) and len(value) == 2:
        return [f"stage.optim.beta1={value[0]}", f"stage.optim.beta2={value[1]}"]
    if key == "model.optim.sched.min_lr":
        rate = _flat(_resolved(values)).get("model.optim.lr")
        if isinstance(value, int | float) and isinstance(rate, int | float) and rate > 0:
            return [f"stage.optim.final_lr_fraction={value / rate:.6g}"]
    if key.startswith("env_vars."):
        return [] if value is None else [f"cluster.slurm.env.{key.removeprefix('env_vars.')}={_text(value)}"]
    return None


def _near(key: str, settings: Sequence[str]) -> str:
    """The setting of ours whose last word is like theirs, if there is one."""
    last = key.rpartition(".")[2]
    found = nearest(last, {setting.rpartition(".")[2] for setting in settings})
    if not found.startswith("did you mean"):
        return ""
    word = found.split("'")[1]
    return f" (nearest: {next(s for s in settings if s.rpartition('.')[2] == word)})"


def _resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """With `${...}` replaced, as far as the file itself says what by."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        found = OmegaConf.to_container(OmegaConf.create(dict(values)), resolve=True)
    except OmegaConfBaseException:
        return dict(values)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = _number(value)
    return flat


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text."""
    try:
        return float(value) if isinstance(value, str) and "e" in value else value
    except ValueError:
        return value


def _text(value: Any) -> str:
    """A value as an override has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return str(value)
