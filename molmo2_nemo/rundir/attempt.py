"""An attempt at a stage: attempt.json says when and where the last one began and that it is alive, errors.jsonl why
attempts failed.

A thread touches attempt.json while the attempt lasts, so that a machine which cannot ask for the process sees that a
run is there while no step ends: compiling, saving, validating.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molmo2_nemo.processes import process_start
from molmo2_nemo.rundir.lines import append_line
from molmo2_nemo.rundir.paths import ERRORS

BEAT = 20.0  # seconds between two touches


def this_process() -> dict[str, Any]:
    """The entries of attempt.json that identify the process at work, which is this one."""
    pid = os.getpid()
    return {"time": time.time(), "host": socket.gethostname(), "pid": pid, "started": process_start(pid)}


@contextmanager
def heartbeat(path: Path) -> Iterator[None]:
    """Touches the file every BEAT seconds as long as the block lasts."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT):
            try:
                os.utime(path)
            except OSError:
                pass  # whatever is wrong there, the run itself will meet it

    thread = threading.Thread(target=beat, name="sign of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def note_error(folder: Path, report: dict[str, Any]) -> None:
    """Adds a report to the errors.jsonl of the stage in `folder`, for `molmo2 status`; a full disk must not hide the
    error itself."""
    try:
        append_line(folder / ERRORS, report)
    except OSError:
        pass
