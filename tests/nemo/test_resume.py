"""A run that is killed and started again ends as if nothing had happened, bit by bit.

The killed run is the user's command, twice. The unbroken one it is held against runs in processes that have NeMo
imported, which saves the third start; it composes its settings from the same words.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from molmo2_nemo.settings.compose import compose

STEPS = 9


def train_words(data: Path, out: Path, *settings: str) -> list[str]:
    """What follows `molmo2 train`; dropout on, so that random states matter too."""
    return [
        *("recipe=tiny", "stage=sft"),
        *(f"data.sources.demo.path={data}/sft", f"output_dir={out}", f"stage.max_steps={STEPS}", "save_every=3"),
        *("stage.residual_dropout=0.1", "stage.global_batch_size=2", "stage.micro_batch_size=1", *settings),
    ]


def run_until(command: list[str], metrics: Path, step: int) -> str:
    """Start the command in a session of its own and SIGKILL all of it once `step` has been written; what it said on
    stderr."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=said)
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
        said.seek(0)
        return said.read()


def finish(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stderr


def losses(folder: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (folder / "sft" / "metrics.jsonl").read_text().splitlines()]
    return [(m["step"], m["loss"], m["grad_norm_vit"], m["grad_norm_connector"], m["grad_norm_llm"]) for m in lines]


def unbroken(words: list[str]) -> None:
    """Job: train as `molmo2 train WORDS` does."""
    from molmo2_nemo.nemo.train import train

    train(compose(words))


def test_killed_run_ends_like_an_unbroken_one(workers, molmo2, shards, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    setting = "parallel=dp2"
    workers.run(unbroken, train_words(shards, whole, setting), ranks=2, fit=True)
    # read one ahead: what the killed attempt had ready and not yet taken is read again
    command = [*molmo2, "train", *train_words(shards, broken, setting, "kernels.inputs=ahead")]
    began = run_until(command, broken / "sft" / "metrics.jsonl", 4)  # checkpoint at 3, next at 6
    assert began.count("sft starts from random weights: init_from is not set") == 1
    assert not (broken / "sft" / "summary.json").exists()
    assert 4 <= losses(broken)[-1][0] < 6
    assert "random weights" not in finish(command)
    assert [step for step, *_ in losses(whole)] == list(range(1, STEPS + 1))
    assert losses(broken) == losses(whole)
