"""Gloo processes without NeMo, for what needs only torch or Megatron-core: forked from the test, so many are cheap."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

SECONDS = 120  # a job that takes longer is taken for a hang


def run_light(function: Callable[..., Any], *args: Any, ranks: int) -> list[Any]:
    """`function(*args)` in `ranks` processes that form a gloo group; their results in order.

    Forking is safe here because the test process runs torch on one thread, and because what a process inherits is
    hidden from its garbage collector: a group that an earlier test left behind as garbage has threads that are not in
    it, and it would wait for them for ever.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(theirs, folder, rank, ranks, function, args), daemon=True)
            gc.disable()  # until `_work` has hidden what is inherited
            process.start()
            gc.enable()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            results = []
            for rank, pipe in enumerate(pipes):
                assert pipe.poll(SECONDS), f"rank {rank} did not answer in {SECONDS} s"
                ok, value = pickle.loads(pipe.recv_bytes())
                assert ok, f"rank {rank}:\n{value}"
                results.append(value)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()


def _work(pipe: Any, folder: str, rank: int, ranks: int, function: Callable[..., Any], args: tuple) -> None:
    gc.freeze()
    gc.enable()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
        pipe.send_bytes(pickle.dumps((True, function(*args))))
        dist.barrier()
    except BaseException:  # noqa: BLE001 - everything goes back to the test
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    os._exit(0)
