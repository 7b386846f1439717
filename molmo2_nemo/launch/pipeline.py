"""The stages of a pipeline in order: their configurations, which are finished, and running or submitting the rest."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import PREEMPTED, UserError, nearest
from molmo2_nemo.launch.local import launch, signals_passed
from molmo2_nemo.launch.reports import show_how_to_resume
from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.rundir.config_file import read_config
from molmo2_nemo.rundir.paths import CHECKPOINTS, CONFIG, EVALUATION, SUMMARY, stage_dir
from molmo2_nemo.rundir.results import read_results
from molmo2_nemo.rundir.resume import refuse_changes
from molmo2_nemo.rundir.summary import figures_missing, read_summary
from molmo2_nemo.settings import checks
from molmo2_nemo.settings.compose import compose, listed, stages_of
from molmo2_nemo.settings.multirun import of_one_stage
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


def compose_stages(
    overrides: Sequence[str], config_dir: str | Path | None = None, config_name: str | None = None
) -> list[RunConfig]:
    """The configurations of the stages that the recipe lists, in order; `init_from` of a later one is set when the
    stage before it is finished.

    Raises:
        UserError: a setting that `compose` refuses, one that the pipeline makes itself, or a list of stages that
            `stages_of` refuses.
    """
    common, of_stage = overrides_of_stages(overrides, config_dir, config_name)
    configs: list[RunConfig] = []
    for name, own in of_stage.items():
        cfg = compose(own, config_dir, config_name)
        if cfg.stage.name != name:
            raise UserError(
                f"stage={name}: its file says stage.name={cfg.stage.name}; leave that out: in a pipeline it has the "
                "name of its file"
            )
        if configs and cfg.init_from is not None:
            raise UserError(
                f"{name}:init_from: each stage starts from the one before; for anything else use molmo2 train"
            )
        cfg.stages = list(of_stage)
        configs.append(cfg)
    whole = stages_of([o for o in common if not o.startswith("stages=")], config_dir, config_name)
    _start_of_part(configs, whole)
    return configs


def overrides_of_stages(
    overrides: Sequence[str], config_dir: str | Path | None = None, config_name: str | None = None
) -> tuple[list[str], dict[str, list[str]]]:
    """What of a pipeline's overrides holds for all stages, and each stage with all of its own, as for `compose`.

    Raises:
        UserError: one that the pipeline makes itself, one of an unknown stage, or a list that `stages_of` refuses.
    """
    common: list[str] = []
    heads: list[tuple[str, str]] = []  # of one stage each: its name, and the override
    for override in overrides:
        head, rest = of_one_stage(override)
        if head is None:
            common.append(override)
        else:
            heads.append((head, rest))
    for override in (*common, *(rest for _, rest in heads)):
        key = override.split("=")[0].lstrip("+~")
        if key in ("stage", "stage.name"):
            raise UserError(
                f"{override}: the pipeline runs all of stages=[...]; for a single one run molmo2 train {override}"
            )
    names = stages_of(common, config_dir, config_name)
    if any(o.split("=")[0].lstrip("+") == "init_from" for o in common):
        raise UserError(f"init_from: only the first stage may start from other weights; write {names[0]}:init_from=...")
    for head, rest in heads:
        if head not in names:
            raise UserError(
                f"unknown stage {head!r} in '{head}:{rest}'; {nearest(head, names)} (stages=[{','.join(names)}])"
            )
        if rest.split("=")[0].lstrip("+~") in ("stages", "recipe"):
            raise UserError(f"{head}:{rest}: all stages have this in common; write it without {head}: before it")
    own = {name: [*common, f"stage={name}", *(rest for head, rest in heads if head == name)] for name in names}
    return common, own


def _start_of_part(configs: Sequence[RunConfig], whole: Sequence[str]) -> None:
    """Lets a part of the recipe's stages start from the one before it, if that is finished in the run's folder; says
    so, or why it does not.

    Args:
        whole: the recipe's stages.
    """
    first = configs[0]
    name = first.stage.name
    before = whole[: whole.index(name)] if name in whole else []
    if not before or first.init_from is not None:
        return
    folder = Path(first.output_dir) / before[-1]
    done = read_summary(folder)
    if done is None:
        place = (
            f"it comes after it in stages={listed(first.stages)}" if before[-1] in first.stages else "it is left out"
        )
        says = f"does not start from {before[-1]}, which the recipe has before it: {place} and not finished in {folder}"
    else:
        first.init_from = str(done["checkpoint"])
        says = f"starts from {first.init_from}, as {before[-1]} is finished"
    print(f"{name} {says}", file=sys.stderr, flush=True)


def run_stages(configs: Sequence[RunConfig], train: Callable[[RunConfig], int] = launch) -> int:
    """Runs what is not finished or lacks figures of its last step, in order; stops at the first failure and returns its
    exit code, or PREEMPTED where a signal came as a stage was about to end.

    Args:
        train: runs one stage to its end and returns an exit code; replaced in tests.

    Raises:
        UserError: a finished stage was trained with other settings, or from weights that have changed since; a stage
            that is to run cannot work.
    """
    done = [_finished(cfg, stage_dir(cfg)) for cfg in configs]
    _check_order(configs, done)
    skipped = [result is not None and not figures_missing(cfg) for cfg, result in zip(configs, done, strict=True)]
    processes = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ and "RANK" in os.environ else None
    checks.check_stages([cfg for cfg, skip in zip(configs, skipped, strict=True) if not skip], processes)
    before = signals_passed()
    for number, cfg in enumerate(configs):
        place = f"stage {number + 1} of {len(configs)}, {cfg.stage.name}"
        if skipped[number]:
            print(f"{place}: already finished, skipped ({stage_dir(cfg)})", flush=True)
            continue
        if number:
            cfg.init_from = str(done[number - 1]["checkpoint"])  # type: ignore[index]
        print(place, flush=True)
        code = train(cfg)
        if code:
            show_how_to_resume(code, stage_dir(cfg))
            return code
        if signals_passed() > before and number + 1 < len(configs):
            print(f"stopped by a signal after {cfg.stage.name}; the same command goes on with the next", flush=True)
            return PREEMPTED
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
    from molmo2_nemo.evaluation.results import comparison

    found = {}
    for cfg in configs:
        folder = stage_dir(cfg)
        done = read_summary(folder)
        if done is not None and (results := read_results(folder / EVALUATION / Path(done["checkpoint"]).name)):
            found[cfg.stage.name] = list(results.values())
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
            cfg, trained = configs[number], read_config(folder / CONFIG)
            order = trained.stages if trained is not None else []
            name = cfg.stage.name
            if {name, earlier[0]} <= {*order} and order.index(earlier[0]) > order.index(name):
                raise UserError(
                    f"stages={listed(cfg.stages)}: {name} {how} in {folder}, and there {earlier[0]} came after it "
                    f"(stages={listed(order)}), not before; write that order, or take another output_dir"
                )
            raise UserError(f"{folder} {how}, but {earlier[0]}, which it starts from, is not finished; remove {folder}")
