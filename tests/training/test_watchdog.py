"""A run that hangs ends, all its processes, and says who did not come; one that is held up on purpose goes on.

Real processes over gloo, forked from the test: each is a plain loop that says where it is as training does.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from molmo2_nemo.processes import process_start
from molmo2_nemo.rundir.attempt import this_process
from molmo2_nemo.rundir.standstill import standstill
from molmo2_nemo.training import watchdog
from molmo2_nemo.training.hang_cause import Place, who_did_not_come
from molmo2_nemo.training.watchdog import attempt_folder
from molmo2_nemo.training.whereabouts import Work, here

LIMIT = 3.0  # seconds
PATIENCE = 120.0  # until a process must be gone
ENOUGH = 5  # steps


def loop(folder: Path, rank: int, ranks: int, hang: Callable[[int, int, str], bool]) -> None:
    """Ranks train, in pairs that compute together: a micro-batch, an exchange of gradients and a line of the log each
    step. Of four, one of each pair exchanges gradients with one of the other.

    Args:
        hang: told rank, step and place; may keep a rank, and returns whether it leaves out what is there.
    """
    import torch
    import torch.distributed as dist

    from molmo2_nemo import cpu

    gc.freeze()
    cpu.enable(1)  # as a run does
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": "7"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    everyone, pair = (
        dist.new_group(list(range(ranks))),
        dist.new_subgroups_by_enumeration([[0, 1], [2, 3]][: ranks // 2])[0],
    )
    across = dist.new_subgroups_by_enumeration([[0, 1]] if ranks == 2 else [[0, 2], [1, 3]])[0]

    def report(message: str, stacks: str) -> None:
        (folder / "errors.jsonl").write_text(json.dumps({"rank": rank, "message": message, "stacks": stacks}) + "\n")

    value = torch.ones(2)
    with watchdog.reporting(report), watchdog.watching(LIMIT, folder):
        for step in range(1, ENOUGH + 1):
            here.begin(step)
            here.fetches()
            hang(rank, step, "loader")
            here.computes([f"shard-{rank}.tar:{step}"])
            if not hang(rank, step, "computing"):
                dist.all_reduce(value, group=pair)
            here.at(Work.EXCHANGING)
            if not hang(rank, step, "exchange"):
                dist.all_reduce(value, group=across)
            here.at(Work.FINISHING)
            dist.all_reduce(value, group=everyone)
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
    folder: Path,
    hang: Callable[[int, int, str], bool],
    meanwhile: Callable[[list[Any]], None] | None = None,
    ranks: int = 2,
) -> Any:
    """Exit codes of all ranks, and what was reported."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=ended, args=(folder, rank, ranks, hang), daemon=True) for rank in range(ranks)]
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
    first = json.loads((place / "rank00000.json").read_text())
    still = standstill(tmp_path, {"host": first["host"], "pid": first["pid"], "started": first["began"]})
    assert still.startswith("no progress for ") and " s on 2 of 2 ranks, such as " in still
    assert standstill(tmp_path, this_process()) is None, "the next attempt, which need not be watched"
    for each in range(2):
        text = (place / f"rank{each:05}.txt").read_text()
        assert "Thread 0x" in text and "in loop" in text and 'File "' in text
        assert f"records of its micro-batch:\n  shard-{each}.tar:" in text
    assert not list(tmp_path.glob("done*"))
    assert not list(place.glob("*.collectives.json")), "NCCL's recorder has nothing of gloo"


def leaves_out_of_its_pair(rank: int, step: int, place: str) -> bool:
    return (rank, step, place) == (2, 4, "computing")


def leaves_out_across(rank: int, step: int, place: str) -> bool:
    return (rank, step, place) == (2, 4, "exchange")


def keeps_its_pair(rank: int, step: int, place: str) -> bool:
    if (rank, step, place) == (3, 3, "computing"):
        time.sleep(10 * PATIENCE)
    return False


@pytest.mark.parametrize(
    ("hang", "rank", "how", "others"),
    [
        (
            leaves_out_of_its_pair,
            2,
            "left out a collective that the others are in: it is at step 4, fin",
            ("fin", "exch", "comp"),
        ),
        (
            leaves_out_across,
            2,
            "left out a collective that the others are in: it is at step 4, fin",
            ("exch", "fin", "fin"),
        ),
        (keeps_its_pair, 3, "did not come: it is at step 3, computing micro-batch 1", ("exch", "exch", "comp")),
    ],
)
def test_of_four_the_one_is_named_that_others_wait_for_by_way_of_others(tmp_path, hang, rank, how, others):
    """Most ranks are ahead of one that waits for the culprit, or as far as it."""
    codes, said = run(tmp_path, hang, ranks=4)
    assert codes == [1] * 4 and said["rank"] == rank
    message = said["message"].partition(" The others: ")
    assert f"): rank {rank} (host " in message[0] and how in message[0] and " did not come" not in message[2]
    step, (place,) = how.partition("at step ")[2][0], (tmp_path / "hang").iterdir()
    for other, part in zip((n for n in range(4) if n != rank), others, strict=True):
        assert f": step {step}, {part}" in (place / f"rank{other:05}.txt").read_text()


def test_a_run_without_a_hang_leaves_nothing(tmp_path):
    assert run(tmp_path, lambda rank, step, place: False) == ([0, 0], None)
    assert {path.name for path in tmp_path.iterdir()} - {"meet"} == {"done0", "done1"}


def held_up(rank: int, step: int, place: str) -> bool:
    """Rank 1 stops itself in step 2; in step 4 it is in a debugger, or so it looks: a loop in a file called pdb.py."""
    if (rank, place) == (1, "computing"):
        if step == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        if step == 4:
            exec(compile("import time\ntime.sleep(SECONDS)", "/usr/lib/pdb.py", "exec"), {"SECONDS": 5 * LIMIT})
    return False


def test_nobody_is_told_off_for_being_stopped_or_debugged(tmp_path):
    def wake(processes: list[Any]) -> None:
        stat = Path(f"/proc/{processes[1].pid}/stat")
        end = time.monotonic() + PATIENCE
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(3 * LIMIT)
        who, host = f"rank 1 (host {socket.gethostname()}, process {processes[1].pid}) is", socket.gethostname()
        attempt = {"host": host, "pid": processes[0].pid, "started": process_start(processes[0].pid)}
        assert standstill(tmp_path, attempt) == (
            f"the run stands still: {who} stopped (SIGSTOP, Ctrl-Z) or in a debugger; "
            f"kill -CONT {processes[1].pid} on {host} lets it go on"
        )
        os.kill(processes[1].pid, signal.SIGCONT)
        while standstill(tmp_path, attempt) != f"the run stands still: {who} in a debugger":
            assert time.monotonic() < end
            time.sleep(0.05)

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


def counted(counts: list[dict[str, int]], **more: Any) -> list[Place]:
    """Ranks at one line of one part of the work, by the collectives that each has begun in its groups."""
    same = {"stack": [("step.py step", 10)], "waits": True} | more
    return [place(n, [7, 2, 0], "exchanging gradients", collectives=each, **same) for n, each in enumerate(counts)]


def test_by_what_each_has_begun():
    """Chains of waiting end at the cause, whatever the ranks on the way do; where nobody left anything out, at those
    whose collective does not end. On a GPU no stack shows who waits."""
    chain = [{"all": 5, "a": 3}, {"all": 5, "a": 2, "b": 8}, {"all": 4, "b": 7, "c": 1}, {"all": 4, "c": 1}]
    who, words = who_did_not_come(counted(chain), 4)
    assert who == [2, 3] and words.startswith(
        "rank 2 (host n, GPU 2) is in a collective that all its ranks have begun: it is at exchanging gradients; rank 3"
    )
    who, words = who_did_not_come(counted([*chain[:3], {"all": 4, "c": 0}]), 4)
    assert who == [3] and "rank 3 (host n, GPU 3) left out a collective that the others are in: " in words
    who, words = who_did_not_come(counted([*chain[:3], {"all": 4, "c": 0}], waits=False), 4)
    assert who == [3] and "rank 3 (host n, GPU 3) left out a collective that the others are in: " in words
    late = [replace(each, order=[7, 1, 3]) if each.rank == 2 else each for each in counted(chain[:3], waits=False)]
    assert who_did_not_come(late, 3)[1].startswith("rank 2 (host n, GPU 2) did not come: ")
    assert who_did_not_come(counted([{"all": 4}, {"all": 4}, {"all": 4}]), 3)[0] == []
    received = [("megatron/core/pipeline_parallel/p2p_communication.py recv", 9)]
    stages = [replace(each, stack=received) if each.rank > 1 else each for each in counted(chain)]
    who, words = who_did_not_come(stages, 4)
    assert who == [2, 3] and "rank 2 (host n, GPU 2) waits for a message of another pipeline stage: " in words
    apart = replace(stages[0], gpu=None, waits=False)
    assert who_did_not_come([apart, *stages[1:]], 4)[0] == [0]


def test_what_a_rank_writes_is_what_the_others_read(tmp_path):
    """Also on a GPU, where the stack of the rank that reports is compared with those that it has read."""
    dogs = [watchdog.Watchdog(LIMIT, tmp_path, rank, 2, lambda message, stacks: None, gpu=rank) for rank in range(2)]
    for dog in dogs:
        dog._where()
        dog.own.collectives, dog.own.stuck = {"0": 5 - dog.own.rank}, 9.0
        dog.own.stack = dogs[0].own.stack
        dog._write()
    assert dogs[0]._read() == {1: dogs[1].own} and dogs[1]._read() == {0: dogs[0].own}
    for dog in dogs:
        who, words = who_did_not_come(sorted([dog.own, *dog._read().values()], key=lambda place: place.rank), 2)
        assert who == [1] and "GPU 1) left out a collective that the others are in: " in words


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
