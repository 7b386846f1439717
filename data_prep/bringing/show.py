"""Progress of `--fetch`: bars on a terminal, else a line when a file begins or ends and every half minute."""

from __future__ import annotations

import threading
import time
from textwrap import shorten
from typing import Any

from data_prep.bringing.fetch import BROUGHT, Job, Result

LINE_EVERY = 30.0  # seconds


class Show:
    """Shows transfers on a `rich` console. Use as a context manager; its methods are called from several threads."""

    def __init__(self, console: Any):
        self._console, self._lock = console, threading.Lock()
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}  # URL -> its bar
        self._names: dict[str, str] = {}  # URL -> what is brought
        self._shown = time.monotonic()

    def __enter__(self) -> Show:
        if self._console.is_terminal:
            from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            columns = (
                "{task.description}",
                BarColumn(20),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=self._console, transient=True)
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begun(self, job: Job) -> None:
        """A file is asked for."""
        with self._lock:
            self._names |= dict.fromkeys(job.urls, job.name)

    def came(self, url: str, have: int, total: int | None) -> None:
        """`have` bytes of `total` are there."""
        with self._lock:
            name = self._names.get(url, url)[:40]
            if self._bar is not None:
                if url not in self._tasks:
                    self._tasks[url] = self._bar.add_task(name, total=total)
                self._bar.update(self._tasks[url], completed=have, total=total)
            elif time.monotonic() - self._shown >= LINE_EVERY:
                self._shown = time.monotonic()
                of = f" of {total / 1e9:,.2f}" if total else ""
                self._console.print(f"{name}: {have / 1e9:,.2f}{of} GB", soft_wrap=True)

    def ended(self, result: Result) -> None:
        """A file is at its place, or has failed."""
        with self._lock:
            size = f", {result.size / 1e9:,.2f} GB" if result.state == BROUGHT else ""
            why = f": {shorten(result.detail, 300, placeholder=' ...')}" if result.detail else ""
            self._console.print(f"{result.name}: {result.state}{size}{why}", soft_wrap=True)
