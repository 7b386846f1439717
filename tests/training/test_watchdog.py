"""A run that hangs ends, all its processes, and says who did not come; one that is held up on purpose goes on.

Real processes over gloo, forked from the test: each is a plain loop that says where it is as training does.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from molmo2_nemo.training import watchdog
from molmo2_nemo.training.watchdog import Place, attempt_folder, who_did_not_come
from molmo2_nemo.training.whereabouts import Work, here

LIMIT = 3.0  # seconds
PATIENCE = 120.0  # until a process must be gone
ENOUGH = 5  # steps


def loop(folder: Path, rank: int, hang: Callable[[int, int, str], bool]) -> None:
    """Two ranks train: a micro-batch, an exchange of gradients and a line of the log each step.

    Args:
        hang: told rank, step and place; may keep a rank, and returns whether it leaves out what is there.
    """
    import torch
    import torch.distributed as dist

    from molmo2_nemo import cpu

    gc.freeze()
    cpu.enable(1)  # as a run does
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": "7"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    other = dist.new_group([0, 1])

    def report(message: str, stacks: str) -> None:
        (folder / "errors.jsonl").write_text(json.dumps({"rank": rank, "message": message, "stacks": stacks}) + "\n")

    value = torch.ones(2)
    with watchdog.reporting(report), watchdog.watching(LIMIT, folder):
        for step in range(1, ENOUGH + 1):
            here.begin(step)
            here.fetches()
            hang(rank, step, "loader")
            here.computes([f"shard-{rank}.tar:{step}"])
            hang(rank, step, "computing")
            here.at(Work.EXCHANGING)
            if not hang(rank, step, "exchange"):
                dist.all_reduce(value)
            here.at(Work.FINISHING)
            dist.all_reduce(value, group=other)
        (folder / f"done{rank}").touch()


def ended(*args: Any) -> None:
    """The same as a process, which ends at once: a failed one would wait for the other in gloo's own clean-up."""
    code = 3
    try:
        loop(*args)
        code = 0
    finally:
        os._exit(code)


def run(
    folder: Path, hang: Callable[[int, int, str], bool], meanwhile: Callable[[list[Any]], None] | None = None
) -> Any:
    """Exit codes of both ranks, and what was reported."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=ended, args=(folder, rank, hang), daemon=True) for rank in range(2)]
    gc.disable()
    for process in processes:
        process.start()
    gc.enable()
    try:
        if meanwhile is not None:
            meanwhile(processes)
        for process in processes:
            process.join(PATIENCE)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    path = folder / "errors.jsonl"
    return codes, json.loads(path.read_text()) if path.exists() else None


def sleeps(rank: int, step: int, place: str) -> bool:
    if (rank, step, place) == (1, 3, "computing"):
        time.sleep(10 * PATIENCE)
    return False


def waits_for_data(rank: int, step: int, place: str) -> bool:
    if (rank, step, place) == (0, 2, "loader"):
        multiprocessing.get_context("fork").SimpleQueue().get()
    return False


def leaves_one_out(rank: int, step: int, place: str) -> bool:
    return (rank, step, place) == (1, 4, "exchange")


CASES = (
    (sleeps, 1, "did not come: it is at step 3, computing micro-batch 1 (training/test_watchdog.py:", "sleeps)"),
    (waits_for_data, 0, "did not come: it is at step 2, waiting for data (multiprocessing/", ")"),
    (leaves_one_out, 1, "left out a collective that the others are in: it is at step 4, finishing the step (", "loop)"),
)


@pytest.mark.parametrize(("hang", "rank", "how", "where"), CASES)
def test_the_rank_that_did_not_come_is_named(tmp_path, hang, rank, how, where):
    codes, said = run(tmp_path, hang)
    assert codes == [1, 1] and said["rank"] == rank
    message = said["message"]
    assert message.startswith(f"no progress for {LIMIT:g} s (faults.hang_seconds={LIMIT:g}): rank {rank} (host ")
    assert f"{how}" in message and where in message and f"The others: rank {1 - rank} at step" in message
    (place,) = (tmp_path / "hang").iterdir()
    for each in range(2):
        text = (place / f"rank{each:05}.txt").read_text()
        assert "Thread 0x" in text and "in loop" in text and 'File "' in text
        assert f"records of its micro-batch:\n  shard-{each}.tar:" in text
    assert not list(tmp_path.glob("done*"))
    assert not list(place.glob("*.collectives.json")), "NCCL's recorder has nothing of gloo"


def test_a_run_without_a_hang_leaves_nothing(tmp_path):
    assert run(tmp_path, lambda rank, step, place: False) == ([0, 0], None)
    assert {path.name for path in tmp_path.iterdir()} - {"meet"} == {"done0", "done1"}


def held_up(rank: int, step: int, place: str) -> bool:
    """Rank 1 stops itself in step 2; in step 4 it is in a debugger, or so it looks: a loop in a file called pdb.py."""
    if (rank, place) == (1, "computing"):
        if step == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        if step == 4:
            exec(compile("import time\ntime.sleep(SECONDS)", "/usr/lib/pdb.py", "exec"), {"SECONDS": 3 * LIMIT})
    return False


def test_nobody_is_told_off_for_being_stopped_or_debugged(tmp_path):
    def wake(processes: list[Any]) -> None:
        stat = Path(f"/proc/{processes[1].pid}/stat")
        end = time.monotonic() + PATIENCE
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(3 * LIMIT)
        os.kill(processes[1].pid, signal.SIGCONT)

    assert run(tmp_path, held_up, wake) == ([0, 0], None)
    assert (tmp_path / "done0").exists() and not list(tmp_path.glob("hang/*/*.txt"))


def place(rank: int, order: list[int], words: str, **more: Any) -> Place:
    return Place(rank, "n", 1, 1, rank, words, order, **({"stuck": 9.0} | more))


def test_who_is_named():
    """Of many ranks; where collectives wait on the device, no stack shows them."""
    late, rest = (
        place(5, [7, 1, 3], "computing micro-batch 1"),
        [place(n, [7, 3, 0], "updating weights") for n in range(5)],
    )
    who, words = who_did_not_come([*rest, late], 6)
    assert who == [5] and words == (
        "rank 5 (host n, GPU 5) did not come: it is at computing micro-batch 1. The others: ranks 0, 1, 2, 3 ... at "
        "updating weights"
    )
    who, words = who_did_not_come(rest, 6)
    assert who == [5] and words.startswith("rank 5 did not come: it makes no sign.")
    who, words = who_did_not_come(rest, 5)
    assert who == [] and words == "all ranks do the same at updating weights; what do they wait for?"
    who, words = who_did_not_come([place(n, [7, 3, 0], "updating weights", waits=True) for n in range(5)], 5)
    assert who == [] and words.startswith("all ranks wait in collectives at updating weights; does the network work")
    who, words = who_did_not_come([*rest[:4], replace(rest[4], line="loss.py:9 item")], 5)
    assert who == [] and words == (
        "no rank is behind the others: ranks 0, 1, 2, 3 at updating weights; rank 4 at updating weights (loss.py:9 "
        "item); what do they wait for?"
    )


def in_collectives(*stacks: list[tuple[str, int]]) -> list[Place]:
    """Ranks in one part of the work, whose stacks part."""
    return [
        place(n, [7, 2, 0], "exchanging gradients", waits=True, stack=stack, line=f"{stack[-1][0]}:{stack[-1][1]}")
        for n, stack in enumerate(stacks)
    ]


def test_in_one_part_of_the_work_the_stacks_tell():
    """Where the calls part, the later line is ahead; at one line who has begun fewer collectives. Of many the few are
    named."""
    early = [("step.py step", 10), ("norms.py norms", 5), ("norms.py total", 90)]
    late = [("step.py step", 10), ("norms.py norms", 7), ("norms.py largest", 30)]
    who, words = who_did_not_come(in_collectives(early, late), 2)
    assert who == [1] and words == (
        "rank 1 (host n, GPU 1) left out a collective that the others are in: it is at exchanging gradients (norms.py "
        "largest:30). The others: rank 0 at exchanging gradients (norms.py total:90)"
    )
    who, words = who_did_not_come(in_collectives(late, late, early, late), 4)
    assert who == [2] and "rank 2 (host n, GPU 2) is in a collective that the others are past: " in words
    counted = [replace(each, collectives={"0": 9, "1": 4 + (each.rank != 2)}) for each in in_collectives(*4 * [late])]
    who, words = who_did_not_come(counted, 4)
    assert who == [2] and "rank 2 (host n, GPU 2) left out a collective that the others are in: " in words
    who, words = who_did_not_come(in_collectives(early, early, early), 3)
    assert who == [] and words.startswith("all ranks wait in collectives at exchanging gradients (norms.py total:90)")
    who, words = who_did_not_come(in_collectives(early, [("step.py step", 10), ("clip.py clip", 1)]), 2)
    assert who == [] and words.startswith("no rank is behind the others: ") and "(clip.py clip:1)" in words


def test_allowances():
    """Longer ones at the start, in the first step, and for work between steps."""
    here.reset()
    assert here.allowance == 4
    here.begin(41)
    assert here.allowance == 4
    here.begin(42)
    assert here.allowance == 1
    for work, factor in ((Work.SAVING, 4), (Work.VALIDATING, 4), (Work.EVALUATING, 10), (Work.EXCHANGING, 1)):
        here.at(work)
        assert here.allowance == factor
    here.reset()


def test_ranks_meet_in_one_folder():
    job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "RANK": "3", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    assert attempt_folder(Path("s"), job) == Path("s/hang/7-1-n1-29500")
    assert attempt_folder(Path("s"), {**job, "RANK": "4"}) == attempt_folder(Path("s"), job)
    assert attempt_folder(Path("s"), {}) == Path(f"s/hang/{os.getpid()}")
    assert "pdb" not in sys.modules or not watchdog.traced()
