"""Why the processes of a run ended: what each of them reports, and the one message a launcher makes of it.

A process that fails writes `rank<N>.json` (`Report`) into the folder that ERROR_DIR names; one that a signal stopped
writes `preempted` there, one that is through with its work `finished`. torch's elastic launcher adds `launcher.json`
(`Exits`). `explain_exit` finds the cause among them.

In a Slurm job of ours that folder is the attempt's, and the first task to end also writes `outcome` there, for the
job's script (launch/slurm/script.py): a word of `Ending` on the first line, the message on the rest.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from molmo2_nemo.errors import INTERRUPTED, PREEMPTED, USER_ERROR, plural, show_error
from molmo2_nemo.files import write_json
from molmo2_nemo.processes import this_rank
from molmo2_nemo.rundir.attempt import note_error
from molmo2_nemo.rundir.checkpoint_manifest import newest_whole
from molmo2_nemo.rundir.lines import read_metrics
from molmo2_nemo.rundir.paths import CHECKPOINTS, OUTCOME, stage_dir
from molmo2_nemo.rundir.progress import duration
from molmo2_nemo.rundir.summary import figures_missing, read_summary
from molmo2_nemo.rundir.verdicts import Ending
from molmo2_nemo.settings.run import RunConfig

ERROR_DIR = "MOLMO2_ERROR_DIR"  # variable with the folder that processes report to
FINISHED = "finished"  # file of a process that is through with its work
ATTEMPT_DIR = "MOLMO2_ATTEMPT"  # in a Slurm job of ours: variable with the folder of this attempt


@dataclass
class Report:
    """Why one process failed."""

    rank: int
    time: float  # seconds since the epoch
    message: str  # one line, as it is shown
    traceback: str
    user_error: bool  # the user can fix it, so no traceback is shown

    @classmethod
    def of(cls, error: BaseException, message: str, *, user_error: bool) -> Report:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        return cls(this_rank(), time.time(), message, text, user_error)

    def write(self, folder: Path) -> None:
        write_json(folder / f"rank{self.rank}.json", asdict(self), indent=None)


@dataclass
class Exits:
    """Exit codes of the processes; a negative one is the signal that ended the process."""

    rank: int  # the first to fail
    exit_code: int  # its code
    failures: dict[str, int] = field(default_factory=dict)  # rank -> code, of all that failed

    def write(self, folder: Path) -> None:
        write_json(folder / "launcher.json", asdict(self), indent=None)

    def killed(self, reported: set[int]) -> Exits | None:
        """The first process that a signal ended before it could report; SIGTERM is the launcher's own."""
        for rank, code in self.failures.items():
            if code < 0 and code != -signal.SIGTERM and int(rank) not in reported:
                return Exits(int(rank), code)
        return None


def report_preempted(why: str) -> None:
    """Writes down for the launcher that a signal stopped this process: torch's elastic launcher loses exit codes."""
    if os.environ.get(ERROR_DIR):
        (Path(os.environ[ERROR_DIR]) / Ending.PREEMPTED).write_text(why)


def preempted(folder: Path) -> str | None:
    """The report in `folder` of a process that a signal stopped; None if there is none."""
    path = folder / Ending.PREEMPTED
    return path.read_text() if path.is_file() else None


def report_finished() -> None:
    """Writes down for the launcher that this process is through with its work: where a signal came so late that nothing
    was cut short, torch's elastic launcher only says that there was one. A folder that cannot be written has no say."""
    if os.environ.get(ERROR_DIR):
        with suppress(OSError):
            (Path(os.environ[ERROR_DIR]) / FINISHED).touch()


def after_signal(folder: Path, code: int) -> int:
    """The exit code of a run that ended with `code`: where that is PREEMPTED and no process says that it was stopped,
    1 if one failed meanwhile, 0 if the work was done by then."""
    if code != PREEMPTED or preempted(folder) is not None:
        return code
    if read_reports(folder):
        return 1
    return 0 if (folder / FINISHED).exists() else code


def read_reports(folder: Path) -> list[Report]:
    return [Report(**json.loads(path.read_text())) for path in sorted(folder.glob("rank*.json"))]


def explain_exit(folder: Path, code: int, stage: Path | None = None) -> int:
    """Shows the one message that says why the processes ended; returns the exit code to leave with.

    Args:
        folder: where the processes have reported.
        code: the exit code that they ended with.
        stage: the stage's folder, whose errors.jsonl gets the message, unless it is what the processes have noted there
            themselves. None in a task of a job, which sees only some of the processes: the job's script decides there.
    """
    reports = read_reports(folder)
    stage_of_report = None if len(reports) == 1 else stage
    mistakes = [r for r in reports if r.user_error]
    if mistakes:
        return conclude(folder, Ending.USER_ERROR, mistakes[0].message, USER_ERROR, stage_of_report)
    launcher = folder / "launcher.json"
    exits = Exits(**json.loads(launcher.read_text())) if launcher.is_file() else Exits(0, code)
    killed = exits.killed({r.rank for r in reports})
    if killed is not None:  # what the others report is that they lost it
        return conclude(folder, Ending.FAILED, *_signalled(killed, stage), stage)
    if reports:
        # The first to fail is the cause; the others usually report a lost connection to it.
        first = min(reports, key=lambda r: r.time)
        if first.rank == int(os.environ.get("RANK", first.rank)):
            print(first.traceback, file=sys.stderr, end="")
        return conclude(folder, Ending.FAILED, f"process {first.rank} failed: {first.message}", 1, stage_of_report)
    if exits.exit_code < 0:
        return conclude(folder, Ending.FAILED, *_signalled(exits, stage), stage)
    message = f"process {exits.rank} ended with exit code {exits.exit_code}"
    return conclude(folder, Ending.FAILED, message, code if code > 0 else 1, stage)


def _signalled(exits: Exits, stage: Path | None) -> tuple[str, int]:
    """Message and exit code for a process that a signal ended; `stage` as for `explain_exit`."""
    name = signal.Signals(-exits.exit_code).name
    hint = ", as happens when memory runs out" if name == "SIGKILL" else ""
    again = "to resume"
    if stage is not None and newest_whole(stage / CHECKPOINTS) is None:
        again = "to start over: there is no checkpoint yet"
    message = f"process {exits.rank} was ended by {name}{hint}. Run the same command again {again}"
    return message, 128 - exits.exit_code


def conclude(folder: Path, how: Ending, message: str, code: int, stage: Path | None = None) -> int:
    """Shows the message, writes it down for a Slurm job's script and, marked as the cause, in the stage's errors.jsonl;
    returns `code`."""
    if ATTEMPT_DIR in os.environ:
        write_outcome(folder, how, message)
    if stage is not None:
        user_error = how == Ending.USER_ERROR
        note_error(stage, {"time": time.time(), "message": message, "user_error": user_error, "cause": True})
    show_error(message)
    return code


def write_outcome(folder: Path, how: Ending, message: str) -> None:
    """Writes down how an attempt ended, unless another process was first: what that one reported is the cause."""
    part = folder / f"{OUTCOME}.{this_rank()}.part"  # not files.atomic, with which the last would win
    part.write_text(f"{how}\n{message}\n")
    try:
        os.link(part, folder / OUTCOME)  # whole or not at all, and only once
    except FileExistsError:
        pass
    part.unlink()


def show_how_to_resume(code: int, stage: Path) -> None:
    """Prints, after Ctrl-C or a signal, what the same command does; nothing for other exit codes.

    Args:
        stage: the folder of the stage that ended so.
    """
    how = {INTERRUPTED: "interrupted", PREEMPTED: "stopped by a signal"}.get(code)
    if how is None:
        return
    if newest_whole(stage / CHECKPOINTS) is None:
        print(f"{how}; {stage} has no checkpoint yet, so the same command starts over", flush=True)
    else:
        print(f"{how}; the same command resumes from the last checkpoint in {stage}", flush=True)


def show_finished(cfg: RunConfig) -> None:
    """Prints what a stage that has ended came to: steps, tokens, time, checkpoint, figures that a signal has cost."""
    done = read_summary(stage_dir(cfg), cfg.stage.max_steps)
    if done is None:
        return
    missing = (
        f"missing: {name} of step {done['steps']}; the same command makes up for it" for name in figures_missing(cfg)
    )
    spent = duration(sum(line["seconds"] for line in read_metrics(stage_dir(cfg), seconds=(int, float))))
    print(
        f"{cfg.stage.name}: finished, {plural(done['steps'], 'step')}, {done['tokens']:,} tokens, {spent} of training\n"
        f"checkpoint: {done['checkpoint']}",
        *missing,
        sep="\n",
        flush=True,
    )


def next_commands(cfg: RunConfig) -> list[str]:
    """What can be done with a finished stage: ask, score, look at and export it. FILE stands for a picture."""
    stage = shlex.quote(str(stage_dir(cfg)))
    sources = (cfg.validation.sources or cfg.data.sources).values()
    data = next((shlex.quote(source.path) for source in sources if source.path), "SHARDS")
    return [
        f'molmo2 ask {stage} --image FILE "What is in the picture?"',
        f"molmo2 evaluate {stage} --data {data}",
        f"molmo2 report {shlex.quote(cfg.output_dir)}",
        f"molmo2 convert export {stage} {shlex.quote(f'{cfg.output_dir.rstrip(chr(47))}-hf')}",
    ]


def show_next(cfg: RunConfig) -> None:
    """Prints `next_commands`, in the process that speaks for the run."""
    if this_rank() == 0:
        print("next:", *(f"  {line}" for line in next_commands(cfg)), sep="\n", flush=True)
