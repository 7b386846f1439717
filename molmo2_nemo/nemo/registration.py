"""What `pip install` makes known to NeMo: this module is the package's `nemo_run.cli` entry point.

Importing it registers
  * the importer and exporter of `Molmo2Module` for "hf", so `llm.import_ckpt` and `llm.export_ckpt` know Molmo2;
  * NeMo-Run factories for every recipe and its stages, under train, pretrain and finetune:
    `nemo llm train --factory molmo2_8b_long`;
  * NeMo-Run executors: `run.executor=slurm`, `run.executor=local`.

As an entry point it stands above all layers, as the molmo2 command does.
"""

# No `from __future__ import annotations` here: NeMo-Run's command line reads the factories' annotations as they stand.

import dataclasses
import inspect
import os
import shlex
import types
import typing
from pathlib import Path
from typing import Any

import catalogue
import nemo_run as run
from nemo.collections import llm
from nemo.lightning import io
from nemo_run.config import RUNDIR_NAME, get_nemorun_home, get_type_namespace

from molmo2_nemo import compat, cpu
from molmo2_nemo.errors import UserError, show_error
from molmo2_nemo.launch import nemo_command
from molmo2_nemo.model.config import PRESETS, Molmo2Config
from molmo2_nemo.nemo.data import PackDataModule
from molmo2_nemo.nemo.module import Molmo2Module
from molmo2_nemo.nemo.optimizer import Molmo2Optimizer
from molmo2_nemo.processes import as_owner
from molmo2_nemo.settings import checks
from molmo2_nemo.settings.compose import compose, group_options, stages_of
from molmo2_nemo.settings.run import RunConfig
from molmo2_nemo.settings.schema import not_default

cpu.enable()  # NeMo's command has imported this module: without CUDA its runs need the CPU shims
cpu.enable_megatron()


@io.model_importer(Molmo2Module, "hf")
class HFMolmo2Importer(io.ModelConnector[Any, Molmo2Module]):
    """A Hugging Face folder (either format) -> a NeMo checkpoint, tensor by tensor."""

    def init(self) -> Molmo2Module:
        from molmo2_nemo.convert.hf_config import read_model_config

        return module_of(read_model_config(Path(str(self)))[0])

    def apply(self, output_path: Path) -> Path:
        from molmo2_nemo.convert import import_checkpoint
        from molmo2_nemo.convert.checkpoints import read_model_file

        done = import_checkpoint(str(self), output_path, overwrite=True)
        imported = read_model_file(done)  # the tensors say what config.json cannot: whether the head is tied
        assert imported is not None
        module_of(imported).io_dump(done / "context", yaml_attrs=[])
        return done


def module_of(model_config: Molmo2Config) -> Molmo2Module:
    """The module of a model: by its preset's name, if it has one."""
    return Molmo2Module(model_config.name if model_config.name in PRESETS else model_config)


@io.model_exporter(Molmo2Module, "hf")
class HFMolmo2Exporter(io.ModelConnector[Molmo2Module, Any]):
    """A NeMo checkpoint, written under any layout -> a Hugging Face folder for transformers and vLLM."""

    def apply(self, output_path: Path, **options: Any) -> Path:
        from molmo2_nemo.convert import export_checkpoint

        return export_checkpoint(str(self), output_path, overwrite=True, **options)

    def nemo_load(self, *args: Any, **kwargs: Any) -> Any:
        """NeMo's export_ckpt would first load the whole model to ask whether ModelOpt has quantised it. Molmo2 streams
        its tensors instead; this error is the answer that sends NeMo on to `apply`."""
        raise RuntimeError("Molmo2 checkpoints are exported tensor by tensor, without loading the model")


def stage_factory(name: str, stage: str) -> Any:
    """A function that makes a stage of a recipe; its arguments are what a command line would change."""

    # NeMo-Run's command line reads plain strings here, no lists and no unions
    def recipe(dir: str = "", init_from: str = "", overrides: str = "") -> run.Partial:
        compat.check()
        cfg = compose([f"recipe={name}", f"stage={stage}", *shlex.split(overrides)])
        cfg.output_dir = dir or cfg.output_dir
        cfg.init_from = init_from or cfg.init_from
        checks.check(cfg, files=False)
        return command_recipe(cfg)

    recipe.__name__ = f"molmo2_{name}_{stage}"
    recipe.__doc__ = (
        f"Molmo2 {name}, stage {stage}, as composed from conf/.\n\n"
        "Args:\n    dir: folder of the run.\n    init_from: checkpoint of the stage before.\n"
        "    overrides: further settings, written as for `molmo2 train`, with blanks between them.\n"
    )
    return recipe


def command_recipe(cfg: RunConfig) -> run.Partial:
    """What NeMo's command runs for a stage: its recipe, unbuilt, and the settings that it was made of, for
    launch/nemo_command.py to start as `molmo2 train` would."""
    from molmo2_nemo.nemo.recipes import described_recipe

    settings = not_default(cfg)
    parts = described_recipe(cfg)
    return run.Partial(nemo_command.train, settings=settings, workdir=os.getcwd(), bind_args=False, **parts)


def read_types(cls: type, seen: set[type]) -> None:
    """Makes NeMo-Run's command line able to read values for what a class and the dataclasses in its settings are made
    with: it knows types, where modules that postpone the evaluation of annotations have names, and no `int | None`.

    Args:
        seen: classes that this was done for; added to.
    """
    seen.add(cls)
    init = inspect.unwrap(cls.__init__)  # type: ignore[misc]
    hints = typing.get_type_hints(cls if dataclasses.is_dataclass(cls) else init)
    init.__annotations__ = {name: _readable(hint) for name, hint in hints.items()}
    for inner in (part for hint in hints.values() for part in (hint, *typing.get_args(hint))):
        if dataclasses.is_dataclass(inner) and isinstance(inner, type) and inner not in seen:
            read_types(inner, seen)


def _readable(hint: Any) -> Any:
    return typing.Union[typing.get_args(hint)] if isinstance(hint, types.UnionType) else hint  # noqa: UP007


def refused_factory(verb: str) -> Any:
    """What another verb of `nemo llm` gets for a recipe: an error that names the command that does it."""

    def recipe(dir: str = "", init_from: str = "", overrides: str = "") -> run.Partial:
        raise UserError(f"nemo llm {verb} does not run Molmo2's recipes: {OTHER_VERBS[verb]}")

    return recipe


OTHER_VERBS = {
    "validate": "molmo2 evaluate RUN scores a checkpoint; validation.sources.NAME.path=SHARDS validates in training",
    "prune": "there is no pruning here; molmo2 convert export RUN FOLDER writes what transformers and vLLM load",
    "distill": "there is no distillation here",
    "ptq": "there is no quantisation here; molmo2 convert export RUN FOLDER writes what others quantise",
}


def slurm() -> run.Config[run.SlurmExecutor]:
    """A Slurm job as `cluster=slurm` has it, in a folder of NeMo-Run's: run.executor=slurm run.executor.account=...

    Raises:
        SystemExit: NeMo-Run cannot use its folder; it would take a UserError for "there is no such executor".
    """
    home = get_nemorun_home()
    if f"/{RUNDIR_NAME}" in home:
        show_error(
            f"NEMORUN_HOME={home}: NeMo-Run replaces /{RUNDIR_NAME} in the job's script wherever it stands, so the job "
            "could not start; name another folder, such as nemo_jobs"
        )
        raise SystemExit(2)
    cluster = compose(["recipe=tiny", "cluster=slurm"]).cluster
    asked = cluster.slurm
    return run.Config(
        run.SlurmExecutor,
        account=asked.account,  # None: a cluster that knows no accounts
        job_name_prefix="molmo2-",  # NeMo-Run's own is made of the account
        nodes=cluster.nodes,
        ntasks_per_node=cluster.devices,
        gpus_per_node=cluster.devices,
        time=asked.time,
        mem=asked.mem,
        exclusive=asked.exclusive or None,
        signal=f"USR1@{asked.grace}",
        env_vars={"OMP_NUM_THREADS": str(cluster.threads)},
        additional_parameters={"requeue": True},  # after preemption and lost nodes, as the run resumes
        setup_lines="unset SLURM_UNBUFFEREDIO",  # gives tasks a terminal, which fills logs with progress bars
        tunnel=run.Config(run.LocalTunnel, job_dir=""),
        packager=run.Config(run.Packager),  # the package is installed where the job runs; nothing is archived
    )


def local() -> run.Config[run.LocalExecutor]:
    """A process of this machine, in a folder of NeMo-Run's; it starts as many as the recipe's layout has, and leaves
    when this process is gone."""
    return run.Config(run.LocalExecutor, env_vars=as_owner())


def register() -> None:
    """Make the recipes known under every verb that trains, and executors where the user has none of that name."""
    for name in group_options("recipe"):
        for stage in stages_of([f"recipe={name}"]):
            recipe = stage_factory(name, stage)
            for target in (llm.train, llm.pretrain, llm.finetune):
                made = run.cli.factory(target=target, name=recipe.__name__)(recipe)
            globals()[recipe.__name__] = made
            for verb in OTHER_VERBS:
                run.cli.factory(target=getattr(llm, verb), name=recipe.__name__)(refused_factory(verb))
    seen: set[type] = set()
    for cls in (Molmo2Module, Molmo2Optimizer, PackDataModule, RunConfig):
        read_types(cls, seen)
    for executor, kind in ((slurm, run.SlurmExecutor), (local, run.LocalExecutor)):
        places = (
            get_type_namespace(c) for c in (run.Executor, run.LocalExecutor, run.SkypilotExecutor, run.SlurmExecutor)
        )
        if not any(catalogue.check_exists(place, executor.__name__) for place in places):
            run.cli.factory(target=kind, name=executor.__name__)(executor)


register()
