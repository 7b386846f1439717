"""The job script as text, and what is refused before anything is submitted. The real Slurm is in test_pipeline.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.errors import USER_ERROR, UserError
from molmo2_nemo.launch.overlay import RECORD
from molmo2_nemo.launch.pipeline import compose_stages
from molmo2_nemo.launch.reports import ATTEMPT_DIR
from molmo2_nemo.launch.slurm.jobs import login_of, stage_job, waits_or_runs
from molmo2_nemo.launch.slurm.script import TRAP, script
from molmo2_nemo.rundir.config_file import write_config
from molmo2_nemo.rundir.jobs import Job, read_jobs
from molmo2_nemo.rundir.progress import read_stage
from molmo2_nemo.rundir.summary import write_summary
from molmo2_nemo.rundir.verdicts import read_verdicts
from molmo2_nemo.settings.compose import compose

IDS = (("pretrain", "41"), ("sft", "42"), ("long", "43"))


def text_of(tmp_path, *settings, after=None) -> str:
    cfg = compose(["recipe=tiny", "stage=sft", "cluster=slurm", f"output_dir='{tmp_path}/run'", *settings])
    with login_of([cfg]) as login:
        return script(stage_job(cfg), login, after)


def options(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_settings_become_options_of_sbatch(tmp_path):
    site = ("account=lab", "partition=gpu", "qos=high", "time='2-00:00:00'", "cpus_per_task=14", "reservation=mine")
    more = ("options={licenses: 'lustre:1'}", "constraint=h100")
    found = options(text_of(tmp_path, "cluster.nodes=4", *(f"cluster.slurm.{s}" for s in (*site, *more)), after="12"))
    wanted = {"account": "lab", "partition": "gpu", "qos": "high", "time": "2-00:00:00", "cpus-per-task": "14"}
    wanted |= {"reservation": "mine", "licenses": "lustre:1", "constraint": "h100", "nodes": "4"}
    wanted |= {"ntasks-per-node": "8", "gpus-per-node": "8", "mem": "0", "exclusive": "", "requeue": ""}
    wanted |= {"dependency": "afterok:12", "kill-on-invalid-dep": "yes", "signal": "USR1@300"}
    assert wanted.items() <= found.items()
    without = options(text_of(tmp_path, "cluster.slurm.requeue=false", "cluster.slurm.gpus_per_node=0"))
    assert "no-requeue" in without and not {"requeue", "gpus-per-node", "dependency", "account"} & set(without)


def test_srun_line_with_and_without_a_container(tmp_path):
    bare = next(line for line in text_of(tmp_path).splitlines() if line.startswith("srun --output"))
    assert "--kill-on-bad-exit=1" in bare and "container" not in bare
    assert f"train --config {tmp_path}/run/slurm/sft.yaml" in bare and "python" in bare
    image = ("cluster.slurm.container=/images/molmo2.sqsh", "cluster.slurm.mounts=['/data:/data:ro']")
    boxed = next(line for line in text_of(tmp_path, *image).splitlines() if line.startswith("srun --output"))
    assert (
        "--container-image /images/molmo2.sqsh" in boxed and boxed.endswith("/sft.yaml") and " molmo2 train " in boxed
    )
    assert f"--container-mounts /data:/data:ro,{tmp_path}/run:{tmp_path}/run," in boxed


def test_jobs_start_the_command_of_the_overlay_that_submits_them(tmp_path, monkeypatch):
    (tmp_path / "overlay" / "site").mkdir(parents=True)
    (tmp_path / "overlay" / "site" / RECORD).write_text(json.dumps({"beside": {}}))
    monkeypatch.syspath_prepend(tmp_path / "overlay" / "site")
    line = next(line for line in text_of(tmp_path).splitlines() if line.startswith("srun --output"))
    assert f"MOLMO2_PYTHON={sys.executable} {tmp_path}/overlay/bin/molmo2 train --config" in line
    image = "cluster.slurm.container=/images/molmo2.sqsh"  # has an overlay of its own
    assert "MOLMO2_PYTHON" not in text_of(tmp_path, image) and " molmo2 train " in text_of(tmp_path, image)
    (tmp_path / "overlay" / "site" / RECORD).write_text("xx")
    with pytest.raises(UserError, match="make it again"):
        text_of(tmp_path)


def test_scripts_are_sound_shell(tmp_path):
    text = text_of(tmp_path, 'cluster.slurm.env={NAME: "it\'s $5"}', "cluster.slurm.setup=['module load cuda']")
    assert "export NAME='it'\"'\"'s $5'" in text and text.index("module load cuda") < text.index("trap molmo2_end")
    path = tmp_path / "job.sh"
    path.write_text(text)
    subprocess.run(["bash", "-n", str(path)], check=True)


def end_of_attempt(tmp_path, outcome: str, said_by_srun: list[str], steps: int = 20) -> tuple[int, str]:
    """The trap in a shell: exit code and output of an attempt in which tasks left `outcome` and srun failed."""
    stage, log = tmp_path / "run" / "sft", tmp_path / "log"
    stage.mkdir(parents=True, exist_ok=True)
    log.write_text("srun: error: n9: task 9: Killed\n")  # of an attempt before
    folder = tmp_path / "run" / "slurm" / "sft"
    values = {"stage": stage, "folder": folder, "log": log, "steps": steps, "retries": 0, "requeue": 0}
    lines = [f"molmo2_{name}='{value}'" for name, value in values.items()]
    (tmp_path / "said").write_text("".join(f"srun: error: {line}\n" for line in said_by_srun))
    (tmp_path / "left").write_text(outcome)
    body = f"cat {tmp_path}/said >> {log}; [ -s {tmp_path}/left ] && cp {tmp_path}/left ${ATTEMPT_DIR}/outcome; exit 1"
    environment = {**os.environ, "SLURM_JOB_ID": "7"}
    script = "\n".join(["set -evx", *lines]) + TRAP + "set +e\n" + body
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("outcome", "said_by_srun", "cause"),
    [
        (  # NCCL tells of it minutes later, and its watchdog aborts what waited
            "process 0 failed: DistBackendError: [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(...)",
            ["n1: task 0: Aborted", "n2: task 3: Killed"],
            "srun: error: n2: task 3: Killed perhaps memory ran out",
        ),
        (
            "process 1 failed: DistBackendError: NCCL error: remote process exited or there was a network error",
            ["n1: task 1: Exited with exit code 1", "n2: task 2: Segmentation fault"],
            "srun: error: n2: task 2: Segmentation fault",
        ),
        (
            "process 1 failed: RuntimeError: NCCL communicator was aborted on rank 1",
            ["n1: task 1: Exited with exit code 1", "n2: task 2: Aborted"],
            "srun: error: n2: task 2: Aborted",
        ),
        (  # nobody died: what the watchdog says is all there is
            "process 0 failed: DistBackendError: [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(...)",
            ["n1: task 0: Aborted"],
            "process 0 failed: DistBackendError: [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(...)",
        ),
        (
            "process 1 failed: store->get('0') got error: Socket Timeout",
            ["n1: task 1: Exited with exit code 1", "n2: task 2: Out Of Memory"],
            "srun: error: n2: task 2: Out Of Memory perhaps memory ran out",
        ),
        (  # srun kills the others when one fails: they are not the cause
            'process 1 failed: KeyError: "a\\b"\tc',
            ["n1: task 1: Exited with exit code 1", "n1: task 0: Killed"],
            'process 1 failed: KeyError: "a\\b" c',
        ),
        ("", ["n1: tasks 0-3: Killed"], "srun: error: n1: tasks 0-3: Killed perhaps memory ran out"),
    ],
)
def test_the_cause_of_a_failed_attempt_is_told_and_noted(tmp_path, outcome, said_by_srun, cause):
    write_config(compose(["recipe=tiny", "stage=sft", f"output_dir='{tmp_path}/run'"]))
    errors = tmp_path / "run" / "sft" / "errors.jsonl"
    errors.write_text('{"time": 1.0, "mess')  # of a task that was killed while it wrote
    code, said = end_of_attempt(tmp_path, f"failed\n{outcome}\n" if outcome else "", said_by_srun)
    assert code == 1 and "molmo2: giving up after 0 retries" in said
    (noted,) = read_stage(tmp_path / "run" / "sft", time.time()).errors
    assert noted["message"] == cause and noted["cause"] is True and noted["user_error"] is False
    assert abs(noted["time"] - time.time()) < 600


def test_a_mistake_is_noted_too_and_not_tried_again(tmp_path):
    write_config(compose(["recipe=tiny", "stage=sft", f"output_dir='{tmp_path}/run'"]))
    code, said = end_of_attempt(tmp_path, "user_error\n2 settings cannot work:\n  - one\n", [])
    assert code == USER_ERROR and "molmo2:   - one" in said
    (noted,) = read_stage(tmp_path / "run" / "sft", time.time()).errors
    assert noted["message"] == "2 settings cannot work:   - one" and noted["user_error"] is True


@pytest.mark.parametrize(("steps", "code"), [(20, 0), (21, 1)])
def test_a_job_ends_at_once_only_if_all_steps_are_done(tmp_path, steps, code):
    (tmp_path / "run" / "sft").mkdir(parents=True)
    summary = {"counts": {"steps": 99}, "stage": "sft", "steps": 20, "checkpoint": "checkpoints/step=20"}
    write_summary(tmp_path / "run" / "sft", summary)
    assert end_of_attempt(tmp_path, "failed\nx\n", [], steps)[0] == code


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("mounts=[/data]", "is not FROM:TO"),
        ("env={a-b: x}", "not a valid name"),
        ("command=/opt/nemo_run/bin/molmo2", "NeMo-Run replaces '/nemo_run'"),
        ("grase=5", "did you mean 'cluster.slurm.grace'?"),
        ("time=5", "cluster.slurm.time is 5; expected text"),
        ("ssh.host=login", "must be absolute paths"),
    ],
)
def test_what_cannot_be_written_into_a_script_is_named(tmp_path, setting, expected):
    with pytest.raises(UserError) as error:
        cfg = compose(["recipe=tiny", "cluster=slurm", "output_dir=run", f"cluster.slurm.{setting}"])
        cfg.cluster.slurm.container = "image" if "mounts" in setting else None
        with login_of([cfg]) as login:
            script(stage_job(cfg), login)
    assert expected in str(error.value)


def test_no_slurm_here_is_one_line(shards, tmp_path, monkeypatch, capsys):
    (tmp_path / "bin").mkdir()
    for program in ("env", "mkdir", "mv", "bash", "sh"):  # a machine without Slurm
        (tmp_path / "bin" / program).symlink_to(shutil.which(program))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    data = f"data.sources.demo.path={shards}/sft"
    settings = ["recipe=tiny", "stage=sft", "parallel=single", "cluster=slurm", "cluster.nodes=1", "cluster.devices=1"]
    call = ["train", *settings, data, f"output_dir={tmp_path}/run"]
    assert main([*call, "--dry-run"]) == 0
    said = capsys.readouterr()
    start = "sft starts from random weights: init_from is not set; init_from=CHECKPOINT, in a pipeline sft:init_from"
    assert said.out.count("#!/bin/bash") == 1
    assert said.err.startswith(start) and said.err.count("\n") == 1, "nothing is missing"
    assert main([*call, "init_from=/absent", "--dry-run"]) == 0
    assert capsys.readouterr().err.startswith("before submitting sft: init_from=/absent: no such checkpoint")
    assert main([*call, "init_from=/absent"]) == 2
    assert "no such checkpoint" in capsys.readouterr().err
    assert main(call) == 2
    error = capsys.readouterr().err
    assert error.startswith("molmo2: error: this machine has no sbatch") and error.count("\n") == 1


def test_a_dry_run_shows_the_scripts_and_then_what_is_missing(tmp_path, monkeypatch, capsys):
    """The README's step on a laptop that has neither the shards nor the weights."""
    monkeypatch.chdir(tmp_path)
    for name in ("MOLMO2_TOKENIZER", "MOLMO2_DATA"):
        monkeypatch.delenv(name, raising=False)
    assert main(["pipeline", "recipe=8b", "cluster=slurm", "pretrain:init_from=checkpoints/8b-start", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert said.out.count("#!/bin/bash") == 3 and all(f"stage {n} of 3" in said.out for n in (1, 2, 3))
    lines = said.err.splitlines()
    assert all(line.startswith("before submitting ") for line in lines) and len(lines) == 4
    assert sum("data sets have no shards" in line for line in lines) == 2
    assert "before submitting pretrain: init_from=checkpoints/8b-start: no such checkpoint folder" in said.err
    assert "before submitting pretrain, sft, long: data.tokenizer=" in said.err
    assert list(tmp_path.iterdir()) == [], "something was written"


def test_a_dry_run_says_that_the_first_stage_starts_from_random_weights(tmp_path, capsys):
    """Of the first alone, as long as it is not known to resume."""
    call = ["pipeline", "recipe=omnilong", f"output_dir={tmp_path}", f"cluster.slurm.workdir={tmp_path}", "--dry-run"]
    assert main(call) == 0
    assert capsys.readouterr().err.count("extend starts from random weights: init_from") == 1
    (tmp_path / "extend" / "checkpoints" / "step=1").mkdir(parents=True)
    assert main(call) == 0
    assert "random weights" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("parallel.tensor=3", "does not divide the 4 query heads"),
        ("stage.optim.llm.lr=-1", "must be at least 0"),
        ("stage.max_step=3", "did you mean 'stage.max_steps'?"),
        ("data.sources.mine.rate=1", "data.sources.mine.path is not set"),
    ],
)
def test_a_dry_run_refuses_settings_that_cannot_work(setting, expected, capsys):
    assert main(["train", "recipe=tiny", "stage=sft", "cluster=slurm", setting, "--dry-run"]) == 2
    said = capsys.readouterr()
    assert expected in said.err and said.out == ""


def test_stages_of_one_pipeline_go_to_one_cluster(tmp_path):
    configs = compose_stages(["recipe=tiny", f"output_dir='{tmp_path}'", "sft:cluster=slurm"])
    with pytest.raises(UserError, match="all stages of a pipeline go to one cluster"), login_of(configs):
        pass


def test_jobs_are_read_back_and_a_damaged_file_is_named(tmp_path):
    job = {"id": "7", "name": "run.sft", "after": None, "submitted": 1.0, "log": "x_%j"}
    (tmp_path / "jobs.json").write_text(json.dumps({"sft": job}))
    assert read_jobs(tmp_path) == {"sft": Job("7", "run.sft", None, 1.0, "x_%j")}
    (tmp_path / "jobs.json").write_text('{"sft": {"id": 7')
    with pytest.raises(UserError, match="jobs.json is damaged"):
        read_jobs(tmp_path)
    assert read_jobs(Path(tmp_path / "absent")) == {}


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "CONFIGURING", "SUSPENDED", "REQUEUED"])
def test_which_states_are_alive(state):
    assert (
        waits_or_runs(state)
        and not waits_or_runs("CANCELLED by 0")
        and not waits_or_runs("")
        and not waits_or_runs("TIMEOUT")
    )


def test_status_names_jobs_of_stages_that_have_not_begun(tmp_path, capsys):
    jobs = {
        name: {"id": id_, "name": name, "after": None, "submitted": 1.0, "log": f"/x/{name}_%j"} for name, id_ in IDS
    }
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.json").write_text(json.dumps(jobs))
    assert main(["status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()[1:4]] == [[name, "waiting"] for name, _ in IDS]
    assert "sft: Slurm job 42, log /x/sft_42" in out


def test_torn_and_foreign_verdicts_hide_nothing(tmp_path):
    folder = tmp_path / "slurm" / "sft"
    texts = ("12.5\nfailed\nthe cause\n", "", "12.5\n", "soon\nfailed\nx", "12.5\npreempted\nx\n", "\x00\x01")
    for number, text in enumerate(texts):
        (folder / f"attempt-7-{number}").mkdir(parents=True)
        (folder / f"attempt-7-{number}" / "verdict").write_text(text)
    (folder / "attempt-8-0" / "verdict").mkdir(parents=True)
    assert read_verdicts(tmp_path / "sft") == [
        {"time": 12.5, "message": "the cause", "user_error": False, "cause": True}
    ]
