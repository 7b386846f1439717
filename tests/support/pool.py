"""A pool of warm processes for distributed tests.

Importing NeMo takes more than 10 seconds, so it is done once: a parent imports it and forks the processes of the pool,
which serve all tests (`workers` in conftest.py). Each job forms a fresh process group of the size it asks for. A job is
a function of a test module, called as `function(*args)` on every rank; what it returns must be picklable.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
READY = "ready"
GROWN = 17  # exit code of a process that wants to be replaced
LARGE = 700 * 2**20  # bytes; what jobs leave behind (compiled code, caches, holes in the heap) adds up to gigabytes
SECONDS = 240  # a job that takes longer is taken for a hang, unless it says what it takes


class Pool:
    """Processes 0..size-1; jobs on the first n of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pipes: list[Any] = []
        self.parent: Any = None

    def start(self) -> None:
        """Start the processes, if they are not there."""
        if self.parent is not None:
            return
        context = multiprocessing.get_context("spawn")
        ends = [context.Pipe() for _ in range(self.size)]
        self.pipes = [ours for ours, _ in ends]
        self.parent = context.Process(target=_fork_warm, args=([theirs for _, theirs in ends],), daemon=False)
        self.parent.start()
        for _, theirs in ends:
            theirs.close()
        for pipe in self.pipes:
            assert pipe.recv() == READY

    def run(
        self, function: Callable[..., Any], *args: Any, ranks: int = 1, fit: bool = False, seconds: float = SECONDS
    ) -> list[Any]:
        """Results of all ranks, in order.

        Args:
            seconds: after which the job is taken for a hang.
            fit: leave the process group to the trainer that the job starts.
        """
        self.start()
        port = _free_port()
        for rank in range(ranks):
            self.pipes[rank].send((function, args, rank, ranks, port, fit))
        results, errors = [], []
        for rank in range(ranks):
            if not self.pipes[rank].poll(seconds):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer in {seconds} s: a hang? {errors}")
            try:
                ok, value = self.pipes[rank].recv()
            except EOFError:
                self.close()
                raise RuntimeError(f"the process of rank {rank} died; its last words are on stderr. {errors}") from None
            (results if ok else errors).append(value)
        assert not errors, "\n".join(errors)
        return results

    def close(self) -> None:
        """End the processes; the next job starts new ones."""
        if self.parent is None:
            return
        with contextlib.suppress(ProcessLookupError):  # all died by themselves
            os.killpg(self.parent.pid, signal.SIGKILL)
        self.parent.join()
        for pipe in self.pipes:
            pipe.close()
        self.pipes, self.parent = [], None


_PORTS = itertools.count()


def _free_port() -> int:
    """A port that nobody else takes before rank 0 listens on it: below those that the system hands out by itself, as to
    other pools' connections, and of this process's own, one after the other."""
    while True:
        port = 10_000 + os.getpid() % 200 * 100 + next(_PORTS) % 100
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def _fork_warm(pipes: list[Any]) -> None:
    """Import NeMo, fork a process for each pipe, another where one has grown too large, and wait until all are gone.

    Forking is safe here: imports start no thread, and torch has computed nothing.
    """
    from molmo2_nemo import cpu
    from molmo2_nemo.nemo.start import start_nemo
    from molmo2_nemo.processes import quiet

    os.setpgrp()  # what Pool.close ends
    os.chdir(ROOT)  # a test that starts the pool may be in a folder that goes with it
    quiet()
    cpu.enable(threads=1)
    start_nemo()
    faulthandler.enable()
    for pipe in pipes:
        pipe.send(READY)
    children = {_forked(pipe, pipes): pipe for pipe in pipes}
    while children:
        pid, status = os.wait()
        pipe = children.pop(pid, None)
        if pipe is None:
            continue
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == GROWN:
            children[_forked(pipe, list(children.values()))] = pipe
            continue
        if os.WIFSIGNALED(status):
            print(f"the pool's process {pid} ended by signal {os.WTERMSIG(status)}", file=sys.stderr, flush=True)
        pipe.close()  # the test reads the end of it


def _forked(pipe: Any, pipes: list[Any]) -> int:
    """The id of a new process that serves `pipe`; it closes the others, whose ends would else not be seen."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for other in pipes:
                if other is not pipe:
                    other.close()
            code = _serve(pipe)
        finally:
            os._exit(code)
    return pid


def _serve(pipe: Any) -> int:
    """Answer jobs until killed, the test process is gone (0), or this process has grown too large (GROWN)."""
    while True:
        try:
            function, args, rank, ranks, port, fit = pipe.recv()
        except EOFError:
            return 0
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": 0}
        os.environ.update({k: str(v) for k, v in environment.items()})
        try:
            if not fit:
                _start_group(rank, ranks)
            pipe.send((True, function(*args)))
        except BaseException:  # noqa: BLE001 - everything goes back to the test
            pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
        finally:
            reset()
        if _own_bytes() > LARGE:
            return GROWN


def _own_bytes() -> int:
    """Memory of this process that it does not share with the one it was forked from."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))


def _start_group(rank: int, ranks: int) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=rank, world_size=ranks)


def reset() -> None:
    """Forget process groups and the singletons that Megatron and NeMo keep."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.distributed.fsdp.src.megatron_fsdp import MegatronFSDP
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from nemo.utils import AppState
    from nemo.utils.metaclasses import Singleton

    for thing in gc.get_objects():
        if issubclass(type(thing), DistributedDataParallel | MegatronFSDP):
            vars(thing).clear()  # its parameters' hooks hold it, where the garbage collector does not see them
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    unset_num_microbatches_calculator()
    Singleton._Singleton__instances.pop(AppState, None)
    gc.collect()  # models and trainers hold groups in reference cycles, and gloo's groups have threads that poll


def start_megatron(tensor: int = 1, context: int = 1, pipeline: int = 1) -> None:
    """Megatron's groups over the ranks of this job."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor, pipeline, context_parallel_size=context)
    model_parallel_cuda_manual_seed(1)
