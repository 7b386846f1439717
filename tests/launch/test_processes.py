"""Local runs whose processes die or are told to leave: real ones, and what their files say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from molmo2_nemo.errors import INTERRUPTED, PREEMPTED, UserError
from molmo2_nemo.launch import local, reports
from molmo2_nemo.launch.reports import ATTEMPT_DIR
from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.rundir.lock import only_run
from molmo2_nemo.rundir.paths import stage_dir
from molmo2_nemo.rundir.progress import read_run
from molmo2_nemo.settings.run import RunConfig

LOST = "RuntimeError: connection reset by peer"


def report(folder: Path, rank: int, message: str) -> None:
    values = {"rank": rank, "time": 10.0, "message": message, "traceback": "tb\n", "user_error": False}
    (folder / f"rank{rank}.json").write_text(json.dumps(values))


def worker_of(run: Path, rank: int) -> int | None:
    """Process id of a run's worker."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
            variables = (folder / "environ").read_text().split("\0")
        except OSError:
            continue
        if "molmo2_nemo.launch.worker" in words and str(run) in " ".join(words) and f"RANK={rank}" in variables:
            return int(folder.name)
    return None


def start(molmo2: list[str], folder: Path, shards: Path) -> subprocess.Popen[str]:
    """The user's command: two replicas, far more steps than it will get to."""
    settings = ["recipe=tiny", "stage=pretrain", f"data.sources.demo.path={shards}/pretrain", f"output_dir={folder}"]
    small = ["stage.max_steps=900", "stage.global_batch_size=2", "stage.micro_batch_size=1"]
    command = [*molmo2, "train", *settings, *small]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait(run: subprocess.Popen[str], met: Callable[[], Any]) -> Any:
    """The first true value of `met()`, while the run is there."""
    deadline = time.monotonic() + 300
    while not (value := met()):
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.05)
    return value


def test_a_signal_to_the_command_reaches_the_processes_and_its_code_says_so(molmo2, shards, tmp_path):
    run = start(molmo2, tmp_path, shards)
    metrics = tmp_path / "pretrain" / "metrics.jsonl"
    wait(run, lambda: metrics.is_file() and '"step": 2,' in metrics.read_text())
    run.send_signal(signal.SIGUSR1)
    out, err = run.communicate(timeout=300)
    assert run.returncode == PREEMPTED, err
    assert "stopped by a signal; the same command resumes from the last checkpoint" in out
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert [p.name for p in (tmp_path / "pretrain" / "checkpoints").iterdir()] == [f"step={last}"]


@pytest.mark.thorough
def test_a_signal_before_anything_is_saved_says_that_the_command_starts_over(molmo2, shards, tmp_path):
    run = start(molmo2, tmp_path, shards)
    for rank in (0, 1):
        worker = wait(run, lambda rank=rank: worker_of(tmp_path, rank))
        wait(run, lambda worker=worker: "libtorch" in Path(f"/proc/{worker}/maps").read_text())  # past its first lines
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=300)
    assert run.returncode == PREEMPTED, err
    assert f"stopped by a signal; {tmp_path / 'pretrain'} has no checkpoint yet, so the same command starts over" in out
    assert not (tmp_path / "pretrain" / "checkpoints").exists()


def test_how_to_resume_is_said_by_what_is_saved(tmp_path, capsys):
    checkpoint = tmp_path / "checkpoints" / "step=2"
    for code, how in ((PREEMPTED, "stopped by a signal"), (INTERRUPTED, "interrupted")):
        reports.show_how_to_resume(code, tmp_path)
        assert capsys.readouterr().out == f"{how}; {tmp_path} has no checkpoint yet, so the same command starts over\n"
    checkpoint.mkdir(parents=True)
    (checkpoint / "part").write_text("weights")
    reports.show_how_to_resume(PREEMPTED, tmp_path)
    assert "starts over" in capsys.readouterr().out, "it was not written to its end"
    checkpoint_manifest.write(checkpoint, checkpoint_manifest.describe(checkpoint, [checkpoint / "part"]))
    reports.show_how_to_resume(PREEMPTED, tmp_path)
    assert (
        capsys.readouterr().out
        == f"stopped by a signal; the same command resumes from the last checkpoint in {tmp_path}\n"
    )
    reports.show_how_to_resume(1, tmp_path)
    assert capsys.readouterr().out == ""


WORKER = """
import os, signal, sys
from molmo2_nemo.launch.reports import report_finished
def leave(*_):
    report_finished()
    os._exit(0)
signal.signal(signal.SIGTERM, leave)
open(f"{sys.argv[1]}/ready{os.environ['RANK']}", "w")
while True:
    signal.pause()
"""


def test_a_signal_that_cuts_nothing_short_ends_with_0(tmp_path, monkeypatch):
    """torch's elastic launcher only says that a signal came; what the processes did is in what they wrote down."""
    (tmp_path / "stand_in.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}:{Path.cwd()}")
    monkeypatch.setenv(reports.ERROR_DIR, str(tmp_path))

    def send() -> None:
        deadline = time.monotonic() + 300
        while len(list(tmp_path.glob("ready*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    command = [sys.executable, "-m", local.ELASTIC, "2", "stand_in", str(tmp_path)]
    code = local.run_child(command, dict(os.environ))
    sender.join()
    assert code == PREEMPTED and reports.after_signal(tmp_path, code) == 0


def test_what_came_of_a_run_that_was_sent_a_signal(tmp_path, monkeypatch):
    """By what its processes wrote down."""
    assert reports.after_signal(tmp_path, 1) == 1
    assert reports.after_signal(tmp_path, PREEMPTED) == PREEMPTED, "they ended before they could write anything"
    monkeypatch.setenv(reports.ERROR_DIR, str(tmp_path))
    reports.report_finished()
    assert reports.after_signal(tmp_path, PREEMPTED) == 0
    report(tmp_path, 1, "OSError: no room")
    assert reports.after_signal(tmp_path, PREEMPTED) == 1, "one failed as it left"
    reports.report_preempted("SIGTERM: step 3 is saved")
    assert reports.after_signal(tmp_path, PREEMPTED) == PREEMPTED


def test_a_killed_launcher_leaves_no_process_behind(molmo2, shards, tmp_path):
    run = start(molmo2, tmp_path, shards)
    worker = wait(run, lambda: worker_of(tmp_path, 1))
    wait(run, lambda: "libtorch" in Path(f"/proc/{worker}/maps").read_text())  # past its first lines
    run.kill()
    run.communicate()
    deadline = time.monotonic() + 60
    while worker_of(tmp_path, 0) or worker_of(tmp_path, 1):
        assert time.monotonic() < deadline, "ranks go on though nobody waits for them"
        time.sleep(0.05)


def test_a_killed_process_ends_the_run_and_is_named(molmo2, shards, tmp_path):
    run = start(molmo2, tmp_path, shards)
    worker = wait(run, lambda: worker_of(tmp_path, 1))
    metrics = tmp_path / "pretrain" / "metrics.jsonl"
    wait(run, lambda: metrics.is_file() and '"step": 1,' in metrics.read_text())
    os.kill(worker, signal.SIGKILL)
    error = run.communicate(timeout=120)[1]
    assert run.returncode == 128 + signal.SIGKILL
    told = "process 1 was ended by SIGKILL, as happens when memory runs out"
    assert error.splitlines()[-1].startswith(f"molmo2: error: {told}")
    (stage,) = read_run(tmp_path / "pretrain")
    assert stage.state == "failed" and stage.last_error["message"].startswith(told)


def test_who_was_killed_matters_more_than_who_lost_it(tmp_path, capsys):
    report(tmp_path, 0, LOST)
    failures = {"0": 1, "1": -signal.SIGSEGV, "2": -signal.SIGTERM}
    (tmp_path / "launcher.json").write_text(json.dumps({"rank": 0, "exit_code": 1, "failures": failures}))
    assert reports.explain_exit(tmp_path, 1) == 128 + signal.SIGSEGV
    assert "process 1 was ended by SIGSEGV" in capsys.readouterr().err


def test_ranks_that_the_launcher_ended_are_not_the_cause(tmp_path, capsys):
    report(tmp_path, 0, "ZeroDivisionError: the cause")
    failures = {"0": 1, "2": -signal.SIGTERM}
    (tmp_path / "launcher.json").write_text(json.dumps({"rank": 2, "exit_code": -15, "failures": failures}))
    assert reports.explain_exit(tmp_path, 1) == 1
    assert "the cause" in capsys.readouterr().err


def test_what_the_processes_could_not_say_is_noted(tmp_path):
    """A verdict that is all a report says is not said twice."""
    stage, errors = tmp_path / "sft", tmp_path / "errors"
    stage.mkdir(), errors.mkdir()
    assert (
        reports.explain_exit(errors, -signal.SIGKILL, stage) == 128 + signal.SIGKILL
    )  # one process, killed for memory
    report(errors, 0, "ZeroDivisionError: alone")
    reports.explain_exit(errors, 1, stage)
    report(errors, 1, LOST)
    reports.explain_exit(errors, 1, stage)
    noted = [json.loads(line) for line in (stage / "errors.jsonl").read_text().splitlines()]
    assert all(line["cause"] for line in noted)
    messages = [line["message"] for line in noted]
    killed = "process 0 was ended by SIGKILL, as happens when memory runs out. Run the same command again to "
    assert messages[0] == f"{killed}start over: there is no checkpoint yet"
    assert messages[1:] == ["process 0 failed: ZeroDivisionError: alone"]
    checkpoint = stage / "checkpoints" / "step=2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "part").write_text("weights")
    checkpoint_manifest.write(checkpoint, checkpoint_manifest.describe(checkpoint, [checkpoint / "part"]))
    (errors / "rank0.json").unlink(), (errors / "rank1.json").unlink()
    reports.explain_exit(errors, -signal.SIGKILL, stage)
    assert json.loads((stage / "errors.jsonl").read_text().splitlines()[-1])["message"] == f"{killed}resume"


def in_job(monkeypatch, tmp_path, ending) -> tuple[RunConfig, Path]:
    """As in a task of a job of ours; `ending` stands for the training."""
    attempt = tmp_path / "attempt-7-0"
    attempt.mkdir()
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", ATTEMPT_DIR: str(attempt)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(reports.ERROR_DIR, raising=False)
    monkeypatch.setattr(local.checks, "check", lambda *_, **__: None)
    monkeypatch.setattr("molmo2_nemo.launch.worker.run", ending)
    return RunConfig(output_dir=str(tmp_path / "run")), attempt


def test_a_preempted_task_of_a_job_leaves_with_0_and_says_so(monkeypatch, tmp_path):
    def ending(_):
        (Path(os.environ[reports.ERROR_DIR]) / "preempted").write_text("SIGUSR1: step 3 is saved")
        return PREEMPTED

    cfg, attempt = in_job(monkeypatch, tmp_path, ending)
    assert local.launch(cfg) == 0
    assert (attempt / "outcome").read_text() == "preempted\nSIGUSR1: step 3 is saved\n"


def test_the_first_task_to_end_says_how(monkeypatch, tmp_path, capsys):
    def ending(_):
        report(Path(os.environ[reports.ERROR_DIR]), 1, LOST)
        return 1

    cfg, attempt = in_job(monkeypatch, tmp_path, ending)
    (attempt / "outcome").write_text("user_error\nno such shard\n")
    assert local.launch(cfg) == 1
    assert (attempt / "outcome").read_text() == "user_error\nno such shard\n"
    assert [p.name for p in attempt.glob("*.part")] == []
    (attempt / "outcome").unlink()
    assert local.launch(cfg) == 1
    assert (attempt / "outcome").read_text() == f"failed\nprocess 1 failed: {LOST}\n"
    assert "connection reset" in capsys.readouterr().err


def test_a_job_waits_for_the_folder_and_is_tried_again(monkeypatch, tmp_path, capsys):
    """The lock of a node that died is lifted when its lease ends, so a folder that is taken is no mistake here."""
    cfg, attempt = in_job(monkeypatch, tmp_path, lambda _: 0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(local, "LOCK_WAIT", 0.2)
    monkeypatch.setattr("molmo2_nemo.rundir.lock.LOCK_POLL", 0.05)
    with only_run(stage_dir(cfg)):
        assert local.launch(cfg) == 1
    assert (attempt / "outcome").read_text().startswith("failed\nanother run is at work in")
    (attempt / "outcome").unlink()
    monkeypatch.setattr(local, "LOCK_WAIT", 60.0)
    held = only_run(stage_dir(cfg))
    held.__enter__()
    threading.Timer(0.2, held.__exit__, (None, None, None)).start()
    assert local.launch(cfg) == 0 and not (attempt / "outcome").exists()


def test_a_mistake_found_before_training_is_an_outcome_too(monkeypatch, tmp_path):
    cfg, attempt = in_job(monkeypatch, tmp_path, lambda _: 0)
    cfg.init_from = str(tmp_path / "absent")
    try:
        local.launch(cfg)
    except UserError as error:
        assert (attempt / "outcome").read_text() == f"user_error\n{error}\n"
    else:
        raise AssertionError("a missing checkpoint was not noticed")
