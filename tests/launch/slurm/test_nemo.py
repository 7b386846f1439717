"""NeMo's own launcher on a real Slurm: the lines of docs/nemo.md for the tiny recipe, as they stand but for the
partition's name; and a job of theirs that is asked to leave, and one that Slurm starts again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.rundir.lines import read_metrics
from molmo2_nemo.rundir.summary import read_summary
from tests.launch.slurm.cluster import wait_for

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "nemo.md").read_text()
PATIENCE = 900.0  # seconds
STEPS = 60  # of the job that is stopped twice


class Job:
    """What the page's lines submit, in a folder.

    Args:
        changes: of the lines, (what stands there, what is put in its place).
    """

    def __init__(self, slurm: Any, shards: Path, folder: Path, *changes: tuple[str, str]) -> None:
        self.slurm, self.folder, self.stage = slurm, folder, folder / "runs" / "slurm" / "sft"
        found = re.search(r"^export NEMORUN_HOME.*?gpus_per_node=null$", PAGE, re.M | re.S)
        assert found is not None
        lines = found[0]
        for old, new in [("partition=cpu", "partition=main"), *changes]:
            assert old in lines
            lines = lines.replace(old, new)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {**slurm.env, "PATH": path, "PYTHONPATH": str(ROOT), "MOLMO2_DEMO_DATA": str(shards)}
        env["MASTER_ADDR"] = "127.0.0.1"
        done = subprocess.run(["bash", "-ec", lines], capture_output=True, text=True, env=env, cwd=folder)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def log(self) -> str:
        files = [p for p in (self.folder / "nemo_jobs").rglob("*.out") if p.is_file()]
        texts = [f"--- {p}\n{p.read_text(errors='replace')[-3000:]}" for p in files]
        return "\n".join(texts) + self.slurm.logs()

    def until(self, met: Any, what: str) -> Any:
        return wait_for(met, PATIENCE, what, self.log)

    def steps(self) -> list[int]:
        return [line["step"] for line in read_metrics(self.stage)]

    def goes_on(self, job: str) -> None:
        """Slurm holds a requeued job back for two minutes. Some seconds are needed: an attempt that starts in the
        second in which the first was ended is refused as "already killed"."""
        self.until(lambda: self.slurm.state(job) == "PENDING", "the job to be requeued")
        self.slurm.run("scontrol", "update", f"jobid={job}", "StartTime=now+5")
        self.until(lambda: self.slurm.state(job) == "RUNNING", "the job to run again")


@pytest.fixture
def jobs(slurm):
    """Ids of the cluster's jobs that are not over."""
    return lambda: slurm.run("squeue", "--noheader", "--format=%i").stdout.split()


def test_one_line_submits_a_job(slurm, shards, tmp_path):
    job = Job(slurm, shards, tmp_path)
    summary = job.until(lambda: read_summary(job.stage), "the job's stage to be finished")
    assert summary["steps"] == 4 and summary["layout"] == "TP2+SP" and (job.stage / "config.yaml").is_file()


def test_a_job_goes_on_where_it_was(slurm, shards, tmp_path, jobs):
    """First it gets the signal that comes before the time limit, and is started again for `run.executor.retries`; then
    Slurm requeues it, as it does for another job of higher priority."""
    steps = ("stage.max_steps=4", f"stage.max_steps={STEPS} save_every=2")
    before = set(jobs())
    more = ("gpus_per_node=null", "gpus_per_node=null run.executor.retries=1")
    job = Job(slurm, shards, tmp_path, steps, more, ("run.executor.account=lab ", ""))
    (number,) = set(jobs()) - before
    job.until(lambda: 3 in job.steps(), "three steps")
    slurm.run("scancel", "--signal=USR1", number)
    job.goes_on(number)
    stopped = max(job.steps())
    (newest, *_) = checkpoint_manifest.finished(job.stage / "checkpoints")
    assert newest.name == f"step={stopped}" and stopped < STEPS, job.log()
    job.until(lambda: stopped + 2 in job.steps(), "two steps more")
    slurm.run("scontrol", "requeue", number)
    job.goes_on(number)
    job.until(lambda: read_summary(job.stage), "the job's stage to be finished")
    assert job.steps() == list(range(1, STEPS + 1))
