"""A run that is killed and started again ends as if nothing had happened, bit by bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = 14


@pytest.fixture(scope="module")
def data(both_cores, tmp_path_factory):
    from data_prep.demo import build_demo

    folder = tmp_path_factory.mktemp("data")
    build_demo(folder)
    return folder


def command(data: Path, out: Path, *settings: str) -> list[str]:
    """The user's own command; dropout on, so that random states matter too."""
    return [
        *(sys.executable, "-m", "molmo2_nemo.cli.main", "train", "recipe=tiny", "stage=sft"),
        *(f"data.sources.demo.path={data}/sft", f"output_dir={out}", f"stage.max_steps={STEPS}", "save_every=5"),
        *("stage.residual_dropout=0.1", "stage.global_batch_size=2", "stage.micro_batch_size=1", *settings),
    ]


def run_until(command: list[str], metrics: Path, step: int) -> int:
    """Start the command in a session of its own and SIGKILL all of it once `step` has been written."""
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            break
        time.sleep(0.01)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert alive, f"the run ended with {process.returncode} before it could be killed"
    return process.returncode


def finish(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def losses(folder: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (folder / "sft" / "metrics.jsonl").read_text().splitlines()]
    return [(m["step"], m["loss"], m["grad_norm_vit"], m["grad_norm_connector"], m["grad_norm_llm"]) for m in lines]


def test_killed_run_ends_like_an_unbroken_one(data, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    setting = "parallel=dp2"
    finish(command(data, whole, setting))
    run_until(command(data, broken, setting), broken / "sft" / "metrics.jsonl", 7)  # checkpoint at 5, next at 10
    assert not (broken / "sft" / "summary.json").exists()
    assert 7 <= losses(broken)[-1][0] < 10
    finish(command(data, broken, setting))
    assert [step for step, *_ in losses(whole)] == list(range(1, STEPS + 1))
    assert losses(broken) == losses(whole)


def test_unfinished_checkpoint_is_passed_by(tmp_path):
    """NeMo's mark of an unfinished checkpoint, as a kill during saving leaves it."""
    from molmo2_nemo.nemo.checkpoints import latest_checkpoint

    for name in ("step=2-last", "step=5-last", "step=11-last"):
        (tmp_path / name / "weights").mkdir(parents=True)
    (tmp_path / "step=11-last-unfinished").touch()
    assert latest_checkpoint(tmp_path) == tmp_path / "step=5-last"
    (tmp_path / "step=5-last-unfinished").touch()
    (tmp_path / "step=2-last-unfinished").touch()
    assert latest_checkpoint(tmp_path) is None


def test_killed_between_the_last_checkpoint_and_the_summary(data, tmp_path):
    """Nothing is left to train; the same command only writes down what was done."""
    short = command(data, tmp_path, "parallel=single", "stage.max_steps=2")
    finish(short)
    summary = tmp_path / "sft" / "summary.json"
    written = json.loads(summary.read_text())
    summary.unlink()
    finish(short)
    assert json.loads(summary.read_text()) == written
    assert [step for step, *_ in losses(tmp_path)] == [1, 2]
