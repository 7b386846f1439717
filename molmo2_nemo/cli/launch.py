"""Starts the processes of a run and brings back one exit code and, on failure, one message.

Inside a torchrun or Slurm job the processes exist already and training runs right here. Otherwise one process runs in a
fresh interpreter, several through torch's elastic launcher (`molmo2_nemo.cli.elastic`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molmo2_nemo.cli import checks
from molmo2_nemo.cli.runs import only_run, stage_dir, write_config
from molmo2_nemo.config import RunConfig
from molmo2_nemo.errors import INTERRUPTED, USER_ERROR, UserError, show_error

ERROR_DIR = "MOLMO2_ERROR_DIR"  # where workers leave the reason they ended for


def launch(cfg: RunConfig) -> int:
    """Runs one stage to its end and returns the exit code: 0, 2 (user error), 130 (interrupted) or another failure.

    Raises:
        UserError: something is wrong that can be known before any process starts.
    """
    adopt_slurm(os.environ)
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        return _run_here(cfg)
    if cfg.cluster.kind == "slurm":
        raise UserError(
            "cluster.kind=slurm, but this is not a Slurm job: start it with srun inside an allocation "
            "(recipes/ has the scripts), or use cluster=local"
        )
    checks.check(cfg)
    if cfg.cluster.nodes > 1:
        raise UserError(f"cluster.nodes={cfg.cluster.nodes}: start one `torchrun ... -m molmo2_nemo.cli.main` per node")
    with only_run(stage_dir(cfg)), tempfile.TemporaryDirectory(prefix="molmo2-") as errors:
        path = write_config(cfg)
        count = checks.wanted_processes(cfg)
        command = [sys.executable, "-m", "molmo2_nemo.cli.elastic", str(count), str(path)]
        if count == 1:
            command = [sys.executable, "-m", "molmo2_nemo.cli.worker", str(path)]
        env = {**os.environ, ERROR_DIR: errors}
        env.setdefault("OMP_NUM_THREADS", str(cfg.cluster.threads))
        code = _run_child(command, env)
        write_config(cfg)  # again: NeMo's logger moves what it finds in the folder into run_N/
        if code not in (0, INTERRUPTED):
            code = _explain(Path(errors), code)
    return code


def adopt_slurm(env: Any) -> None:
    """Gives a process that srun started the variables torch expects, unless a launcher has set them."""
    if "SLURM_PROCID" not in env or "RANK" in env or int(env.get("SLURM_NTASKS", "1")) == 1:
        return
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    if "MASTER_ADDR" not in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost")
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        env["MASTER_ADDR"] = listed.stdout.split()[0] if listed.stdout.split() else "localhost"
    # Every process of a job computes the same port; other jobs of the node compute others.
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))


def _run_here(cfg: RunConfig) -> int:
    """Trains in this process, which is one of several that something else started."""
    from molmo2_nemo.cli.worker import run

    checks.check(cfg, int(os.environ["WORLD_SIZE"]))
    if os.environ["RANK"] == "0":
        write_config(cfg)
    with tempfile.TemporaryDirectory(prefix="molmo2-") as errors:
        os.environ.setdefault(ERROR_DIR, errors)
        code = run(cfg)
        return code if code in (0, INTERRUPTED) else _explain(Path(errors), code)


def _run_child(command: list[str], env: Mapping[str, str]) -> int:
    """Runs the command to its end; passes SIGTERM and Ctrl-C on and waits for the children to leave."""
    process = subprocess.Popen(command, env=dict(env))
    before = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
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
        signal.signal(signal.SIGTERM, before)


def _explain(errors: Path, code: int) -> int:
    """Prints the one message that explains why the processes ended; returns the exit code to leave with."""
    reports = [json.loads(p.read_text()) for p in sorted(errors.glob("rank*.json"))]
    mistakes = [r for r in reports if r["user_error"]]
    if mistakes:
        show_error(mistakes[0]["message"])
        return USER_ERROR
    if reports:
        # The first to fail is the cause; the others usually report a lost connection to it.
        first = min(reports, key=lambda r: r["time"])
        print(first["traceback"], file=sys.stderr, end="")
        show_error(f"process {first['rank']} failed: {first['message']}")
        return 1
    launcher = errors / "launcher.json"
    why = json.loads(launcher.read_text()) if launcher.is_file() else {"rank": 0, "exit_code": code}
    if why["exit_code"] < 0:
        name = signal.Signals(-why["exit_code"]).name
        hint = "; this is how it looks when memory runs out" if name == "SIGKILL" else ""
        show_error(f"process {why['rank']} was ended by {name}{hint}. Call the same command again to go on")
        return 128 - why["exit_code"]
    show_error(f"process {why['rank']} ended with exit code {why['exit_code']}")
    return code if code > 0 else 1
