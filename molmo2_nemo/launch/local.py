"""Starts the processes of a run and brings back one exit code and, on failure, one message.

Inside a torchrun or Slurm job the processes exist already and training runs right here. Otherwise one process runs in a
fresh interpreter, several through torch's elastic launcher (`molmo2_nemo.launch.elastic`). With cluster=slurm, outside
a job, nothing runs: the stage is submitted.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import INTERRUPTED, PREEMPTED, USER_ERROR, UserError, show_error
from molmo2_nemo.launch.slurm.script import IN_SLURM_JOB
from molmo2_nemo.rundir.stages import (
    Locked,
    note_error,
    only_run,
    refuse_other_run,
    resolve_checkpoint,
    stage_dir,
    write_config,
)
from molmo2_nemo.settings import checks
from molmo2_nemo.settings.run import RunConfig

ERROR_DIR = "MOLMO2_ERROR_DIR"  # where workers leave the reason they ended for
LOCK_WAIT = 120.0  # seconds a Slurm job waits for another run to leave the folder: one of a node that died may be in it


def launch(cfg: RunConfig) -> int:
    """Runs one stage to its end and returns the exit code: 0, 2 (user error), 75 (preempted), 130 (interrupted) or
    another failure.

    Raises:
        UserError: something is wrong that can be known before any process starts.
    """
    adopt_slurm(os.environ)
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        return _run_here(cfg)
    if cfg.cluster.kind == "slurm":
        raise UserError(
            "cluster.kind=slurm, but this is not a task of a Slurm job: submit one with molmo2 train or "
            "molmo2 pipeline, start it with srun inside an allocation, or use cluster=local"
        )
    resolve_start(cfg)
    checks.check(cfg)
    with only_run(stage_dir(cfg)), tempfile.TemporaryDirectory(prefix="molmo2-") as errors:
        refuse_other_run(cfg)
        path = write_config(cfg)
        if cfg.cluster.nodes > 1:
            raise UserError(start_by_hand(cfg, path))
        count = checks.wanted_processes(cfg)
        command = [sys.executable, "-m", "molmo2_nemo.launch.elastic", str(count), str(path)]
        if count == 1:
            command = [sys.executable, "-m", "molmo2_nemo.launch.worker", str(path)]
        env = {**os.environ, ERROR_DIR: errors}
        env.setdefault("OMP_NUM_THREADS", str(cfg.cluster.threads))
        code = _run_child(command, env)
        write_config(cfg)  # again: NeMo's logger moves what it finds in the folder into run_N/
        if (Path(errors) / "preempted").is_file():
            return PREEMPTED
        if code not in (0, INTERRUPTED):
            code = _explain(Path(errors), code, stage_dir(cfg))
    return code


def start_by_hand(cfg: RunConfig, config: Path) -> str:
    """How to start what has no scheduler to start it: one line for every node."""
    nodes = cfg.cluster.nodes
    line = [f"torchrun --nnodes={nodes} --nproc-per-node={checks.wanted_processes(cfg) // nodes} --rdzv-backend=c10d"]
    line.append(f"--rdzv-endpoint=FIRST_NODE:29500 -m molmo2_nemo.cli.main train --config {shlex.quote(str(config))}")
    return (
        f"cluster.nodes={nodes} with cluster.kind=local: processes on other nodes are not started from here. Call this "
        f"line on each node, in the same folder, with the name of one node for FIRST_NODE: {' '.join(line)}"
    )


def resolve_start(cfg: RunConfig) -> None:
    """Where `init_from` names a run's folder, the checkpoint it ended with.

    Raises:
        UserError: there is none.
    """
    if cfg.init_from is not None:
        cfg.init_from = str(resolve_checkpoint(cfg.init_from))


def adopt_slurm(env: Any) -> None:
    """Gives a process that srun started the variables torch expects, unless a launcher has set them."""
    if not in_step(env) or "SLURM_PROCID" not in env or "RANK" in env:
        return
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env.get("SLURM_NTASKS", "1")
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    env["LOCAL_WORLD_SIZE"] = str(int(env["WORLD_SIZE"]) // int(env.get("SLURM_NNODES", "1")))
    if "MASTER_ADDR" not in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost")
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        env["MASTER_ADDR"] = listed.stdout.split()[0] if listed.stdout.split() else "localhost"
    # Every process of a job computes the same port; other jobs of the node compute others.
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))


def in_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process. The shells of sbatch and salloc have step numbers above all real ones."""
    step = env.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < 0xFFFFFFF0


def _run_here(cfg: RunConfig) -> int:
    """Trains in this process, which is one of several that something else started.

    In a job that we submitted, all tasks leave their reports in one folder, and the first to end says in `outcome` how
    (see launch/slurm/script.py). A task that was preempted then leaves with 0: srun would kill the others for any other
    code.
    """
    from molmo2_nemo.launch.worker import run

    attempt = os.environ.get(IN_SLURM_JOB)
    try:
        resolve_start(cfg)
        checks.check(cfg, int(os.environ["WORLD_SIZE"]))
        first = os.environ["RANK"] == "0"
        with only_run(stage_dir(cfg), LOCK_WAIT if attempt else 0.0) if first else nullcontext():
            if first:
                refuse_other_run(cfg)
                write_config(cfg)
            with tempfile.TemporaryDirectory(prefix="molmo2-") as errors:
                os.environ[ERROR_DIR] = attempt or os.environ.get(ERROR_DIR, errors)
                code = run(cfg)
                if code not in (0, INTERRUPTED, PREEMPTED):
                    code = _explain(Path(os.environ[ERROR_DIR]), code)
    except Locked as error:
        if attempt is None:
            raise
        return _tell(Path(attempt), "failed", str(error), 1)  # no mistake: the next try may find the lock lifted
    except UserError as error:
        if attempt:
            _say_outcome(Path(attempt), "user_error", str(error))
        raise
    if attempt and code == PREEMPTED:
        _say_outcome(Path(attempt), "preempted", (Path(attempt) / "preempted").read_text())
        return 0
    return code


def _say_outcome(folder: Path, how: str, message: str) -> None:
    """Writes down how an attempt ended, unless another process was first: what it had to say is the cause."""
    # not files.atomic, with which the last would win
    part = folder / f"outcome.{os.environ.get('RANK', '0')}.part"
    part.write_text(f"{how}\n{message}\n")
    try:
        os.link(part, folder / "outcome")  # whole or not at all, and only once
    except FileExistsError:
        pass
    part.unlink()


def _run_child(command: list[str], env: Mapping[str, str]) -> int:
    """Runs the command to its end; passes SIGTERM, SIGUSR1 and Ctrl-C on and waits for the children to leave."""
    process = subprocess.Popen(command, env=dict(env))
    passed_on = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, lambda number, _: process.send_signal(number)) for number in passed_on]
    try:
        return process.wait()
    except KeyboardInterrupt:
        # The terminal has sent SIGINT to the child as well; a second one would cut its clean-up short.
        try:
            process.wait(timeout=60)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            process.kill()
            process.wait()
        return INTERRUPTED
    finally:
        for number, handler in zip(passed_on, before, strict=True):
            signal.signal(number, handler)


def _explain(errors: Path, code: int, stage: Path | None = None) -> int:
    """Prints the one message that explains why the processes ended; returns the exit code to leave with.

    Args:
        errors: where the processes have left their reports.
        stage: the stage's folder, which keeps the message unless it is all that the processes have reported there. None
            in a job's task, which sees some of them only; the job's script decides there.
    """
    reports = [json.loads(p.read_text()) for p in sorted(errors.glob("rank*.json"))]
    known = len(reports) == 1
    mistakes = [r for r in reports if r["user_error"]]
    if mistakes:
        return _tell(errors, "user_error", mistakes[0]["message"], USER_ERROR, None if known else stage)
    launcher = errors / "launcher.json"
    why: dict[str, Any] = json.loads(launcher.read_text()) if launcher.is_file() else {"rank": 0, "exit_code": code}
    reported = {str(r["rank"]) for r in reports}
    for rank, died in why.get("failures", {}).items():
        if died < 0 and died != -signal.SIGTERM and rank not in reported:
            # Killed, so it could not say why; what the others report is that they lost it.
            why, reports = {"rank": int(rank), "exit_code": died}, []
            break
    if reports:
        # The first to fail is the cause; the others usually report a lost connection to it.
        first = min(reports, key=lambda r: r["time"])
        if first["rank"] == int(os.environ.get("RANK", first["rank"])):
            print(first["traceback"], file=sys.stderr, end="")
        message = f"process {first['rank']} failed: {first['message']}"
        return _tell(errors, "failed", message, 1, None if known else stage)
    if why["exit_code"] < 0:
        name = signal.Signals(-why["exit_code"]).name
        hint = "; this is how it looks when memory runs out" if name == "SIGKILL" else ""
        message = f"process {why['rank']} was ended by {name}{hint}. Call the same command again to go on"
        return _tell(errors, "failed", message, 128 - why["exit_code"], stage)
    message = f"process {why['rank']} ended with exit code {why['exit_code']}"
    return _tell(errors, "failed", message, code if code > 0 else 1, stage)


def _tell(errors: Path, how: str, message: str, code: int, stage: Path | None = None) -> int:
    """Shows the message, notes it where a Slurm job's script looks and, as the cause of what else is there, in the
    stage's errors.jsonl; gives the exit code back."""
    if IN_SLURM_JOB in os.environ:
        _say_outcome(errors, how, message)
    if stage is not None:
        user_error = how == "user_error"
        note_error(stage, {"time": time.time(), "message": message, "user_error": user_error, "cause": True})
    show_error(message)
    return code
