"""The signals that ask a run to save and leave: SIGTERM, and the SIGUSR1 that Slurm sends ahead of it.

A handler only notes the signal; callbacks.py `StopOnSignal` acts on it when a step has ended, on all ranks at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_seen: signal.Signals | None = None


def received() -> signal.Signals | None:
    """The first of SIGNALS that this process was sent since `watched` began."""
    return _seen


def catch() -> None:
    """Put the handlers in place; again after Lightning, which puts its own there when training starts."""
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        for number in SIGNALS:
            signal.signal(number, _note)


@contextmanager
def watched() -> Iterator[None]:
    """Note SIGNALS instead of dying of them, from before the first import to the end of a run."""
    global _seen
    _seen = None
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    catch()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(number: int, frame: Any) -> None:
    global _seen
    if _seen is None:
        _seen = signal.Signals(number)


def name(number: int) -> str:
    return signal.Signals(number).name
