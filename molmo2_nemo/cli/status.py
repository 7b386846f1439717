"""Where each stage of a run stands: loss, speed, time left, last checkpoint, last error. Reads only the run's folder,
so it works while the run does, from any machine that sees the folder."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from molmo2_nemo.errors import plural
from molmo2_nemo.rundir.progress import StageProgress, duration, read_run
from molmo2_nemo.rundir.standstill import standstill
from molmo2_nemo.rundir.straggler import straggler

EXAMPLES = """\
examples:
  molmo2 status runs/8b
  molmo2 status runs/8b/sft --json
  watch -n 30 molmo2 status runs/8b
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="output_dir of a run, or the folder of one stage")
    parser.add_argument("--json", action="store_true", help="one JSON object per stage instead of a table")


def run(args: argparse.Namespace) -> int:
    now = time.time()
    stages = read_run(args.folder, now)
    if args.json:
        for stage in stages:
            print(json.dumps(as_dict(stage)))
        return 0
    print_table(stages)
    for stage in stages:
        for line in remarks(stage, now):
            print(line)
    return 0


def as_dict(stage: StageProgress) -> dict[str, Any]:
    """The figures of the table and of the remarks, as JSON values."""
    return {
        "stage": stage.name,
        "state": stage.state,
        "step": stage.step,
        "max_steps": stage.max_steps,
        "loss": stage.loss,
        "tokens_per_second": stage.rate("tokens", "seconds"),
        "mfu": stage.rate("mfu"),
        "fill": stage.rate("fill"),
        "crop_fill": stage.rate("crop_fill"),
        "seconds_left": stage.seconds_left(),
        "checkpoint": str(stage.checkpoint) if stage.checkpoint else None,
        "skipped_steps": stage.skipped_steps,
        "skipped_records": stage.steps[-1].get("skipped", 0) if stage.steps else 0,
        "straggler": straggler(stage.steps),
        "standstill": standstill(stage.folder, stage.attempt) if stage.state in ("starting", "running") else None,
        "validation": stage.validation[-1] if stage.validation else None,
        "evaluation": stage.evaluations[-1] if stage.evaluations else None,
        "error": stage.last_error["message"] if stage.last_error else None,
        "job": stage.job.id if stage.job else None,
    }


def print_table(stages: list[StageProgress]) -> None:
    """One row per stage, at most 80 columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("stage", "state", "step", "loss", "tokens/s", "MFU", "fill", "crops", "left"):
        table.add_column(column, justify="left" if column in ("stage", "state") else "right", no_wrap=True)
    for stage in stages:
        steps = f"{stage.step:,}/{stage.max_steps:,}" if stage.max_steps is not None else "-"
        left = duration(stage.seconds_left()) if stage.state == "running" else "-"
        figures = [stage.rate(name) for name in ("mfu", "fill", "crop_fill")]
        table.add_row(
            stage.name,
            stage.state,
            steps,
            _figure(stage.loss, ".4f"),
            _figure(stage.rate("tokens", "seconds"), ",.0f"),
            *(_figure(value, ".0%") for value in figures),
            left,
        )
    console = Console()
    if console.width > 80 or not console.is_terminal:
        console = Console(width=80)
    console.print(table)


def remarks(stage: StageProgress, now: float) -> list[str]:
    """What the table has no room for, one line each."""
    found = []
    if stage.job is not None and stage.state != "finished":
        found.append(f"Slurm job {stage.job.id}, log {stage.job.log.replace('%j', stage.job.id)}")
    if stage.steps and "time" in stage.steps[-1] and stage.state != "finished":
        found.append(f"last step {duration(now - stage.steps[-1]['time'])} ago")
    if stage.checkpoint is not None:
        found.append(f"last checkpoint {stage.checkpoint}")
    elif stage.steps:
        found.append("no checkpoint yet")
    if stage.validation:
        last = stage.validation[-1]
        losses = ", ".join(f"{name} {_figure(loss, '.4f')}" for name, loss in last["losses"].items())
        found.append(f"validation loss at step {last['step']:,}: {losses}")
    if stage.evaluations:
        last = stage.evaluations[-1]
        scores = ", ".join(f"{name} {_figure(score, '.1%')}" for name, score in last["tasks"].items())
        found.append(f"scores at step {last['step']:,}: {scores}")
    if stage.skipped_steps:
        newest = [f", the last at {fault['step']:,}: {fault['fault']}" for fault in stage.faults[-1:]]
        found.append(f"{plural(stage.skipped_steps, 'step')} skipped{''.join(newest)}")
    if stage.steps and stage.steps[-1].get("skipped"):
        found.append(f"{plural(stage.steps[-1]['skipped'], 'record')} skipped")
    if stage.state in ("starting", "running") and (still := standstill(stage.folder, stage.attempt)) is not None:
        found.append(still)
    if stage.state == "running" and (slow := straggler(stage.steps)) is not None:
        found.append(slow)
    if stage.last_error is not None and stage.state != "finished":
        found.append(f"error: {stage.last_error['message']}")
    return [f"{stage.name}: {line}" for line in found]


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
