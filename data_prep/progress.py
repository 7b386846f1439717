"""Progress of `molmo2 prepare`: a bar with rate and time left on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import time
from typing import Any

from data_prep.output import Output
from data_prep.prepare import Progress
from data_prep.shard_copy import Watch

LINE_EVERY = 30.0  # seconds between lines, if the output is not a terminal


class RichProgress(Progress):
    """Shows progress on a `rich` console. Use as a context manager."""

    def __init__(self, console: Any):
        self._console = console
        self._bar: Any = None
        self._task: Any = None
        self._name = ""
        self._rows: int | None = None
        self._start = self._shown = time.monotonic()
        self._before: int | None = None  # records that an earlier run wrote

    def __enter__(self) -> RichProgress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.end()

    def begin(self, name: str, rows: int | None) -> None:
        self._name, self._rows = name, rows
        self._start = self._shown = time.monotonic()
        if not self._console.is_terminal:
            return
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task(name, total=rows, counts="")
        self._bar.start()

    def room(self, words: str) -> None:
        from rich.text import Text

        self._console.print(Text(f"warning: {words}", style="bold red"), soft_wrap=True)

    def step(self, rows: int, output: Output) -> None:
        if self._before is None:
            self._before = output.records - 1
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=rows, counts=self._counts(output, now))
        elif now - self._shown >= LINE_EVERY:
            self._shown = now
            done = f"row {rows:,} of {self._rows:,}" if self._rows else f"row {rows:,}"
            self._console.print(f"{self._name}: {done}, {self._counts(output, now)}")

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _counts(self, output: Output, now: float) -> str:
        rate = (output.records - (self._before or 0)) / max(now - self._start, 1e-6)
        skipped = sum(output.skipped.values())
        return f"{output.records:,} records, {skipped:,} skipped, {output.bytes / 1e6:,.0f} MB, {rate:,.1f}/s"


class CopyProgress:
    """Bytes of one data set that is copied: a bar on a terminal, an occasional line elsewhere. A context manager."""

    def __init__(self, console: Any):
        self._console = console
        self._bar: Any = None
        self._task: Any = None
        self._name, self._size, self._done, self._shown = "", 0, 0, time.monotonic()
        self.watch = Watch(self._begin, self._step)

    def __enter__(self) -> CopyProgress:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _begin(self, name: str, size: int) -> None:
        self._name, self._size = name, size
        if not self._console.is_terminal:
            return
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._bar = Bar(*columns, TimeRemainingColumn(), console=self._console, transient=True)
        self._task = self._bar.add_task(name, total=size)
        self._bar.start()

    def _step(self, size: int) -> None:
        self._done += size
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif time.monotonic() - self._shown >= LINE_EVERY:
            self._shown = time.monotonic()
            self._console.print(f"{self._name}: {self._done / 1e6:,.0f} of {self._size / 1e6:,.0f} MB")
