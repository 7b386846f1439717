"""The three stages on a real Slurm: order, preemption, cancelling, a dead rank, and the same command again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from molmo2_nemo.errors import USER_ERROR
from tests.launch.slurm.cluster import task_process, wait_for

STEPS = 24
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
WAIT = 400  # seconds until a test gives up; a stage of this size takes half a minute on two cores
NODE = ("cluster=slurm", "cluster.nodes=1", "cluster.precision=fp32", "cluster.slurm.exclusive=false")
HERE = ("cluster.slurm.mem=null", "cluster.slurm.env.MASTER_ADDR=127.0.0.1", "cluster.slurm.partition=main")


class Run:
    """One run's folder and the command that makes it."""

    def __init__(self, slurm, folder: Path, shards: Path, *settings: str, verb: str = "pipeline") -> None:
        self.slurm, self.folder, self.env = slurm, folder, slurm.env
        data = f"data.sources.demo.path='{shards}/${{stage.name}}'"
        self.settings = (verb, "recipe=tiny", f"output_dir={folder}", data, *NODE, *HERE, *settings)

    def call(self, *more: str, code: int = 0) -> str:
        """Calls the user's command; its standard output, or standard error where a failure is expected."""
        command = [sys.executable, "-m", "molmo2_nemo.cli.main", *self.settings, *more]
        done = subprocess.run(command, capture_output=True, text=True, env=self.env)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr if code else done.stdout

    def jobs(self) -> dict[str, str]:
        """Stage -> id of its last job."""
        return {stage: job["id"] for stage, job in json.loads((self.folder / "slurm/jobs.json").read_text()).items()}

    def steps(self, stage: str) -> list[int]:
        path = self.folder / stage / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.is_file() else []

    def wait_for_step(self, stage: str, step: int) -> None:
        wait_for(lambda: step in self.steps(stage), WAIT, f"step {step} of {stage}", self.log)

    def wait_for_state(self, job: str, *states: str) -> str:
        state = wait_for(lambda: (s := self.slurm.state(job)) in (*states, *OVER) and s, WAIT, f"job {job}", self.log)
        assert state in states, f"job {job} is {state}, not {states}\n{self.log()}"
        return state

    def log(self) -> str:
        """What all jobs have written, for messages."""
        files = sorted((self.folder / "slurm").glob("*/*.out"))
        return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-3000:]}" for f in files) + self.slurm.logs()

    def finished(self, stage: str) -> bool:
        return (self.folder / stage / "summary.json").is_file()


def property_of(slurm, job: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\S+)", slurm.run("scontrol", "show", "job", job).stdout)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def run(slurm, shards, tmp_path_factory):
    """The pipeline; one task per stage, two in the last. No second tries: each fault is looked at."""
    settings = ("parallel=single", "cluster.devices=1", "long:cluster.devices=2", "long:parallel=cp2")
    small = (f"stage.max_steps={STEPS}", "save_every=2", "stage.global_batch_size=2", "stage.micro_batch_size=1")
    folder = tmp_path_factory.mktemp("run") / "tiny"
    return Run(slurm, folder, shards, *settings, *small, "cluster.slurm.retries=0", "cluster.slurm.gpus_per_node=2")


def open_partition(slurm, state: str) -> None:
    """DOWN: jobs are taken and wait, so that what waits can be looked at in peace."""
    slurm.run("scontrol", "update", "PartitionName=main", f"State={state}")


def submitted_in_order_and_only_once(run):
    open_partition(run.slurm, "DOWN")
    run.call()
    first = run.jobs()
    assert list(first) == ["pretrain", "sft", "long"]
    assert [property_of(run.slurm, id_, "JobState") for id_ in first.values()] == ["PENDING"] * 3
    waits_for = [property_of(run.slurm, first[stage], "Dependency") for stage in ("sft", "long")]
    assert [w.split("(")[0] for w in waits_for] == [f"afterok:{first[s]}" for s in ("pretrain", "sft")]
    said = run.call()
    assert run.jobs() == first and "submitted" not in said
    assert all(f"job {id_} is " in said for id_ in first.values())
    assert len(run.slurm.run("squeue", "--noheader").stdout.splitlines()) == 3


def other_settings_while_a_job_waits_are_refused(run):
    before = run.jobs()
    error = run.call("sft:stage.max_steps=9", code=USER_ERROR)
    assert "is now 9" in error and f"scancel {before['sft']}" in error and run.jobs() == before


def a_preempted_job_is_requeued_and_goes_on(run):
    job, waiting = run.jobs()["pretrain"], run.jobs()["sft"]
    open_partition(run.slurm, "UP")
    run.wait_for_step("pretrain", 2)
    run.slurm.run("scancel", "--signal=USR1", job)
    run.wait_for_state(job, "PENDING")
    outcome = (run.folder / f"slurm/pretrain/attempt-{job}-0/outcome").read_text()
    assert outcome.startswith("preempted\n") and not run.finished("pretrain")
    saved = max(run.steps("pretrain"))
    assert f"step {saved} " in outcome and saved < STEPS
    assert run.slurm.state(waiting) == "PENDING"
    # Slurm lets requeued jobs wait two minutes. Some seconds are needed: an attempt that starts in the second in which
    # the first was ended is refused as "already killed".
    run.slurm.run("scontrol", "update", f"jobid={job}", "StartTime=now+5")
    run.wait_for_state(job, "COMPLETED")
    assert run.steps("pretrain") == list(range(1, STEPS + 1))


def the_next_stage_starts_after_it(run):
    first, second = run.jobs()["pretrain"], run.jobs()["sft"]
    run.wait_for_step("sft", 2)
    assert property_of(run.slurm, second, "StartTime") >= property_of(run.slurm, first, "EndTime")
    start = (run.folder / "sft/config.yaml").read_text()
    assert f"{run.folder}/pretrain/checkpoints/" in start  # init_from, looked up when the job started


def a_cancelled_job_stays_cancelled_and_the_same_command_completes_it(run):
    before = run.jobs()
    run.slurm.run("scancel", before["sft"])
    run.wait_for_state(before["sft"], "CANCELLED")
    run.wait_for_state(before["long"], "CANCELLED")
    assert not run.finished("sft")
    said = run.call()
    after = run.jobs()
    assert "pretrain: already finished, skipped" in said and after["pretrain"] == before["pretrain"]
    assert after["sft"] != before["sft"] and after["long"] != before["long"]
    run.wait_for_state(after["sft"], "COMPLETED")
    assert sorted(set(run.steps("sft"))) == list(range(1, STEPS + 1))


def a_dead_rank_ends_the_job_and_the_same_command_completes_it(run):
    job = run.jobs()["long"]
    run.wait_for_step("long", 1)
    assert property_of(run.slurm, job, "TresPerNode") in ("gres:gpu:2", "gpu:2")
    process = task_process(job, rank=1)
    assert process is not None
    os.kill(process, signal.SIGKILL)
    run.wait_for_state(job, "FAILED")
    log = next((run.folder / "slurm/long").glob(f"sbatch_*_{job}.out")).read_text()
    assert re.search(r"^molmo2: srun: error: n\d: task 1: Killed$", log, re.MULTILINE)
    run.call()
    again = run.jobs()["long"]
    assert again != job
    run.wait_for_state(again, "COMPLETED")
    assert sorted(set(run.steps("long"))) == list(range(1, STEPS + 1))


def nothing_is_left_to_do(run):
    before = run.jobs()
    assert run.call().count("already finished, skipped") == 3
    assert run.jobs() == before and run.slurm.run("squeue", "--noheader").stdout == ""


STORY = (
    submitted_in_order_and_only_once,
    other_settings_while_a_job_waits_are_refused,
    a_preempted_job_is_requeued_and_goes_on,
    the_next_stage_starts_after_it,
    a_cancelled_job_stays_cancelled_and_the_same_command_completes_it,
    a_dead_rank_ends_the_job_and_the_same_command_completes_it,
    nothing_is_left_to_do,
)


@pytest.fixture(scope="module")
def story(run):
    """Tells the story up to a part, from where it was told last; so each part can also be asked for alone."""
    told = []

    def until(part) -> None:
        while part not in told:
            STORY[len(told)](run)
            told.append(STORY[len(told)])

    return until


@pytest.mark.parametrize("part", STORY, ids=lambda part: part.__name__)
def test_story(story, part):
    story(part)


def test_the_users_mistake_in_a_job_is_told_and_not_tried_again(slurm, shards, tmp_path):
    """The shards disappear between submission and start; a real srun takes the options meant for pyxis."""
    data = tmp_path / "shards" / "sft"
    data.parent.mkdir()
    data.symlink_to(shards / "sft")
    mine = Run(
        *(slurm, tmp_path / "run", data.parent, "stage=sft", "parallel=single", "cluster.devices=1"),
        *(f"cluster.slurm.setup=['rm {data}','export CONTAINER_FLAGS={tmp_path}/flags']",),
        *("cluster.slurm.container=registry/image:1", f"cluster.slurm.mounts=['{shards}:{shards}:ro']"),
        *(f"cluster.slurm.command='{sys.executable} -m molmo2_nemo.cli.main'", "cluster.slurm.gpus_per_node=0"),
        verb="train",
    )
    if (slurm.folder / "plugstack.conf").read_text() == "":
        mine.settings = tuple(s for s in mine.settings if "container=" not in s)
    mine.call()
    job = mine.jobs()["sft"]
    mine.wait_for_state(job, "FAILED")
    assert property_of(slurm, job, "ExitCode") == f"{USER_ERROR}:0"
    log = next((mine.folder / "slurm/sft").glob("sbatch_*.out")).read_text()
    assert (
        f"molmo2: data.sources.demo: data set 'demo': no folder at {data}" in log and "\nmolmo2: requeued\n" not in log
    )
    if (slurm.folder / "plugstack.conf").read_text():
        flags = dict(line.split("=", 1) for line in (tmp_path / "flags").read_text().splitlines())
        assert flags["container-image"] == "registry/image:1"
        mounts = flags["container-mounts"].split(",")
        assert f"{shards}:{shards}:ro" in mounts and f"{mine.folder}:{mine.folder}" in mounts


def test_what_sbatch_refuses_is_one_line(slurm, shards, tmp_path):
    mine = Run(slurm, tmp_path / "run", shards, "stage=sft", "parallel=single", "cluster.devices=1", verb="train")
    error = mine.call("cluster.slurm.partition=none", code=USER_ERROR)
    assert error.startswith("molmo2: error: sbatch on this machine failed:") and "partition" in error
    assert error.count("\n") == 1 and not (mine.folder / "slurm/jobs.json").exists()


def test_over_ssh_the_same_jobs_are_submitted_and_recognised(slurm, shards, tmp_path):
    """From a machine that is no login node: every command and file goes through sshd. The job is held back."""
    login = slurm.start_sshd()
    if login is None:
        pytest.skip("no sshd here (Debian: openssh-server)")
    port, key = login
    ssh = ("ssh.host=127.0.0.1", f"ssh.port={port}", "ssh.user=root", f"ssh.identity={key}", "options.begin=now+1hour")
    settings = [f"cluster.slurm.{s}" for s in (*ssh, f"workdir={tmp_path}", "command=molmo2")]
    mine = Run(
        slurm, tmp_path / "run", shards, "stage=sft", "parallel=single", "cluster.devices=1", *settings, verb="train"
    )
    mine.env = dict(os.environ)  # no SLURM_CONF: only the other side knows the cluster
    said = mine.call()
    job = mine.jobs()["sft"]
    assert f"job {job} submitted" in said and slurm.state(job) == "PENDING"
    assert f"job {job} is pending (BeginTime)" in mine.call() and mine.jobs()["sft"] == job
    error = mine.call("stage.max_steps=9", code=USER_ERROR)
    assert "is now 9" in error
    slurm.run("scancel", job)
    assert f"job {job} " not in mine.call() and mine.jobs()["sft"] != job
    slurm.run("scancel", mine.jobs()["sft"])
    error = mine.call("cluster.slurm.ssh.port=1", code=USER_ERROR)
    assert "cannot reach 127.0.0.1" in error and error.count("\n") == 1
