"""Work on a list of tasks in worker processes, with results in the order of the tasks.

Two kinds of workers serve one stream: those that plan examples (read a record, write its tokens, count its crops), and
those that decode the crops of a pack once it is known which examples it holds.
"""

from __future__ import annotations

import atexit
import gc
import math
import os
import signal
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.manifest import ShardError
from molmo2_nemo.data.objects import traffic
from molmo2_nemo.data.pieces import Numbered
from molmo2_nemo.data.reader import ExampleReader, Skipped
from molmo2_nemo.processes import die_with_parent

DECODERS_PER_PLANNER = 4
MIB = 2**20
POLL = 0.02  # seconds
CLOSED = -1


class Tasks(Protocol):
    """What a worker does for one task. It may raise ShardError."""

    def __getitem__(self, task: Any) -> Any: ...


class PlanTasks:
    """Number in the stream -> (number, its examples without crops, or `Skipped`)."""

    def __init__(self, reader: ExampleReader):
        self.reader = reader

    def __getitem__(self, n: int) -> tuple[int, list[Numbered] | Skipped]:
        return n, self.reader.pieces(n)


@dataclass(frozen=True, slots=True)
class PackTask:
    """The examples of a pack whose crops are to be decoded."""

    examples: tuple[tuple[int, int, list[dict[str, Any]] | None, int], ...]  # number, phase, info["images"], crops
    shape: tuple[int, int]  # P, D_p
    before: int = 0  # bytes of the crops of all packs before it, since the reader was opened

    @property
    def bytes(self) -> int:
        """Of its crops."""
        return sum(count for *_, count in self.examples) * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class PackPixels:
    """The crops of a pack. What could not be decoded has none."""

    crops: Any  # uint8 [C, P, D_p] in the order of the examples; a tensor between processes, else an array
    said: list[dict[str, Any] | Skipped]  # for each example


class Room:
    """Room for packs that are decoded before their turn, in the memory of all processes together.

    Only the consuming process writes here, and workers look every POLL seconds: a lock would stay locked for ever where
    a worker is killed while it holds it.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int):
        import torch

        self.limit = limit
        self._taken = torch.zeros(1, dtype=torch.int64).share_memory_()  # bytes handed out, or CLOSED

    def wait(self, task: PackTask) -> bool:
        """Until there is room for a pack, or it is the next to be handed out; False: nobody wants it any more."""
        while (taken := int(self._taken[0])) >= 0:
            if task.before <= taken or task.before + task.bytes - taken <= self.limit:
                return True
            time.sleep(POLL)
        return False

    def take(self, task: PackTask) -> None:
        """A pack is handed out."""
        self._taken[0] = task.before + task.bytes

    def close(self) -> None:
        self._taken[0] = CLOSED


class DecodeTasks:
    """`PackTask` -> `PackPixels`. The crops are written where both processes see them, once, and in place.

    Args:
        readers: of each phase.
        room: for the results, where they go to another process.
    """

    def __init__(self, readers: list[ExampleReader], room: Room | None):
        self.readers, self.room = readers, room

    @property
    def shared(self) -> bool:
        return self.room is not None

    def __getitem__(self, task: PackTask) -> PackPixels:
        import torch

        if self.room is not None and not self.room.wait(task):
            return PackPixels(torch.empty(0, dtype=torch.uint8), [])
        shape = (sum(count for *_, count in task.examples), *task.shape)
        if self.shared and shape[0]:
            storage = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")
            room = torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)  # type: ignore[call-overload]
        else:
            room = torch.empty(shape, dtype=torch.uint8)
        pixels, end, said = room.numpy(), 0, []
        for n, phase, images, count in task.examples:
            found = self.readers[phase].decode(n, images, pixels[end : end + count])
            said.append(found)
            if not isinstance(found, Skipped):
                end += count
        return PackPixels(room[:end] if self.shared else pixels[:end], said)


def planners(num_workers: int) -> int:
    """Processes that plan for `num_workers` that decode."""
    return -(-num_workers // DECODERS_PER_PLANNER)


def packs_ahead(config: DataConfig) -> int:
    """Packs that each worker decodes before their turn, at least 1 and at most `data.prefetch`."""
    pack = config.packing.max_crops * config.image.crop_size**2 * 3
    fit = config.ahead_mib * MIB // max(pack * max(config.num_workers, 1), 1)
    return max(1, min(config.prefetch, fit))


def in_order(work: Tasks, tasks: Iterable[Any], num_workers: int, prefetch: int) -> Generator[Any, None, None]:
    """Results in the order of `tasks`, which are taken `num_workers * prefetch` ahead if there are workers."""
    if num_workers == 0:
        for task in tasks:
            yield work[task]
        return
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        _Guarded(work),  # type: ignore[arg-type]
        sampler=tasks,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch,
        collate_fn=_same,
        worker_init_fn=start_worker,
    )
    with _inherited_whole():
        iterator = iter(loader)
    try:
        for result in iterator:
            result, taken = result
            traffic.add(taken)
            if isinstance(result, ShardError):
                raise result
            yield result
    finally:
        iterator._shutdown_workers()  # a generator that is closed must not leave processes behind


class _Guarded:
    """Returns ShardError, which torch would wrap in a traceback; and what was taken from object stores for a task."""

    def __init__(self, work: Tasks):
        self.work = work

    def __getitem__(self, task: Any) -> tuple[Any, dict[str, int]]:
        try:
            result = self.work[task]
        except ShardError as error:
            result = error
        return result, traffic.take()


def array_of(crops: Any) -> np.ndarray:
    """The crops of `PackPixels` as an array, without a copy."""
    return crops if isinstance(crops, np.ndarray) else crops.numpy()


@contextmanager
def _inherited_whole() -> Iterator[None]:
    """What processes that are forked off here inherit is not theirs to take apart: a process group without owner that
    one of them collected as garbage would end it with SIGABRT, or let it wait forever, because the threads of that
    group are not in it. So their collector is off until `start_worker` has hidden what they inherit from it."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def start_worker(worker: int) -> None:
    """Make a worker outlive SIGTERM, but not the process that reads from it.

    Launchers send SIGTERM to a whole process group. The trainer then finishes its step and saves, and needs its workers
    until it closes the loader itself. If it is killed, torch's own check does not always end them: a worker
    that waits for room in the queue it shares with the others would wait forever.

    When it ends, the thread that sends its crops may still be in the middle of one. Where processes are spawned, Python
    would then take itself apart beneath that thread, which ends in SIGABRT, so the worker leaves without that.
    """
    gc.freeze()
    gc.enable()
    traffic.take()  # counted by the process that this one was forked from
    atexit.register(os._exit, 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent()


def _same(value: Any) -> Any:
    return value
