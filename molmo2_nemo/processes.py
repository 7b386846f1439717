"""What any process may need: to end with its parent, to be distinguished from a later one, to keep libraries quiet."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import verbose

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # ask a run to save and leave; training/signals.py has the whole story
ONE = 5.0  # seconds in which further signals are taken for the first, which a launcher passes on to those that have it
PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)
POLL = 1.0  # seconds between two looks at the parent
PARENT = "MOLMO2_PARENT"  # environment variable: id of the process that starts this one
OWNER = "MOLMO2_OWNER"  # environment variable: id and start of the process that this one is not to outlive


def this_rank() -> int:
    """This process's rank, before there are process groups: from the launcher's environment."""
    return int(os.environ.get("RANK", "0"))


def die_with_parent() -> None:
    """Makes this process end when the one that started it is gone: a killed launcher leaves no ranks behind, a killed
    trainer no loader workers. Never raises.

    Linux can do it, but already when the thread that started the process ends. So a worker of multiprocessing, which
    any thread may have started, checks for its parent itself, as every process does on other systems.

    A parent that was gone before this call is noticed too: one of multiprocessing always, another if it started this
    process with `as_parent` in its environment.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
                os._exit(1)
            return
        except (OSError, AttributeError):
            pass  # not Linux
    served = multiprocessing.get_start_method() == "forkserver"  # the server is then the parent that the system knows
    known = os.getppid() if parent is None or parent.pid is None or served else parent.pid
    _when(lambda: os.getppid() != known, lambda: os._exit(1))


def stop_with_owner() -> bool:
    """Sends this process SIGTERM when its owner is gone: what it does ends as by a signal to itself. Its owner is the
    process whose `as_owner` is in its environment, however many are between the two; without one, its parent.

    Returns:
        False, and nothing is sent, where the owner that the environment names is gone already.
    """
    pid, began = os.environ.get(OWNER, f"{os.getppid()} None").split()

    def gone() -> bool:
        return os.getppid() != int(pid) and (began == "None" or str(process_start(int(pid))) != began)

    if gone():
        return False
    _when(gone, lambda: os.kill(os.getpid(), signal.SIGTERM))
    return True


def as_owner() -> dict[str, str]:
    """What a process adds to the environment of those that are to `stop_with_owner`."""
    return {OWNER: f"{os.getpid()} {process_start(os.getpid())}"}


def as_parent() -> dict[str, str]:
    """What a process adds to the environment of a child that is to `die_with_parent`."""
    return {PARENT: str(os.getpid())}


def _when(gone: Callable[[], bool], then: Callable[[], Any]) -> None:
    """Calls `then` in a thread when `gone` is true."""

    def watch() -> None:
        while not gone():
            time.sleep(POLL)
        then()

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Inside the block STOP_SIGNALS interrupt as Ctrl-C does, and a signal that comes again at once does not interrupt
    what the first one has begun. Without effect in another thread than the main one."""
    first: float | None = None

    def interrupt(number: int, frame: object) -> None:
        nonlocal first
        if first is None or time.monotonic() > first + ONE:
            first = time.monotonic()
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, *STOP_SIGNALS)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def process_start(pid: int) -> int | None:
    """When a process of this machine began, in clock ticks since boot, which distinguishes it from a later one with the
    same id. None if it is gone, or where Linux's /proc is missing."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else int(fields[18])  # starttime is field 22 of proc(5), the state field 3
    except (OSError, ValueError, IndexError):
        return None


def quiet() -> None:
    """Hides what the libraries say about themselves, here and in loader workers; MOLMO2_VERBOSE=1 shows it. To be
    called before they are imported. Our own messages to a person are printed, not logged."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if verbose():
        return
    warnings.filterwarnings("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    logging.disable(logging.WARNING)
