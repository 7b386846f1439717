"""What NeMo's own command starts: `nemo llm train|pretrain|finetune --factory molmo2_8b_long`.

NeMo-Run hands over the whole recipe as it stands after the command line's changes: model, data, trainer and others,
none of them built. What was changed is read off by comparing it with the recipe that the settings make, and becomes a
setting of ours, or is refused by name. Then the run is started as `molmo2 train` starts it, so that its folder, its
checks and its resume are the same.
"""

# No `from __future__ import annotations` here: NeMo-Run's command line reads the annotations of `train` as they stand.

import dataclasses
import functools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from molmo2_nemo.errors import PREEMPTED, UserError, nearest, show_error, user_message
from molmo2_nemo.launch.reports import show_how_to_resume, show_next
from molmo2_nemo.processes import stop_with_owner
from molmo2_nemo.rundir.paths import stage_dir
from molmo2_nemo.settings.run import RunConfig
from molmo2_nemo.settings.schema import by_dotted_key, structure, to_dict

# Of NeMo's recipe -> our setting; a name that ends in a dot stands for all that begins so.
SETTINGS = {
    "trainer.max_steps": "stage.max_steps",
    "model.optim.max_steps": "stage.max_steps",
    "trainer.devices": "cluster.devices",
    "trainer.num_nodes": "cluster.nodes",
    "trainer.log_every_n_steps": "log_every",
    "trainer.strategy.tensor_model_parallel_size": "parallel.tensor",
    "trainer.strategy.pipeline_model_parallel_size": "parallel.pipeline",
    "trainer.strategy.context_parallel_size": "parallel.context",
    "trainer.strategy.sequence_parallel": "parallel.sequence",
    "trainer.strategy.fsdp": "parallel.fsdp",
    "trainer.strategy.ddp.overlap_grad_reduce": "parallel.overlap_grad_reduce",
    "trainer.strategy.ddp.overlap_param_gather": "parallel.overlap_param_gather",
    "trainer.strategy.ckpt_async_save": "checkpoint.async_save",
    "data.micro_batch_size": "stage.micro_batch_size",
    "data.global_batch_size": "stage.global_batch_size",
    "data.config.": "data.",
    "model.model.": "model.",
    "model.optim.optim.": "stage.optim.",
    "model.optim.faults.": "faults.",
    "model.stage.": "stage.",
    "model.memory.": "memory.",
    "model.kernels.": "kernels.",
    "model.parallel.": "parallel.",
    "model.seed": "seed",
    "model.precision": "cluster.precision",
}
# Of NeMo's recipes, and none of ours -> what does it here
INSTEAD = {
    "optim": "stage.optim.llm.lr=..., stage.optim.vit.lr=... and others of stage.optim",
    "tokenizer": "data.tokenizer=FOLDER",
    "model_transform": "stage.lora.rank=64 stage.lora.alpha=128 (Molmo2's layers have adapters of their own)",
    "peft": "stage.lora.rank=64 stage.lora.alpha=128 (Molmo2's layers have adapters of their own)",
    "trainer.val_check_interval": "validation.every=500, with validation.sources.NAME.path=SHARDS",
    "trainer.limit_val_batches": "validation.examples=256, with validation.sources.NAME.path=SHARDS",
    "trainer.accumulate_grad_batches": "stage.global_batch_size=..., from which accumulation follows",
    "trainer.gradient_clip_val": "stage.optim.clip_grad=1.0",
    "trainer.max_epochs": "stage.max_steps=...",
    "trainer.max_time": "run.executor.time=..., after which the same command resumes",
    "trainer.precision": "cluster.precision=bf16",
    "trainer.plugins": "cluster.precision=bf16",
    "trainer.callbacks": "log.*, validation.* or evaluation.* settings, of which the callbacks are made",
    "log.ckpt": "save_every=..., checkpoint.keep_last=... and others of checkpoint",
    "log.wandb": "log.wandb=PROJECT",
    "log.tensorboard": "log.tensorboard=false",
    "log": "output_dir=FOLDER, or dir='FOLDER' in the factory",
    "resume": "init_from=CHECKPOINT, or init_from='CHECKPOINT' in the factory",
    "data": "data.sources.NAME.path=SHARDS and others of data",
}


def train(
    settings: Mapping[str, Any],
    workdir: str,
    model: Any,
    data: Any,
    trainer: Any,
    log: Any = None,
    resume: Any = None,
    optim: str = "",
    tokenizer: str = "",
    model_transform: str = "",
    peft: str = "",
) -> None:
    """Run, or resume, a stage of Molmo2 from NeMo's command line.

    Args:
        settings: those that differ from the defaults of RunConfig, nested.
        workdir: the folder that relative paths start from.
        model, data, trainer, log, resume: the recipe that the settings make, with what the command line changed.
        optim, tokenizer, model_transform, peft: NeMo's own; refused with the setting that does the same.

    Raises:
        SystemExit: always when the run has failed, with the exit code of `molmo2 train` and one line on stderr.
    """
    own = {"optim": optim, "tokenizer": tokenizer, "model_transform": model_transform, "peft": peft}
    asked = {"model": model, "data": data, "trainer": trainer, "log": log, "resume": resume}
    asked |= {name: value for name, value in own.items() if value}
    try:
        code = _train(settings, workdir, asked)
    except Exception as error:  # noqa: BLE001 - NeMo's command prints tracebacks of what a person can mend
        message = user_message(error)
        if message is None:
            raise
        show_error(message)
        _leave(2)
    if code:
        _leave(code)


def _train(settings: Mapping[str, Any], workdir: str, asked: Mapping[str, Any]) -> int:
    from molmo2_nemo.launch.local import launch
    from molmo2_nemo.launch.slurm.step import adopt_slurm, in_step

    if not Path(workdir).is_dir():
        raise UserError(
            f"the folder {workdir}, where NeMo's command was typed and relative paths start, is not on this "
            "machine: type the command in a folder that the job sees, or mount it into the job's container with "
            f"run.executor.container_mounts=\"['{workdir}:{workdir}']\""
        )
    if _of_an_executor() and not in_step(os.environ):
        if not stop_with_owner():  # NeMo-Run gives it a session of its own, where it would outlive NeMo's command
            show_error("NeMo's command ended while this job started; nothing was trained: type the same line again")
            return PREEMPTED
    os.chdir(workdir)
    cfg = structure(RunConfig, dict(settings))
    changes = differences(asked, built_recipe(cfg))
    cfg = changed(cfg, changes)
    if in_step(os.environ):  # as many nodes and processes as the executor asked for
        adopt_slurm(os.environ)
        nodes, devices = int(os.environ.get("SLURM_NNODES", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        for name, there in (("trainer.num_nodes", nodes), ("trainer.devices", devices)):
            if _plain(changes.get(name, there), there) != there:
                raise UserError(
                    f"{name}={changes[name]}, but the job has {there}: leave it out, and set run.executor.nodes and "
                    "run.executor.ntasks_per_node"
                )
        cfg.cluster.nodes, cfg.cluster.devices = nodes, devices
    elif cfg.cluster.kind == "slurm" and "RANK" not in os.environ:
        raise UserError(
            "this recipe is for a Slurm cluster: submit it with run.executor=slurm run.executor.account=ACCOUNT "
            "run.executor.partition=PARTITION, or run it on this machine with overrides='cluster=gpu' in the factory"
        )
    code = launch(cfg)
    show_how_to_resume(code, stage_dir(cfg))
    if code == 0:
        show_next(cfg)
    return code


def _of_an_executor() -> bool:
    """Whether this process is one that an executor of NeMo-Run's has started."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name.startswith("nemo_run.")


def _leave(code: int) -> NoReturn:
    """Ends the command: under a launcher at once, as other ranks may wait for this one."""
    from molmo2_nemo.launch.worker import leave

    if "RANK" in os.environ:
        leave(code)
    raise SystemExit(code)


def built_recipe(cfg: RunConfig) -> dict[str, Any]:
    """The recipe as `train` gets it where nothing was changed."""
    import fiddle

    from molmo2_nemo.nemo.recipes import described_recipe

    return {name: fiddle.build(part) for name, part in described_recipe(cfg).items()}


def differences(asked: Any, expected: Any, path: str = "") -> dict[str, Any]:
    """What of a recipe is not as expected: dotted names as NeMo's command line has them -> what was asked for."""
    asked_parts, expected_parts = _parts(asked), _parts(expected)
    alike = type(asked) is type(expected) and getattr(asked, "func", None) is getattr(expected, "func", None)
    if asked_parts is None or expected_parts is None or not alike:
        return {} if _equal(asked, expected) else {path: asked}
    found: dict[str, Any] = {}
    for name in dict.fromkeys((*asked_parts, *expected_parts)):
        if asked_parts.get(name) is None and expected_parts.get(name) is None:
            continue
        found |= differences(asked_parts.get(name), expected_parts.get(name), f"{path}.{name}" if path else str(name))
    return found


def _parts(value: Any) -> dict[Any, Any] | None:
    """The named parts of something that is made of others; None of anything else."""
    if isinstance(value, functools.partial):
        return {**dict(enumerate(value.args)), **value.keywords}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return dict(enumerate(value))
    return None


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def changed(cfg: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The settings with what NeMo's command line changed; says which setting each is.

    Args:
        changes: from `differences`.

    Raises:
        UserError: something that no setting stands for, two values for one setting, or a value of the wrong type.
    """
    values = to_dict(cfg)
    taken: dict[str, tuple[str, Any]] = {}  # setting -> its name on NeMo's line, and the value
    for name, value in changes.items():
        key = setting_of(name)
        if key is None:
            raise UserError(f"{name}={_short(value)} is not taken from NeMo's line: {_instead(name)}")
        if taken.get(key, (name, value))[1] != value:
            raise UserError(
                f"{name}={_short(value)} and {taken[key][0]}={_short(taken[key][1])} are both {key}; leave one out"
            )
        taken[key] = (name, value)
        *groups, last = key.split(".")
        part = values
        for group in groups:
            part = part[group]
        part[last] = _plain(value, part[last])
        print(f"{name}={_short(value)}: taken as {key}={_short(value)}", file=sys.stderr, flush=True)
    return structure(RunConfig, values)


def _plain(value: Any, before: Any) -> Any:
    """A value as settings have it; NeMo-Run reads `trainer.devices=2` as text, as Lightning takes text there, too."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, str) and value.isdecimal() and not isinstance(before, str):
        return int(value)
    return value


def setting_of(name: str) -> str | None:
    """Our setting for a name of NeMo's recipe; None where there is none."""
    if name in SETTINGS:
        return SETTINGS[name]
    start = max((s for s in SETTINGS if s.endswith(".") and name.startswith(s)), key=len, default=None)
    key = None if start is None else SETTINGS[start] + name.removeprefix(start)
    return key if key in known_settings() else None


@functools.cache
def known_settings() -> frozenset[str]:
    """Dotted keys of all settings, groups among them; of data sets none, as their names are the user's."""
    return frozenset(start for key in by_dotted_key(to_dict(RunConfig())) for start in _starts(key))


def _instead(name: str) -> str:
    """What to write for a name that no setting stands for."""
    for start in _starts(name):
        if start in INSTEAD:
            return f"write {INSTEAD[start]} (settings go into the factory's overrides='...')"
    close = nearest(name, [*SETTINGS, *INSTEAD])
    return f"{close}; settings go into the factory's overrides='...', see docs/nemo.md"


def _starts(name: str) -> Iterator[str]:
    """A dotted name, and each of its beginnings, the longest first."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        yield ".".join(parts[:count])


def _short(value: Any) -> str:
    """A value on an error's line: of an object the name of its kind."""
    if isinstance(value, functools.partial):
        return getattr(value.func, "__name__", "...")
    if isinstance(value, str | int | float | bool | list) or value is None:
        return str(value)
    return type(value).__name__
