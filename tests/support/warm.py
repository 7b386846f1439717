"""The user's command as torchrun starts it, one process for each rank, without importing NeMo in each: they are forked
from one that has. What a rank may do to itself and to the others, down to ending the process, harms no other test."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Called in every process before the command; may change what the command meets.
Before = Callable[[int, Path], None]


class Warm:
    """A process that has NeMo imported and waits for commands."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.parent = context.Process(target=_serve, args=(theirs,), daemon=False)
        self.parent.start()
        theirs.close()

    def start(self, words: list[str], folder: Path, before: Before, ranks: int = 2) -> list[int]:
        """Process ids of `molmo2 WORDS` in `ranks` processes, whose output goes to `folder/rank<N>.log`.

        Args:
            before: a function of a module, called with the rank and the folder.
        """
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        return list(self._ask("start", words, folder, before, ranks, port))

    def wait(self, pids: list[int]) -> list[int]:
        """Exit codes of processes, once all have ended."""
        return list(self._ask("wait", pids))

    def _ask(self, *request: Any) -> Any:
        self.pipe.send(request)
        return self.pipe.recv()

    def close(self) -> None:
        """Ends what still runs."""
        self.pipe.close()
        self.parent.join()


def _serve(pipe: Any) -> None:
    from molmo2_nemo import cpu
    from molmo2_nemo.nemo.start import start_nemo
    from molmo2_nemo.processes import quiet

    quiet()
    cpu.enable(threads=1)
    start_nemo()
    alive: set[int] = set()
    with contextlib.suppress(EOFError):
        while True:
            what, *rest = pipe.recv()
            if what == "start":
                words, folder, before, ranks, port = rest
                pids = [_fork(pipe, words, folder, before, rank, ranks, port) for rank in range(ranks)]
                alive.update(pids)
                pipe.send(pids)
            else:
                codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in rest[0]]
                alive.difference_update(rest[0])
                pipe.send(codes)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)


def _fork(pipe: Any, words: list[str], folder: Path, before: Before, rank: int, ranks: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        pipe.close()
        out = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
        values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in values.items()})
        before(rank, folder)
        from molmo2_nemo.cli.main import main

        code = main(words)
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
