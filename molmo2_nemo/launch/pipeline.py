"""The stages of a pipeline in order: their configurations, which are finished, and running or submitting the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import UserError, nearest
from molmo2_nemo.launch.local import launch
from molmo2_nemo.launch.reports import show_how_to_resume
from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.rundir.paths import CHECKPOINTS, EVALUATION, SUMMARY, stage_dir
from molmo2_nemo.rundir.resume import refuse_changes
from molmo2_nemo.rundir.summary import read_summary
from molmo2_nemo.settings.compose import STAGES, compose
from molmo2_nemo.settings.layout import layout_of_run
from molmo2_nemo.settings.run import RunConfig


def submit_stages(configs: Sequence[RunConfig], *, dry_run: bool = False) -> int:
    """Submits the stages that are neither finished nor already submitted as Slurm jobs, or prints their scripts.

    Raises:
        UserError: a stage that `run_stages` would refuse, settings that cannot work, no Slurm, or what sbatch refuses.
    """
    from molmo2_nemo.launch.slurm.jobs import login_of, submit

    with login_of(configs) as login:
        done = [_finished(cfg, login.path(stage_dir(cfg)), login.path) for cfg in configs]
        _check_order(configs, done)
        return submit(configs, done, login, dry_run=dry_run)


def compose_stages(overrides: Sequence[str], config_dir: str | Path | None = None) -> list[RunConfig]:
    """The three stages' configurations; `init_from` of a later one is set when the stage before it is finished.

    Raises:
        UserError: a setting that `compose` refuses, or one that the pipeline makes itself.
    """
    common: list[str] = []
    own: dict[str, list[str]] = {name: [] for name in STAGES}
    for override in overrides:
        head, colon, rest = override.partition(":")
        if colon and "=" not in head:
            if head not in own:
                raise UserError(f"unknown stage {head!r} in {override!r}; {nearest(head, STAGES)}")
            own[head].append(rest)
        else:
            common.append(override)
    for override in (*common, *(o for several in own.values() for o in several)):
        key = override.split("=")[0].lstrip("+~")
        if key in ("stage", "stage.name"):
            raise UserError(f"{override}: the pipeline runs all stages; for a single one run molmo2 train {override}")
    if any(o.split("=")[0].lstrip("+") == "init_from" for o in common):
        raise UserError("init_from: only the first stage may start from other weights; write pretrain:init_from=...")
    configs = []
    for name in STAGES:
        cfg = compose([*common, f"stage={name}", *own[name]], config_dir)
        if name != STAGES[0] and cfg.init_from is not None:
            raise UserError(
                f"{name}:init_from: each stage starts from the one before; for anything else use molmo2 train"
            )
        configs.append(cfg)
    return configs


def run_stages(configs: Sequence[RunConfig], train: Callable[[RunConfig], int] = launch) -> int:
    """Runs what is not finished, in order; stops at the first failure and returns its exit code.

    Args:
        train: runs one stage to its end and returns an exit code; replaced in tests.

    Raises:
        UserError: a finished stage was trained with other settings, or from weights that have changed since.
    """
    done = [_finished(cfg, stage_dir(cfg)) for cfg in configs]
    _check_order(configs, done)
    for number, cfg in enumerate(configs):
        result = done[number]
        place = f"stage {number + 1} of {len(configs)}, {cfg.stage.name}"
        if result is not None:
            print(f"{place}: already finished, skipped ({stage_dir(cfg)})", flush=True)
            continue
        if number:
            cfg.init_from = str(done[number - 1]["checkpoint"])  # type: ignore[index]
        print(f"{place}: {cfg.stage.max_steps} steps on {layout_of_run(cfg.parallel)}", flush=True)
        code = train(cfg)
        if code:
            show_how_to_resume(code, stage_dir(cfg))
            return code
        done[number] = read_summary(stage_dir(cfg))
        if done[number] is None:
            raise UserError(
                f"{stage_dir(cfg)} has no {SUMMARY} although the stage ended without an error; run the command again"
            )
    if compared := scores_of_stages(configs):
        print(f"\nscores by stage, in percent:\n{compared}", flush=True)
    return 0


def scores_of_stages(configs: Sequence[RunConfig]) -> str:
    """What the final checkpoints of finished stages scored, side by side; "" where nothing was evaluated."""
    from molmo2_nemo.evaluation.results import comparison, read_results

    found = {}
    for cfg in configs:
        folder = stage_dir(cfg)
        done = read_summary(folder)
        if done is not None and (results := read_results(folder / EVALUATION / Path(done["checkpoint"]).name)):
            found[cfg.stage.name] = results
    return comparison(found) if found else ""


def _finished(cfg: RunConfig, folder: Any, path: Callable[[str], Any] = Path) -> dict[str, Any] | None:
    """The summary of a stage that is finished with these settings, None when it has to run.

    Args:
        folder: the stage's, a `Path` or a `RemotePath` (slurm/login.py).
        path: makes a path of that kind from a string.

    Raises:
        UserError: it is finished with other settings, or its checkpoint is gone.
    """
    result = read_summary(folder, cfg.stage.max_steps)
    if result is None:
        return None
    refuse_changes(cfg, folder, result["checkpoint"], finished=True)
    if not path(result["checkpoint"]).is_dir():
        raise UserError(
            f"{folder}/{SUMMARY} names the checkpoint {result['checkpoint']}, which is gone; "
            f"remove {folder} to train it again"
        )
    return result


def _check_order(configs: Sequence[RunConfig], done: Sequence[dict[str, Any] | None]) -> None:
    """Refuses a stage that was trained although one before it is not finished: it started from other weights."""
    for number, result in enumerate(done):
        earlier = [c.stage.name for c, d in zip(configs[:number], done[:number], strict=True) if d is None]
        folder = stage_dir(configs[number])
        if earlier and (result is not None or checkpoint_manifest.finished(folder / CHECKPOINTS)):
            how = "was trained" if result is None else "is finished"
            raise UserError(f"{folder} {how}, but {earlier[0]}, which it starts from, is not finished; remove {folder}")
