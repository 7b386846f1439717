"""Only one run at a time works in a stage's folder."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import UserError

LOCK_POLL = 1.0  # seconds between two looks at a lock that another run holds


class Locked(UserError):
    """Another run is at work in the folder."""


@contextmanager
def only_run(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Keeps a second run out of the folder while the block lasts; the system lifts the lock of a killed process.

    Args:
        wait: seconds to wait for another run to end. On a network file system the lock of a node that died is lifted
            only when its lease ends.

    Raises:
        Locked: another run is at work there.
    """
    with open(make_lockable(folder), "a") as file:
        deadline = time.monotonic() + wait
        while not _locked(file):
            if time.monotonic() >= deadline:
                waited = f" and still is after {wait:.0f} s" if wait else ""
                raise Locked(
                    f"another run is at work in {folder}{waited}; wait for it, stop it, or take another output_dir"
                )
            time.sleep(LOCK_POLL)
        yield


def make_lockable(folder: Path) -> Path:
    """Makes the folder, and the file that its lock is on; returns the latter.

    Raises:
        OSError: one of them cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (
        folder.parent / f".{folder.name}.lock"
    )  # beside the folder: NeMo's logger moves the files that it finds inside
    lock.touch()
    return lock


def _locked(file: Any) -> bool:
    """False if somebody else has locked the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True
