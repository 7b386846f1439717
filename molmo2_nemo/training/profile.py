"""A few steps under PyTorch's profiler: a trace for Perfetto, and a table of where the time went, by kind of kernel.

On a GPU the table counts the device's kernels; on a CPU operators by their own time (not that of operators they call).
"""

from __future__ import annotations

import gzip
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from molmo2_nemo.training.kernel_kinds import KINDS, kind_of
from molmo2_nemo.training.memory_history import history

STEP = "training step "  # how the marks of steps in a trace begin
MARKS = "USDT:"  # what the profiler says of its own start and end
LARGEST = 25  # kernels that the table names
LONG = 256 * 2**20  # bytes of a packed trace from which on browsers get slow
WAITS = ("Synchronize", "cudaMemcpy")  # calls of the CUDA runtime in which the host waits


@dataclass(frozen=True)
class Row:
    """All runs of one kernel or operator, or of one kind."""

    name: str
    ms: float
    calls: int


@dataclass(frozen=True)
class Profile:
    """What a profile of some steps found."""

    device: bool  # kernels of a device; else operators of the CPU
    steps: int
    span_ms: float  # from the first step's begin to the last one's end, on the host
    busy_ms: float  # in which the device had a kernel or copy at work (CPU: operators' own time)
    waited_ms: float  # in which the host waited for the device
    waits: int  # how often it did
    kernels: list[Row]  # the longest first

    def kinds(self) -> list[Row]:
        """By kind, the longest first; those that did not occur are left out."""
        ms: dict[str, float] = defaultdict(float)
        calls: dict[str, int] = defaultdict(int)
        for row in self.kernels:
            ms[kind_of(row.name)] += row.ms
            calls[kind_of(row.name)] += row.calls
        return sorted((Row(kind, ms[kind], calls[kind]) for kind in KINDS if calls[kind]), key=lambda row: -row.ms)


class StepProfiler:
    """Profiles steps `first` to `last` of a stage on this rank.

    Args:
        folder: where trace and table go.
        rank: this process's; its files are named after it, unless it is 0.
        title: what the table is headed with.
    """

    def __init__(self, folder: Path, first: int, last: int, rank: int, title: str) -> None:
        self.folder, self.first, self.last, self.rank, self.title = folder, first, last, rank, title
        self._profile: Any = None
        self._mark: Any = None
        self._begun = self._ended = 0  # first and last step that is in it

    def begin(self, step: int) -> None:
        """Step `step` (from 1) begins."""
        if not self.first <= step <= self.last:
            return
        if self._profile is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities)
            self._profile.__enter__()
            self._begun = step
        self._mark = record_function(f"{STEP}{step}")
        self._mark.__enter__()

    def end(self, step: int) -> str | None:
        """Step `step` has ended, taken or skipped. After the last one, what to print."""
        if self._profile is None:
            return None
        self._close_mark()
        self._ended = step
        return self.close() if step >= self.last else None

    def close(self) -> str | None:
        """Write what was profiled so far; what to print, None if that is nothing."""
        if self._profile is None:
            return None
        self._close_mark()
        found, self._profile = self._profile, None
        found.__exit__(None, None, None)
        if self._ended < self._begun:  # a step that was not finished
            return None
        return self._write(found)

    def _close_mark(self) -> None:
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None

    def _write(self, found: Any) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        steps = f"steps-{self._begun}-{self._ended}" + (f".rank-{self.rank}" if self.rank else "")
        trace, table = self.folder / f"{steps}.trace.json.gz", self.folder / f"{steps}.txt"
        _export(found, trace)
        where = f"steps {self._begun} to {self._ended} of {self.title}, rank {self.rank}"
        text = f"{where}: {described(summary(found, self._ended - self._begun + 1))}"
        table.write_text(text + "\n")
        size = trace.stat().st_size
        long = "; it is long, a browser may not take it: profile fewer steps" if size > LONG else ""
        said = f"{text}\ntrace: {trace}, {size / 2**20:.1f} MiB, for https://ui.perfetto.dev{long}"
        memory = history.after(f"steps-{self._begun}-{self._ended}")
        return f"{said}\n{memory}" if memory else said


def _export(found: Any, trace: Path) -> None:
    """The trace, whole or not at all."""
    plain = trace.with_name(f".{trace.name}.json")
    packed = trace.with_name(f".{trace.name}")
    found.export_chrome_trace(str(plain))
    with open(plain, "rb") as source, gzip.open(packed, "wb", compresslevel=3) as target:
        while block := source.read(1 << 20):
            target.write(block)
    plain.unlink()
    os.replace(packed, trace)


def summary(found: Any, steps: int | None = None) -> Profile:
    """Figures of a finished torch.profiler.profile, within the marks of its first `steps` steps (None: of all)."""
    events = found.events()
    on_host = [e for e in events if e.device_type == DeviceType.CPU]
    marks = sorted((e.time_range for e in on_host if e.name.startswith(STEP)), key=lambda mark: mark.start)[:steps]
    start, end = marks[0].start, max(m.end for m in marks)
    on_host = [e for e in on_host if e.time_range.start < end]
    kernels = [e for e in events if _is_kernel(e) and e.time_range.end > start and e.time_range.start < end]
    waiting = [e for e in on_host if _waits(e.name) and start <= e.time_range.start < end]
    waited = sum(e.time_range.elapsed_us() for e in waiting) / 1000
    if kernels:
        rows = _rows((e.name, e.time_range.elapsed_us() / 1000) for e in kernels)
        busy = covered([(e.time_range.start, e.time_range.end) for e in kernels]) / 1000
    else:
        own = ((e.name, e.self_cpu_time_total / 1000) for e in on_host if not e.name.startswith((STEP, MARKS)))
        rows = _rows(own)
        busy = sum(row.ms for row in rows)
    return Profile(bool(kernels), len(marks), (end - start) / 1000, busy, waited, len(waiting), rows)


def _is_kernel(event: Any) -> bool:
    """Whether an event is work of a device, not a mark that spans such work."""
    annotation = event.is_user_annotation or event.name.startswith(STEP)
    return event.device_type == DeviceType.CUDA and not annotation


def _waits(name: str) -> bool:
    """Whether a call of the CUDA runtime or driver waits for the device."""
    return name.startswith(("cuda", "cu")) and (name.endswith(WAITS[0]) or name == WAITS[1])


def _rows(runs: Iterable[tuple[str, float]]) -> list[Row]:
    ms: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for name, taken in runs:
        ms[name] += taken
        calls[name] += 1
    return sorted((Row(name, ms[name], calls[name]) for name in ms), key=lambda row: -row.ms)


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of what intervals cover together; they may overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def described(found: Profile) -> str:
    """The figures as lines of text."""
    what = "kernels" if found.device else "operators (their own time)"
    lines = [f"{found.span_ms:,.0f} ms for {found.steps} step{'s' * (found.steps > 1)}"]
    if found.device:
        idle = max(0.0, found.span_ms - found.busy_ms)
        lines[0] += (
            f"; device busy {found.busy_ms:,.0f} ms ({found.busy_ms / found.span_ms:.0%}), idle {idle:,.0f} ms; "
            f"the host waited {found.waited_ms:,.0f} ms for it, {found.waits} times"
        )
    else:
        lines[0] += f"; operators took {found.busy_ms:,.0f} ms of it"
        if torch.cuda.is_available():
            lines[0] += "; the profiler recorded no kernel of the GPU (CUPTI, the library it takes them from, failed)"
    total = sum(row.ms for row in found.kernels) or 1.0
    lines.append(f"{'ms':>10} {'share':>6} {'calls':>8}  kind")
    lines += [_line(row, total) for row in found.kinds()]
    lines.append(f"{'ms':>10} {'share':>6} {'calls':>8}  the largest {what}")
    lines += [_line(row, total, kind=True) for row in found.kernels[:LARGEST]]
    return "\n".join(lines)


def _line(row: Row, total: float, kind: bool = False) -> str:
    name = f"{row.name[:100]}  [{kind_of(row.name)}]" if kind else row.name
    return f"{row.ms:10.1f} {row.ms / total:6.1%} {row.calls:8d}  {name}"
