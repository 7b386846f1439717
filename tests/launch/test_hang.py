"""`molmo2 train` of the tiny model on two data-parallel processes, of which one does not come: the run ends by itself,
leaves what is needed to find out why, and `molmo2 status` names the rank.

Nothing in the product is made for this. One rank's functions are replaced by ones that sleep or leave something out;
the process that reads for a rank is stopped from outside. All three runs go on at once: most of their time is waiting.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from molmo2_nemo.cli.main import main
from tests.support.warm import Warm

LIMIT = 30  # faults.hang_seconds; four times as long may take the start
PATIENCE = 900.0  # seconds until what is waited for must have come
SLOW = 0.5  # seconds that the slow rank takes longer for a micro-batch
LEFT_OUT = 3  # the step in which a collective is left out
NOW = "now"  # file that tells the slow rank to stay


def sleeps(rank: int, folder: Path) -> None:
    """Rank 1 takes longer for every micro-batch, and at last for ever."""
    from molmo2_nemo.training.whereabouts import Whereabouts

    computes = Whereabouts.computes

    def slowly(self: Whereabouts, records: Any) -> None:
        computes(self, records)
        time.sleep(SLOW)
        while (folder / NOW).exists():
            time.sleep(SLOW)

    if rank == 1:
        Whereabouts.computes = slowly  # type: ignore[method-assign]


def leaves_one_out(rank: int, folder: Path) -> None:
    """Rank 1 does not add up its weights in one step."""
    import torch.distributed as dist

    from molmo2_nemo.training.whereabouts import here

    all_reduce = dist.all_reduce

    def most(*args: Any, **options: Any) -> Any:
        if here.step == LEFT_OUT and sys._getframe(1).f_code.co_name == "scale":
            return None
        return all_reduce(*args, **options)

    if rank == 1:
        dist.all_reduce = most


def stays(rank: int, folder: Path) -> None:
    """Rank 1 computes one step for ever."""
    from molmo2_nemo.training.whereabouts import Whereabouts

    computes = Whereabouts.computes

    def for_ever(self: Whereabouts, records: Any) -> None:
        computes(self, records)
        while self.step == LEFT_OUT:
            time.sleep(SLOW)

    if rank == 1:
        Whereabouts.computes = for_ever  # type: ignore[method-assign]


def nothing(rank: int, folder: Path) -> None:
    pass


def words(folder: Path, shards: Path, *more: str) -> list[str]:
    small = ["parallel=dp2", "stage.global_batch_size=2", "stage.micro_batch_size=1", "stage.max_steps=100000"]
    place = [f"data.sources.demo.path={shards}/pretrain", f"output_dir={folder}", f"faults.hang_seconds={LIMIT}"]
    return ["train", "recipe=tiny", "stage=pretrain", *small, *place, *more]


def until(met: Callable[[], Any], explain: Callable[[], str]) -> Any:
    """The first true value of `met()`."""
    end = time.monotonic() + PATIENCE
    while not (value := met()):
        assert time.monotonic() < end, explain()
        time.sleep(0.5)
    return value


def status(folder: Path, *more: str) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert main(["status", str(folder), *more]) == 0
    return shown.getvalue()


def steps(folder: Path) -> int:
    path = folder / "pretrain" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def children(pid: int) -> list[int]:
    """Processes that a process of this machine has started and that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


def rank_1(folder: Path) -> int:
    """Its process id, as it has written it down."""
    (place,) = (folder / "pretrain" / "hang").glob("*/rank00001.json")
    return int(json.loads(place.read_text())["pid"])


@pytest.fixture(scope="module")
def ended(molmo2, shards, tmp_path_factory) -> Iterator[dict[str, Any]]:
    """Exit codes, folder, output and `molmo2 status` by the name of what went wrong."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("reading", "sleeping", "leaving_out")}
    reading, sleeping, leaving_out = folders.values()
    warm, stopped = Warm(), []
    command = [*molmo2, *words(reading, shards, "data.num_workers=1")]
    with (reading / "rank1.log").open("w") as log:
        launcher = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        slow = warm.start(words(sleeping, shards), sleeping, sleeps)
        skipping = warm.start(words(leaving_out, shards), leaving_out, leaves_one_out)

        def said() -> str:
            return "\n".join(f"--- {p}\n{p.read_text()[-2000:]}" for f in folders.values() for p in f.glob("*.log"))

        until(lambda: launcher.poll() is not None or steps(reading), said)
        assert launcher.poll() is None, said()
        stopped = until(lambda: children(rank_1(reading)), said)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        until(lambda: steps(sleeping), said)
        named = until(lambda: "is slower than the rest" in (now := status(sleeping)) and now, said)
        os.kill(rank_1(sleeping), signal.SIGSTOP)
        still = until(lambda: "the run stands still" in (now := status(sleeping)) and now, said)
        os.kill(rank_1(sleeping), signal.SIGCONT)
        (sleeping / NOW).touch()
        until(lambda: launcher.poll() is not None, said)
        codes = {"reading": [launcher.returncode], "sleeping": warm.wait(slow), "leaving_out": warm.wait(skipping)}
        yield {
            name: {"codes": codes[name], "folder": folder, "status": status(folder), "log": said()}
            for name, folder in folders.items()
        } | {"slow": named, "still": still}
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # stopped, it cannot see that its trainer is gone
        if launcher.poll() is None:
            launcher.kill()  # which ends its workers
        launcher.wait()
        warm.close()


HOST = socket.gethostname()
CASES = (
    ("reading", "did not come: it is at step", "waiting for data ("),
    ("sleeping", "did not come: it is at step", "computing micro-batch 1 (launch/test_hang.py:"),
    ("leaving_out", f"left out a collective that the others are in: it is at step {LEFT_OUT},", "exchanging gradients"),
)


@pytest.mark.parametrize(("name", "how", "where"), CASES)
def test_the_run_ends_and_the_rank_is_named(ended, name, how, where):
    found = ended[name]
    assert set(found["codes"]) == {1}, found["log"]
    line = next(line for line in found["status"].splitlines() if line.startswith("pretrain: error: "))
    start = f"pretrain: error: no progress for {LIMIT} s (faults.hang_seconds={LIMIT}): rank 1 (host {HOST}) {how}"
    assert line.startswith(start) and where in line and "The others: rank 0 at step" in line
    assert line.removeprefix("pretrain: error: ") in (found["folder"] / "rank1.log").read_text()


@pytest.mark.parametrize("name", [name for name, _, _ in CASES])
def test_every_rank_leaves_its_stacks_and_its_records(ended, name):
    (place,) = (ended[name]["folder"] / "pretrain" / "hang").iterdir()
    for rank in range(2):
        head, _, stacks = (place / f"rank{rank:05}.txt").read_text().partition("\n\n")
        assert head.startswith(f"rank {rank} (host {HOST}), process ") and ": step " in head.splitlines()[0]
        assert "\nrecords of its micro-batch:\n  pretrain-0" in head
        assert "Thread 0x" in stacks and "nemo/train.py" in stacks


def test_status_names_the_stopped_rank_while_the_run_stands_still(ended):
    (line,) = [line for line in ended["still"].splitlines() if "the run stands still" in line]
    assert line.startswith(f"pretrain: the run stands still: rank 1 (host {HOST}, process ") and "kill -CONT" in line
    assert json.loads(status(ended["sleeping"]["folder"], "--json").splitlines()[0])["standstill"] is None, "it ended"


def test_status_names_the_slow_rank_while_the_run_goes_on(ended):
    (line,) = [line for line in ended["slow"].splitlines() if "is slower than the rest" in line]
    assert line.startswith(f"pretrain: rank 1 (host {HOST}) is slower than the rest: it computes ")
    found = json.loads(status(ended["sleeping"]["folder"], "--json").splitlines()[0])
    assert found["straggler"].startswith(f"rank 1 (host {HOST})") and found["error"].startswith("no progress for")


@pytest.mark.thorough
@pytest.mark.trainer
@pytest.mark.parametrize(
    ("layout", "before", "how"),
    [
        ("tensor", leaves_one_out, "left out a collective that the others are in"),
        ("context", stays, "did not come"),
        ("pipeline", stays, "did not come"),
    ],
)
def test_four_ranks_name_it_too_and_the_same_command_resumes_to_the_same_losses(shards, tmp_path, layout, before, how):
    """Two replicas of two ranks each: those of rank 1 are ranks 0 and 1, of pipeline stages ranks 1 and 3."""
    warm = Warm()
    try:

        def trained(name: str, before: Callable[[int, Path], None]) -> tuple[set[int], list[float], str]:
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            more = [f"parallel.{layout}=2", f"stage.max_steps={LEFT_OUT + 1}", f"save_every={LEFT_OUT - 1}"]
            codes = set(warm.wait(warm.start(words(folder, shards, *more), folder, before, ranks=4)))
            lines = (folder / "pretrain" / "metrics.jsonl").read_text().splitlines()
            return codes, [json.loads(line)["loss"] for line in lines], status(folder)

        codes, losses, said = trained("hung", before)
        assert codes == {1} and len(losses) == LEFT_OUT - 1
        assert f"(faults.hang_seconds={LIMIT}): rank 1 (host {HOST}) {how}: it is at step {LEFT_OUT}, " in said
        again, clean = trained("hung", nothing), trained("untouched", nothing)
        assert again[0] == clean[0] == {0} and again[1] == clean[1] and len(clean[1]) == LEFT_OUT + 1
    finally:
        warm.close()
