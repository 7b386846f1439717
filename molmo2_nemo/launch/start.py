"""What a run starts from and with: the checkpoint, whether it fits the model, the tasks that it evaluates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from molmo2_nemo.errors import UserError
from molmo2_nemo.rundir.config_file import read_config, run_of_checkpoint
from molmo2_nemo.rundir.paths import CONFIG
from molmo2_nemo.rundir.summary import resolve_checkpoint
from molmo2_nemo.settings.run import RunConfig


def start_problems(cfg: RunConfig) -> Iterator[str]:
    """Problems of `init_from` that its run's config.yaml shows: another model, or damaged settings.

    A checkpoint that is in no run's folder, or does not exist, has none.
    """
    if cfg.init_from is None:
        return
    run = run_of_checkpoint(Path(cfg.init_from))
    if run is None or not Path(cfg.init_from).is_dir():
        return
    try:
        saved = read_config(run / CONFIG)
    except UserError as error:
        yield f"init_from={cfg.init_from}: {error}"
        return
    if saved is not None and saved.model.preset != cfg.model.preset:
        yield (
            f"init_from={cfg.init_from} is a checkpoint of model {saved.model.preset!r}, but model.preset="
            f"{cfg.model.preset}; use model={saved.model.preset} or another checkpoint"
        )


def resolve_start(cfg: RunConfig) -> None:
    """Replaces an `init_from` that names a run's folder by the checkpoint that the run ended with.

    Raises:
        UserError: the run has no finished stage.
    """
    if cfg.init_from is not None:
        cfg.init_from = str(resolve_checkpoint(cfg.init_from))


def evaluation_problems(cfg: RunConfig) -> Iterator[str]:
    """Problems of `evaluation`: unknown tasks, data that are not there, a layout that cannot answer."""
    if not cfg.evaluation.tasks:
        if cfg.evaluation.data is not None:
            yield f"evaluation.data={cfg.evaluation.data} without evaluation.tasks=[auto], which is what reads it"
        return
    from molmo2_nemo.evaluation.suite import passes_of_run

    if cfg.parallel.pipeline > 1:
        yield (
            "evaluation.tasks: pipeline stages cannot generate answers; leave it out and run molmo2 evaluate on a "
            "checkpoint, which loads under any layout, or set parallel.pipeline=1"
        )
    try:
        passes_of_run(cfg.evaluation, cfg.data.root)
    except (UserError, OSError) as error:
        yield f"evaluation: {error}"
