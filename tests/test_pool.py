"""The processes in which tests with several ranks run: what has grown is replaced, what dies is noticed."""

from __future__ import annotations

import os
import signal

import pytest
import torch.distributed as dist

from tests.support.pool import LARGE

KEPT = []


def keep(size: int) -> int:
    dist.barrier()  # else one could leave while another still connects
    KEPT.append(b"\1" * size)
    return os.getpid()


def test_a_process_that_has_grown_is_replaced(workers):
    pids = workers.run(keep, 1, ranks=2)
    assert workers.run(keep, LARGE + 1) == pids[:1]
    first, second = workers.run(keep, 1, ranks=2)
    assert first != pids[0] and second == pids[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.thorough  # the processes start again, which takes as long as importing NeMo
def test_a_process_that_dies_is_noticed(workers):
    with pytest.raises(RuntimeError, match="the process of rank 0 died"):
        workers.run(die)
    assert workers.run(keep, 1)
