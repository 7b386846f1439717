"""What `--fetch` has brought: a line per file in ROOT/.bringing/done.jsonl; a later call goes on from there."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import UserError

WORK = ".bringing"  # folder below --source: this journal, partial files, lists of ids


class Journal:
    """Entries by (item, address). Lines are appended; a last line that a kill cut off is passed over."""

    def __init__(self, root: Path):
        self.path = root / WORK / "done.jsonl"
        self._lock = threading.Lock()
        self._entries: dict[tuple[str, str], dict[str, Any]] = {}
        for line in self.path.read_bytes().splitlines() if self.path.is_file() else ():
            try:
                entry = json.loads(line)
                self._entries[entry["item"], entry["address"]] = entry
            except (ValueError, KeyError, TypeError):
                continue

    def state(self, item: str, address: str) -> str:
        """ "done", "placing" (unpacked, and being moved to its place), or "" for a file that never came."""
        return self._entries.get((item, address), {}).get("state", "")

    def knows(self, items: set[str]) -> bool:
        """Something of these items was begun or brought."""
        return any(item in items for item, _ in self._entries)

    def note(self, item: str, address: str, state: str, **more: Any) -> None:
        """Append an entry; it is on the disk when this returns."""
        entry = {"item": item, "address": address, "state": state, **more}
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = not self.path.is_file() or not self.path.stat().st_size or self.path.read_bytes()[-1:] == b"\n"
            with self.path.open("a") as file:
                file.write(("" if whole else "\n") + json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._entries[item, address] = entry


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Nobody else brings files to this folder meanwhile.

    Raises:
        UserError: somebody does.
    """
    path = root / WORK / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another molmo2 prepare --fetch is at work in {root}; wait until it has ended") from None
        yield
