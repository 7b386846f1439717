"""What a running trainer survives: bad steps, signals, damaged checkpoints, a full disk. Two replicas, few runs."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from molmo2_nemo.data.config import SourceConfig
from molmo2_nemo.rundir import checkpoint_manifest
from tests.support.packs import demo_data, demo_packs, tiny_run, train_on_packs

TRACED = ("step", "loss", "grad_norm_vit", "grad_norm_connector", "grad_norm_llm", "lr_llm", "tasks", "tokens")
EACH = 4  # packs of a step
BAD = (3, 7, 8)  # steps with a pack that no step can be taken with


def live(cfg: Any, packs: list, send: int | None = None, largest_file: int | None = None) -> tuple[str, str]:
    """Train, and say how it ended: (name of the error or "", its text).

    Args:
        send: rank 1 gets SIGUSR1 once this step is in metrics.jsonl.
        largest_file: bytes beyond which every write fails, as on a full disk.
    """
    if send is not None and os.environ["RANK"] == "1":
        threading.Thread(target=send_signal, args=(Path(cfg.output_dir) / "sft" / "metrics.jsonl", send)).start()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
        train_on_packs(cfg, packs)
    except Exception as error:  # noqa: BLE001 - what it is is what the tests ask
        return type(error).__name__, str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return "", ""


def send_signal(metrics: Path, step: int) -> None:
    wait_for(metrics, step)
    os.kill(os.getpid(), signal.SIGUSR1)


def wait_for(metrics: Path, step: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        time.sleep(0.005)


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(text) for text in (folder / "sft" / name).read_text().splitlines()]


def traced(folder: Path) -> list[tuple]:
    return [tuple(repr(line.get(name)) for name in TRACED) for line in lines(folder)]


def saved(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "sft" / "checkpoints").iterdir())


def settings(folder: Path, steps: int) -> Any:
    cfg = tiny_run(folder, steps, data=2)
    cfg.data.sources = {"demo": SourceConfig(path="fixed packs", group="mixed")}
    cfg.log.peak_tflops = 0.05
    return cfg


@pytest.fixture(scope="module")
def packs():
    """Real ones; in one pack of every bad step the loss weights are the largest that fp32 can hold."""
    good = demo_packs(20)
    found = [copy.copy(good[n % len(good)]) for n in range(8 * EACH)]
    for step in BAD:
        batch = found[(step - 1) * EACH + 1]  # read by rank 1
        batch.loss_weights = np.where(batch.loss_weights > 0, np.float32(3e38), np.float32(0))
        batch.keys = [[f"bad:{step}"]]
    return found


@pytest.fixture(scope="module")
def whole(workers, packs, tmp_path_factory):
    """Six steps in one go, checkpoints written beside training; every fourth is kept, and the last."""
    folder = tmp_path_factory.mktemp("whole")
    cfg = settings_of_whole(folder)
    assert workers.run(live, cfg, packs, ranks=2, fit=True) == [("", "")] * 2
    return folder, cfg, traced(folder)


def settings_of_whole(folder: Path) -> Any:
    cfg = settings(folder, 6)
    cfg.save_every = 2
    cfg.checkpoint.async_save, cfg.checkpoint.keep_last, cfg.checkpoint.keep_every = True, 1, 4
    return cfg


def test_a_step_that_cannot_be_taken_is_skipped(workers, packs, whole, tmp_path):
    """Oracle: the same run that never sees the bad step's packs. Its third step starts from the same weights as the
    fourth of this one, if the bad step left them alone."""
    folder, _, _ = whole
    third, fourth = lines(folder)[2:4]
    assert third["loss"] is None and third["fault"] == "loss is not finite" and third["skipped_steps"] == 1
    assert [line["skipped_steps"] for line in lines(folder)] == [0, 0, 1, 1, 1, 1]
    (fault,) = lines(folder, "faults.jsonl")
    assert fault["step"] == 3 and "bad:3" in fault["records"] and len(fault["records"]) > 4
    without = packs[: 2 * EACH] + packs[3 * EACH :]
    assert workers.run(live, settings(tmp_path, 3), without, ranks=2, fit=True)[0] == ("", "")
    assert fourth["loss"] == lines(tmp_path)[2]["loss"]


def test_log(whole):
    for line in lines(whole[0]):
        assert 0 < line["fill"] <= 1 and 0 < line["crop_fill"] <= 1 and line["memory_gib"] > 0.1
        assert line["mfu"] == pytest.approx(line["tflops"] / 0.05) and 0 <= line["wait"] < line["seconds"]
        if line["loss"] is not None:  # one task: its loss is the loss
            assert line["tasks"] == {"mixed": pytest.approx(line["loss"], rel=1e-5)}


def test_which_checkpoints_stay(whole):
    assert saved(whole[0]) == ["step=4", "step=6"]
    assert all(
        checkpoint_manifest.damage(p, sums=True) == []
        for p in checkpoint_manifest.finished(whole[0] / "sft" / "checkpoints")
    )


@pytest.fixture(scope="module")
def stopped(workers, packs, whole, tmp_path_factory):
    """A signal to one rank; no checkpoint is due before the sixth step."""
    folder = tmp_path_factory.mktemp("stopped")
    cfg = settings(folder, 6)
    ended = workers.run(live, cfg, packs, 3, ranks=2, fit=True)
    steps = [line["step"] for line in lines(folder)]
    kept = saved(folder)
    assert workers.run(live, cfg, packs, ranks=2, fit=True) == [("", "")] * 2
    return folder, ended, steps, kept


def test_a_signal_to_one_rank_saves_and_stops_all(stopped):
    _, ended, steps, kept = stopped
    assert [name for name, _ in ended] == ["Preempted"] * 2
    assert all(f"SIGUSR1: step {steps[-1]} is saved" in text for _, text in ended)
    assert steps == list(range(1, len(steps) + 1)) and 3 <= len(steps) < 6
    assert kept == [f"step={steps[-1]}"]


def test_after_a_signal_the_run_ends_as_if_there_had_been_none(stopped, whole):
    """Also: figures do not depend on how checkpoints are written."""
    assert traced(stopped[0]) == whole[2]


def test_three_resumes_in_a_row(workers, packs, whole, tmp_path):
    """Stopped in steps 1, 3 (which is skipped) and 5, each time wherever the signal is noticed, then to the end."""
    ended = []
    for step in (1, 3, 5, None):
        ended += workers.run(live, settings(tmp_path, 6), packs, step, ranks=2, fit=True)
    stops = [name for name, _ in ended]
    assert stops[-2:] == ["", ""] and stops.count("Preempted") >= 4 and set(stops) <= {"Preempted", ""}
    assert traced(tmp_path) == whole[2]


def test_too_many_skipped_steps_end_the_run(workers, packs, stopped, tmp_path):
    """Counts outlive a resume: one step was skipped before it. It ends as a mistake does, as the same packs would come
    again; with the limit raised it goes on past them, and what happened twice is listed once."""
    folder = shutil.copytree(stopped[0], tmp_path / "run")
    cfg = settings(folder, 8)
    cfg.faults.max_in_a_row = 1
    ended = workers.run(live, cfg, packs, ranks=2, fit=True)
    assert [name for name, _ in ended] == ["UserError"] * 2
    assert "step 8: loss is not finite. 2 steps in a row were skipped, 3 in all" in ended[0][1]
    assert "resume with a higher faults.max_in_a_row" in ended[0][1]
    cfg.faults.max_in_a_row = 2
    assert workers.run(live, cfg, packs, ranks=2, fit=True) == [("", "")] * 2
    assert [line["step"] for line in lines(folder, "faults.jsonl")] == [3, 7, 8]


def test_damaged_checkpoint_and_full_disk(workers, packs, whole, tmp_path):
    """One changed byte: back to the checkpoint before, which an asynchronous save wrote, and on to the same figures.
    Then no room for the next one: it does not count, and the one before is still good."""
    folder, before = shutil.copytree(whole[0], tmp_path / "run"), whole[2]
    cfg = settings_of_whole(folder)
    newest = folder / "sft" / "checkpoints" / "step=6"
    victim = max((newest / "weights").glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert checkpoint_manifest.damage(newest) == [] and checkpoint_manifest.damage(newest, sums=True) != []
    assert workers.run(live, cfg, packs, ranks=2, fit=True) == [("", "")] * 2
    assert traced(folder) == before
    assert saved(folder) == ["damaged-step=6", "step=4", "step=6"]

    cfg.stage.max_steps = 7
    ended = workers.run(live, cfg, packs, None, 100_000, ranks=2, fit=True)
    assert "UserError" in [name for name, _ in ended]
    text = next(text for name, text in ended if name == "UserError")
    assert "could not be written" in text and "GiB left" in text and "step=6 is whole" in text
    found = checkpoint_manifest.finished(folder / "sft" / "checkpoints")
    assert [p.name for p in found] == ["step=6", "step=4"] and checkpoint_manifest.damage(found[0], sums=True) == []


def thrice(cfg: Any) -> tuple[str, str, str]:
    """A run on real shards: ended by a SIGTERM to all its processes after the first step, ended by itself, and called
    again after a kill just before its summary was written."""
    from molmo2_nemo.errors import Preempted
    from molmo2_nemo.nemo.train import train
    from tests.support.pool import reset

    def end_all() -> None:
        wait_for(Path(cfg.output_dir) / "sft" / "metrics.jsonl", 1)
        for process in [*multiprocessing.active_children(), multiprocessing.current_process()]:
            os.kill(process.pid, signal.SIGTERM)

    threading.Thread(target=end_all).start()
    try:
        train(cfg)
        stopped = ""
    except Preempted as stop:
        stopped = str(stop)
    reset()
    summary = Path(cfg.output_dir) / "sft" / "summary.json"
    train(cfg)
    first = summary.read_text()
    summary.unlink()
    reset()
    train(cfg)
    return stopped, first, summary.read_text()


def test_sigterm_to_all_processes_and_a_kill_before_the_summary(workers, shards, tmp_path):
    """A process that decodes outlives the signal until its trainer has saved. The last call has nothing left to train
    and only writes down what was done."""
    cfg = tiny_run(tmp_path, 4)
    cfg.data = demo_data(shards)
    cfg.data.num_workers, cfg.log.tensorboard = 1, False
    before = set(Path.cwd().iterdir())
    stopped, first, again = workers.run(thrice, cfg, fit=True)[0]
    assert stopped.startswith("SIGTERM: step ")
    assert first == again and json.loads(first)["counts"]["examples"] > 4
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert not (tmp_path / "sft" / "tb").exists() and set(Path.cwd().iterdir()) - before <= {Path.cwd() / "__pycache__"}
