"""A sweep (`--multirun`): its jobs, each in a numbered folder of its own, one after another or submitted to Slurm, and
a table of what came of them.

`<output_dir>/multirun.json` says which number has which overrides, so that the same command, or one with more values,
goes on where this one ended: what is finished is not run again, and a job that failed or was stopped resumes.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import INTERRUPTED, PREEMPTED, USER_ERROR, UserError, of_setting, read_text, show_error
from molmo2_nemo.errors import user_message as message_of
from molmo2_nemo.files import write_json, write_text
from molmo2_nemo.launch.local import signals_passed
from molmo2_nemo.launch.slurm.step import in_step
from molmo2_nemo.rundir.paths import CONFIG, EVALUATION, MULTIRUN
from molmo2_nemo.rundir.progress import StageProgress, duration, read_run
from molmo2_nemo.rundir.results import read_results
from molmo2_nemo.settings.multirun import Sweep
from molmo2_nemo.settings.run import RunConfig

TABLE = "multirun.csv"  # beside MULTIRUN: the table, with keys in full
STOPPED = (INTERRUPTED, PREEMPTED)


@dataclass
class Job:
    """One combination of values."""

    number: int
    overrides: list[str]
    folder: Path  # its output_dir
    stages: Sequence[RunConfig]
    code: int | None = None  # exit code of this command's attempt; None: there was none


def run_sweep(
    sweep: Sweep,
    configure: Callable[[list[str]], Sequence[RunConfig]],
    run: Callable[[Sequence[RunConfig]], int],
    *,
    dry_run: bool = False,
) -> int:
    """Runs every job; one that fails stops no other. Prints the table, and which failed with which exit code.

    Args:
        configure: the stages of a job from its overrides.
        run: runs or submits them, and returns an exit code.
        dry_run: nothing is written.

    Returns:
        The first exit code that is not 0; that of a signal or Ctrl-C ends the sweep.

    Raises:
        UserError: settings of a job that cannot be composed, found before any job starts; a folder that has a run.
    """
    if "RANK" in os.environ or in_step(os.environ):
        raise UserError("--multirun starts runs; inside a torchrun or Slurm job leave it out, or call it outside")
    jobs = planned(sweep, configure)
    if not dry_run:
        _remember(jobs)
    before = signals_passed()
    for place, job in enumerate(jobs):
        print(f"job {job.number} ({place + 1} of {len(jobs)}), {' '.join(job.overrides)}: {job.folder}", flush=True)
        job.code = _code_of(run, job)
        if job.code in STOPPED or signals_passed() > before:
            break
    if dry_run:
        return next((job.code for job in jobs if job.code), 0)
    rows = [row_of(job) for job in jobs]
    write_text(jobs[0].folder.parent / TABLE, as_csv(rows))
    print(flush=True)
    show(rows)
    for job in jobs:
        if job.code:
            print(f"job {job.number}: exit code {job.code}; its folder is {job.folder}", flush=True)
    left = sum(job.code is None for job in jobs)
    if left:
        print(f"stopped before {left} of {len(jobs)} jobs; the same command goes on", flush=True)
    return next((job.code for job in jobs if job.code), PREEMPTED if left else 0)


def planned(sweep: Sweep, configure: Callable[[list[str]], Sequence[RunConfig]]) -> list[Job]:
    """The jobs with their numbers, those of an earlier command where they are the same, and their stages.

    Raises:
        UserError: a job that cannot be composed, names it; jobs with several folders; a folder that has a run.
    """
    named = any(o.lstrip("+").startswith("output_dir=") for o in sweep.fixed)
    swept = [override.partition("=")[0].lstrip("+~") for override in sweep.jobs[0]]
    if not named and {"recipe", "scale"} & set(swept):
        raise UserError(f"--multirun over {', '.join(swept)}: recipes have folders of their own; write output_dir=...")
    folder = Path(configure([*sweep.fixed, *sweep.jobs[0]])[0].output_dir)
    with of_setting(f"output_dir={folder}"):
        runs = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if runs:
        raise UserError(
            f"output_dir={folder} is the folder of a run ({', '.join(runs)}); give the sweep one of its own"
        )
    known = _remembered(folder)
    new = max(known.values(), default=-1) + 1
    jobs = []
    for overrides in sweep.jobs:
        if tuple(overrides) not in known:
            known[tuple(overrides)], new = new, new + 1
        number = known[tuple(overrides)]
        path = str(folder / str(number)).replace("\\", "\\\\").replace("'", "\\'")
        others = [o for o in sweep.fixed if not o.lstrip("+").startswith("output_dir=")]
        try:
            stages = configure([*others, *overrides, f"output_dir='{path}'"])
        except UserError as error:
            raise UserError(f"job {number} ({' '.join(overrides)}): {error}") from None
        jobs.append(Job(number, overrides, folder / str(number), stages))
    return jobs


def _remembered(folder: Path) -> dict[tuple[str, ...], int]:
    """Overrides of the jobs that the folder has -> their numbers.

    Raises:
        UserError: the file that says so is damaged.
    """
    path = folder / MULTIRUN
    if not path.is_file():
        return {}
    try:
        return {tuple(job["overrides"]): int(job["number"]) for job in json.loads(read_text(path))["jobs"]}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged, so that jobs have no numbers; take another output_dir") from None


def _remember(jobs: Sequence[Job]) -> None:
    folder = jobs[0].folder.parent
    known = _remembered(folder) | {tuple(job.overrides): job.number for job in jobs}
    listed = [
        {"number": number, "overrides": list(overrides)}
        for overrides, number in sorted(known.items(), key=lambda pair: pair[1])
    ]
    with of_setting(f"output_dir={folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MULTIRUN, {"jobs": listed})


def _code_of(run: Callable[[Sequence[RunConfig]], int], job: Job) -> int:
    """The exit code of a job; an error is shown and is one, so that the next job runs."""
    try:
        return run(job.stages)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - whatever it is, the other jobs are not its
        message = message_of(error)
        if message is None:
            traceback.print_exception(error)
            return 1
        show_error(f"job {job.number}: {message}")
        return USER_ERROR


def row_of(job: Job) -> dict[str, str]:
    """What the files of a job say: its number, values, and of its last stage that began the steps, last loss,
    validation losses and scores; the time is that of all its stages' steps."""
    found: list[StageProgress] = []
    if any(job.folder.glob(f"*/{CONFIG}")) or (job.folder / "slurm").is_dir():
        found = read_run(job.folder)
    began = [stage for stage in found if stage.steps or stage.attempt or stage.last_error] or found[:1]
    last = began[-1] if began else None
    finished = len(found) >= len(job.stages) and all(stage.state == "finished" for stage in found)
    state: str = "finished" if finished else last.state if last and last.state != "finished" else "waiting"
    if job.code and job.code not in STOPPED:
        state = f"failed ({job.code})"
    values = dict(override.split("=", 1) for override in job.overrides)
    row = {"job": str(job.number), **{key.lstrip("+"): value for key, value in values.items()}, "state": state}
    if len(job.stages) > 1:
        row["stage"] = last.name if last else ""
    row["step"] = f"{last.step}" if last and last.steps else ""
    row["loss"] = "" if last is None or last.loss is None else f"{last.loss:.4f}"
    losses = last.validation[-1]["losses"] if last and last.validation else {}
    row["validation"] = "\n".join(f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None)
    row["scores"] = "\n".join(f"{name} {100 * score:.1f} %" for name, score in _scores(last).items())
    seconds = sum(step["seconds"] for stage in found for step in stage.steps)
    row["time"] = duration(seconds) if seconds else ""
    return row


def _scores(stage: StageProgress | None) -> dict[str, float]:
    """Task -> score, 0 to 1: what was found of the stage's last checkpoint, else its last evaluation."""
    from molmo2_nemo.evaluation.results import called, main_score

    if stage is None:
        return {}
    found: dict[str, Any] = {}
    if stage.evaluations:
        found |= stage.evaluations[-1]["tasks"]
    if stage.checkpoint is not None:
        results = read_results(stage.folder / EVALUATION / stage.checkpoint.name).values()
        found |= {called(result): main_score(result) for result in results}
    return {name: score for name, score in found.items() if score is not None}


def as_csv(rows: Sequence[dict[str, str]]) -> str:
    """The rows with every column, keys in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows([{key: value.replace("\n", "; ") for key, value in row.items()} for row in rows])
    return text.getvalue()


def show(rows: Sequence[dict[str, str]]) -> None:
    """Prints the rows as a table of at most 80 columns; columns that no row fills are left out."""
    from rich.console import Console
    from rich.table import Table

    kept = [key for key in rows[0] if any(row[key] for row in rows)]
    swept = [
        key for key in kept if key not in ("job", "state", "stage", "step", "loss", "validation", "scores", "time")
    ]
    table = Table(box=None, pad_edge=False)
    right = {"job", "step", "loss", "time"}
    for key, name in zip(kept, [short(key, swept) for key in kept], strict=True):
        table.add_column(name, justify="right" if key in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(row[key] for key in kept))
    console = Console()
    if console.width > 80 or not console.is_terminal:
        console = Console(width=80)
    console.print(table, markup=False, highlight=False)


def short(key: str, keys: Sequence[str]) -> str:
    """The end of a dotted key by which it is told from the others, such as `lr` or `llm.lr`."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if not any(other != key and f".{other}".endswith(f".{end}") for other in keys):
            return end
    return key
