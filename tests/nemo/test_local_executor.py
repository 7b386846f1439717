"""`run.executor=local` on NeMo's own line: the run is a process of NeMo-Run's, and does not outlive NeMo's command."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from molmo2_nemo.errors import PREEMPTED
from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.rundir.lines import read_metrics
from molmo2_nemo.rundir.progress import read_run

ROOT = Path(__file__).parents[2]
FACTORY = "molmo2_tiny_sft(dir='run', overrides='parallel=single stage.max_steps=100000 save_every=100000')"
PATIENCE = 900.0  # seconds until what is waited for must have come


def job_of(command: int) -> tuple[list[str], dict[str, str]]:
    """Words and environment of the job that NeMo's command has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_text().split("\0")[:-1]
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == command and "nemo_run.core.runners.fdl_runner" in words:
                return words, dict(v.split("=", 1) for v in (folder / "environ").read_text().split("\0") if "=" in v)
    raise AssertionError("NeMo's command has no such job")


@pytest.mark.trainer
def test_a_run_saves_and_leaves_when_nemos_command_is_gone(shards, tmp_path):
    stage, home = tmp_path / "run" / "sft", tmp_path / "nemo_jobs"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MOLMO2_DEMO_DATA": str(shards), "NEMORUN_HOME": str(home)}
    path = (
        f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the executor starts the first python there
    )
    line = ["nemo", "llm", "train", "-y", "--factory", FACTORY, "run.executor=local"]
    with (tmp_path / "out").open("w") as out:
        command = subprocess.Popen(line, cwd=tmp_path, env={**env, "PATH": path}, stdout=out, stderr=out)

    def until(met) -> None:
        end = time.monotonic() + PATIENCE
        while not met():
            assert time.monotonic() < end, (tmp_path / "out").read_text()[-3000:]
            time.sleep(0.5)

    try:
        until(lambda: command.poll() is not None or read_metrics(stage))
        assert command.poll() is None, (tmp_path / "out").read_text()[-3000:]
        late = job_of(command.pid)
    finally:
        command.kill()
        command.wait()
    until(lambda: "the same command resumes" in "".join(log.read_text() for log in home.rglob("*.log")))
    (saved,) = checkpoint_manifest.finished(stage / "checkpoints")
    assert saved.name == f"step={read_metrics(stage)[-1]['step']}"
    (found,) = (each for each in read_run(tmp_path / "run") if each.name == "sft")
    assert found.state != "running" and found.last_error is None

    # the same process again, as if it had still been importing when NeMo's command ended
    words, env = late
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == PREEMPTED and "NeMo's command ended while this job started" in done.stderr, done.stderr
    assert [saved] == checkpoint_manifest.finished(stage / "checkpoints")
