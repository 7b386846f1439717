"""How far the stages of a run have got, from the files in its folder alone: for `molmo2 status` and `molmo2 report`."""

from __future__ import annotations

import os
import socket
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from molmo2_nemo.errors import UserError
from molmo2_nemo.processes import process_start
from molmo2_nemo.rundir import checkpoint_manifest, paths
from molmo2_nemo.rundir.config_file import read_config
from molmo2_nemo.rundir.jobs import Job, read_jobs
from molmo2_nemo.rundir.lines import read_lines, read_metrics
from molmo2_nemo.rundir.stages import stage_order
from molmo2_nemo.rundir.summary import read_summary
from molmo2_nemo.rundir.verdicts import read_verdicts
from molmo2_nemo.settings.run import RunConfig

State = Literal["waiting", "starting", "running", "stopped", "failed", "finished"]

RUNS = 6  # of a folder of runs, named in a message
RECENT = 20  # steps that rates are averaged over
QUIET = 180.0  # seconds without a sign of life after which a run on another machine counts as stopped


@dataclass
class StageProgress:
    """One stage: what its files say now."""

    name: str
    folder: Path
    config: RunConfig | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)  # lines of metrics.jsonl
    validation: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # lines of evaluation.jsonl
    faults: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    attempt: dict[str, Any] = field(default_factory=dict)  # attempt.json: when and where the last one began
    summary: dict[str, Any] | None = None
    checkpoint: Path | None = None  # the newest whole one
    state: State = "waiting"
    job: Job | None = None  # the last Slurm job submitted for it

    @property
    def step(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def max_steps(self) -> int | None:
        return self.config.stage.max_steps if self.config else None

    @property
    def loss(self) -> float | None:
        """The loss of the last step that had one."""
        return next((m["loss"] for m in reversed(self.steps) if m.get("loss") is not None), None)

    @property
    def last_error(self) -> dict[str, Any] | None:
        """Why the last attempt ended: of the reports after its last step, the one that is marked as the cause of the
        others, else the first."""
        since = max(self.steps[-1].get("time", 0.0) if self.steps else 0.0, self.attempt.get("time", 0.0))
        found = [e for e in self.errors if e["time"] >= since]
        causes = [e for e in found if e.get("cause")]
        return causes[-1] if causes else next(iter(found), None)

    @property
    def skipped_steps(self) -> int:
        """Steps skipped since the run began, as of its last step."""
        return int(self.steps[-1].get("skipped_steps", 0)) if self.steps else 0

    def rate(self, name: str, per: str | None = None) -> float | None:
        """Mean of a figure over the last steps; with `per`, its sum over the sum of that figure. None without steps."""
        recent = [m for m in self.steps[-RECENT:] if m.get(name) is not None]
        if not recent:
            return None
        if per is None:
            return statistics.fmean(m[name] for m in recent)
        return sum(m[name] for m in recent) / max(sum(m[per] for m in recent), 1e-9)

    def seconds_left(self) -> float | None:
        """Time left at the pace of the last steps, saving and validating included; None where that is not known."""
        times = [m["time"] for m in self.steps[-10 * RECENT :] if "time" in m]
        if self.max_steps is None or len(times) < 2:
            return None
        paces = [b - a for a, b in zip(times, times[1:], strict=False)]
        # a restart leaves one long gap; saving leaves several that count
        longest = 20 * statistics.median(paces)
        return statistics.fmean(p for p in paces if p <= longest) * max(0, self.max_steps - self.step)


def read_run(path: str | Path, now: float | None = None) -> list[StageProgress]:
    """The stages of a run's folder, or the one stage at `path`, in the order they run.

    Args:
        now: seconds since 1970; default: the clock's.

    Raises:
        UserError: no such folder, or it is not a run's.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name the output_dir of a run, or a stage inside it")
    now = time.time() if now is None else now
    if (path / paths.CONFIG).is_file():
        stage = read_stage(path, now)
        stage.job = read_jobs(path.parent / paths.SLURM).get(stage.name)
        return [stage]
    found = sorted(p.parent for p in path.glob(f"*/{paths.CONFIG}"))
    jobs = read_jobs(path / paths.SLURM)
    if not found and not jobs and (path / paths.MULTIRUN).is_file():
        numbers = sorted((p.parent.parent.name for p in path.glob(f"[0-9]*/*/{paths.CONFIG}")), key=int)
        listed = ", ".join(dict.fromkeys(numbers)) or "none has begun"
        raise UserError(f"{path} is the folder of a sweep; name one of its jobs: {path}/NUMBER ({listed})")
    if not found and not jobs:
        runs = sorted({str(p.parent.parent) for p in path.glob(f"*/*/{paths.CONFIG}")})
        listed = f" ({', '.join(runs[:RUNS])}{', ...' if len(runs) > RUNS else ''})" if runs else ""
        raise UserError(
            f"{path}: no stage with a config.yaml in it; name the output_dir of a run{listed}, or a stage inside it"
        )
    names = dict.fromkeys([*jobs, *(p.name for p in found)])  # jobs as they were submitted
    order = stage_order(path, names)
    # stages that have not begun belong to a run that goes through all of them: one that began with the first
    shown = [name for name in order if name in names or order[0] in names]
    stages = [read_stage(path / name, now) for name in shown]
    for stage in stages:
        stage.job = jobs.get(stage.name)
    return stages


def read_stage(folder: Path, now: float) -> StageProgress:
    """One stage's files; whatever is not there yet is left empty."""
    stage = StageProgress(folder.name, folder)
    stage.config = read_config(folder / paths.CONFIG)
    if stage.config is None:
        return stage
    number = (int, float)
    stage.steps = read_metrics(folder, seconds=number, tokens=number)
    stage.validation = read_lines(folder / paths.VALIDATION, step=int, losses=dict)
    stage.evaluations = read_lines(folder / paths.EVALUATIONS, step=int, tasks=dict)
    stage.faults = read_lines(folder / paths.FAULTS, step=int, fault=str)
    errors = [*read_lines(folder / paths.ERRORS, time=number, message=str), *read_verdicts(folder)]
    stage.errors = sorted(errors, key=lambda e: e["time"])
    stage.attempt = next(iter(read_lines(folder / paths.ATTEMPT, time=number, pid=int)), {})
    stage.summary = read_summary(folder)
    stage.checkpoint = checkpoint_manifest.newest_whole(folder / paths.CHECKPOINTS)
    stage.state = _state(stage, now)
    return stage


def _state(stage: StageProgress, now: float) -> State:
    if stage.summary is not None:
        return "finished"
    if stage.last_error is not None:
        return "failed"
    began = stage.attempt.get("time")
    if began is None:
        return "waiting"
    times = [m["time"] for m in stage.steps[-RECENT:] if "time" in m]
    stepped = bool(times) and times[-1] >= began  # this attempt has finished a step
    if "left" in stage.attempt or not _alive(stage, now):
        return "stopped"
    return "running" if stepped else "starting"


def _alive(stage: StageProgress, now: float) -> bool:
    """Whether the last attempt's first process is there: on its own machine by its id, elsewhere by the sign of life
    that it gives while it saves, validates or compiles, too (rundir/attempt.py)."""
    attempt = stage.attempt
    if attempt.get("host") == socket.gethostname():
        try:
            os.kill(attempt["pid"], 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass  # somebody else's process: it is there
        return attempt.get("started") in (None, process_start(attempt["pid"]))
    last = max([(stage.folder / paths.ATTEMPT).stat().st_mtime, *(m["time"] for m in stage.steps[-1:] if "time" in m)])
    return now - last < QUIET


def duration(seconds: float | None) -> str:
    """`2 d 3 h`, `4 h 05 min`, `12 min`, `40 s`."""
    if seconds is None:
        return "-"
    minutes = int(seconds) // 60
    if minutes < 1:
        return f"{int(seconds)} s"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
