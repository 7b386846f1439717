"""Starts the processes of a run and brings back one exit code and, on failure, one message.

Inside a torchrun or Slurm job the processes exist already and training runs right here. Otherwise one process runs in a
fresh interpreter, several through torch's elastic launcher (`molmo2_nemo.launch.elastic`). With cluster=slurm, outside
a job, nothing runs here: pipeline.py submits the stage.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from molmo2_nemo import compat
from molmo2_nemo.data.wordings import pin
from molmo2_nemo.errors import INTERRUPTED, PREEMPTED, UserError, of_setting, plural
from molmo2_nemo.launch.capacity import capacity_problems
from molmo2_nemo.launch.device import device_problems
from molmo2_nemo.launch.disk import disk_problems
from molmo2_nemo.launch.reports import (
    ATTEMPT_DIR,
    ERROR_DIR,
    after_signal,
    conclude,
    explain_exit,
    preempted,
    show_finished,
    write_outcome,
)
from molmo2_nemo.launch.slurm.step import adopt_slurm
from molmo2_nemo.launch.start import (
    evaluation_problems,
    finished_before,
    resolve_start,
    say_start,
    start_problems,
)
from molmo2_nemo.processes import STOP_SIGNALS, as_parent
from molmo2_nemo.rundir.config_file import write_config
from molmo2_nemo.rundir.lock import Locked, make_lockable, only_run
from molmo2_nemo.rundir.paths import stage_dir
from molmo2_nemo.rundir.resume import refuse_other_run
from molmo2_nemo.rundir.verdicts import Ending
from molmo2_nemo.settings import checks
from molmo2_nemo.settings.layout import layout_of_run
from molmo2_nemo.settings.run import RunConfig
from molmo2_nemo.settings.sizes import wanted_processes

WORKER, ELASTIC = "molmo2_nemo.launch.worker", "molmo2_nemo.launch.elastic"
HEARD = 5.0  # seconds after which a child that is still there did not get the Ctrl-C that its parent got
_passed_on: list[int] = []  # signals that `run_child` has passed to children of this process
LOCK_WAIT = 120.0  # seconds a Slurm job waits for the folder's lock, which a node that died may still hold


def launch(cfg: RunConfig) -> int:
    """Runs one stage to its end and returns the exit code: 0, 2 (user error), 75 (preempted), 130 (interrupted), or any
    other for a failure.

    Raises:
        UserError: a mistake that can be found before any process starts.
    """
    adopt_slurm(os.environ)
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        return _run_here(cfg)
    if cfg.cluster.kind == "slurm":
        raise UserError(
            "cluster.kind=slurm, but this is not a task of a Slurm job: submit one with molmo2 train or "
            "molmo2 pipeline, start it with srun inside an allocation, or use cluster=local"
        )
    compat.check()
    resolve_start(cfg)
    pin(cfg.data.text)
    machine = [*device_problems(cfg), *capacity_problems(cfg), *disk_problems(cfg)]
    checks.check(cfg, more=[*start_problems(cfg), *evaluation_problems(cfg), *machine])
    with of_setting(f"output_dir={cfg.output_dir}"):
        make_lockable(stage_dir(cfg))
    with only_run(stage_dir(cfg)), tempfile.TemporaryDirectory(prefix="molmo2-") as errors:
        refuse_other_run(cfg)
        path = write_config(cfg)
        if cfg.cluster.nodes > 1:
            raise UserError(start_by_hand(cfg, path))
        if (done := finished_before(cfg)) is not None:
            steps = plural(done["steps"], "step")
            print(f"{cfg.stage.name}: already finished, {steps} ({done['checkpoint']})", flush=True)
            return 0
        count = wanted_processes(cfg)
        command = [sys.executable, "-m", WORKER, str(path)]
        if count > 1:
            command = [sys.executable, "-m", ELASTIC, str(count), WORKER, str(path)]
        env = {**os.environ, **as_parent(), ERROR_DIR: errors}
        env.setdefault("OMP_NUM_THREADS", str(cfg.cluster.threads))
        say_start(cfg)
        print(starting(cfg, count), flush=True)
        code = after_signal(Path(errors), run_child(command, env))
        with suppress(OSError) if code else nullcontext():  # why the run failed is said below
            write_config(cfg)  # again: NeMo's logger moves what it finds in the folder into run_N/
        if preempted(Path(errors)) is not None:
            return PREEMPTED
        if code not in (0, INTERRUPTED, PREEMPTED):
            code = explain_exit(Path(errors), code, stage_dir(cfg))
    if code == 0:
        show_finished(cfg)
    return code


def starting(cfg: RunConfig, count: int) -> str:
    """What begins, and for what the first lines of the log are waited for."""
    what = f"{cfg.stage.name}: {plural(cfg.stage.max_steps, 'step')} of the {cfg.model.preset} model on "
    start = plural(count, "process starts", "processes start")
    return (
        f"{what}{layout_of_run(cfg.parallel)}, in {stage_dir(cfg)}\n"
        f"{cfg.stage.name}: {start}: libraries first (10 to 60 s), then the model and the data"
    )


def start_by_hand(cfg: RunConfig, config: Path) -> str:
    """How to start a run on several nodes without a scheduler: one command, the same on every node."""
    nodes = cfg.cluster.nodes
    line = [f"torchrun --nnodes={nodes} --nproc-per-node={wanted_processes(cfg) // nodes} --rdzv-backend=c10d"]
    line.append(f"--rdzv-endpoint=FIRST_NODE:29500 -m molmo2_nemo.cli.main train --config {shlex.quote(str(config))}")
    return (
        f"cluster.nodes={nodes} with cluster.kind=local: processes on other nodes are not started from here. Run "
        f"this command on each node, in the same folder, with one node's name in place of FIRST_NODE: {' '.join(line)}"
    )


def _run_here(cfg: RunConfig) -> int:
    """Trains in this process, which is one of several that something else started.

    In a job that we submitted, all tasks report to one folder, and the first to end writes `outcome` there (see
    launch/reports.py). A task that was preempted then leaves with 0: srun would kill the others for any other code.
    """
    from molmo2_nemo.launch.worker import run

    attempt = os.environ.get(ATTEMPT_DIR)
    try:
        resolve_start(cfg)
        pin(cfg.data.text)  # where the settings were composed, the file may not have been
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        machine = [*device_problems(cfg), *capacity_problems(cfg, local), *disk_problems(cfg)]
        here = [*start_problems(cfg), *evaluation_problems(cfg), *machine]
        checks.check(cfg, int(os.environ["WORLD_SIZE"]), more=here)
        first = os.environ["RANK"] == "0"
        with only_run(stage_dir(cfg), LOCK_WAIT if attempt else 0.0) if first else nullcontext():
            if first:
                refuse_other_run(cfg)
                write_config(cfg)
                say_start(cfg)
            with tempfile.TemporaryDirectory(prefix="molmo2-") as errors:
                os.environ[ERROR_DIR] = attempt or os.environ.get(ERROR_DIR, errors)
                code = run(cfg)
                if code not in (0, INTERRUPTED, PREEMPTED):
                    code = explain_exit(Path(os.environ[ERROR_DIR]), code)
                if first and code == 0:
                    show_finished(cfg)
    except Locked as error:
        if attempt is None:
            raise
        # no mistake: the next try may find the lock lifted
        return conclude(Path(attempt), Ending.FAILED, str(error), 1)
    except UserError as error:
        if attempt:
            write_outcome(Path(attempt), Ending.USER_ERROR, str(error))
        raise
    if attempt and code == PREEMPTED:
        write_outcome(Path(attempt), Ending.PREEMPTED, preempted(Path(attempt)) or "")
        return 0
    return code


def run_child(command: list[str], env: Mapping[str, str]) -> int:
    """Runs the command as a child process to its end and returns its exit code, INTERRUPTED after Ctrl-C, PREEMPTED
    where a signal that was passed on ended it before it could catch any.

    SIGTERM and SIGUSR1 are passed on to the child, those that arrive before it exists as soon as it does;
    training/signals.py has the whole story. The terminal sends Ctrl-C to both; a SIGINT to this process alone is
    passed on after HEARD seconds.
    """
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []  # signals that came before there was a child
    passed: set[int] = set()

    def pass_on(number: int, _: Any) -> None:
        passed.add(number)
        _passed_on.append(number)
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        process = subprocess.Popen(command, env=dict(env))
        for number in early:
            process.send_signal(number)
        code = _wait(process)
        return PREEMPTED if -code in passed else code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def signals_passed() -> int:
    """How many signals have asked runs of this process to save and leave. A run that was finished by then ends with 0
    all the same; whoever starts one after another compares this number and begins no other."""
    return len(_passed_on)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The child's exit code; after Ctrl-C INTERRUPTED once the child has left, 0 if it was through with its work."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        _passed_on.append(signal.SIGINT)
        try:
            code = _left_after_interrupt(process)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            process.kill()
            process.wait()
            return INTERRUPTED
        return INTERRUPTED if code else 0


def _left_after_interrupt(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a child that was interrupted by the terminal or, if only this process was (`kill -INT`), is now.

    Raises:
        TimeoutExpired: it does not leave.
    """
    try:
        return process.wait(timeout=HEARD)
    except subprocess.TimeoutExpired:  # not before: a second signal would cut short what the first one has begun
        process.send_signal(signal.SIGINT)
        return process.wait(timeout=60)
