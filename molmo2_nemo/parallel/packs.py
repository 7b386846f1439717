"""Who reads which packs: one reader in each model-parallel group, micro-batches balanced among the readers by cost.

The ranks that share a data-parallel rank (a tensor x context x pipeline block) need the same micro-batches. One of them
reads, decodes and packs; the others get the finished arrays by broadcast. Before that the readers swap a few of a
step's micro-batches so that all data-parallel ranks have equal work (data/balance.py).

All of it happens one optimizer step ahead, in a thread of its own and over gloo groups of its own, for two reasons:
decoding overlaps with training, and a pipeline's stages ask for a micro-batch at different times, so that a broadcast
in the training thread would wait for a stage that waits for this one. A step's micro-batches are handed out only when
every rank has them, and a failure anywhere reaches every rank as the same error at the same step.

Arrays travel as bytes after a JSON head (types, shapes, keys, loader state); nothing is pickled.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from molmo2_nemo.data.balance import CostModel, balance
from molmo2_nemo.data.example import Batch
from molmo2_nemo.errors import DataError, UserError
from molmo2_nemo.parallel.assignment import Assignment
from molmo2_nemo.parallel.dynamic import DynamicContext

TIMEOUT = timedelta(hours=2)  # readers may wait long for each other while a checkpoint is written
WORDS = ("keys", "sources", "source_tokens", "state")  # JSON values
ARRAYS = [f.name for f in fields(Batch) if f.name not in (*WORDS, "context_ranks", "of_step")]
Ship = Callable[[torch.Tensor], Any]  # sends or fills a tensor, the same call on both sides


@dataclass
class PackGroups:
    """The gloo groups of this rank. Ranks are global; readers are ordered by data-parallel rank."""

    everyone: Any
    members: Any  # ranks with this data-parallel rank
    member_ranks: list[int]
    readers: Any  # None on ranks that do not read
    reader_ranks: list[int]
    dp_rank: int

    @property
    def reader(self) -> int:
        """The rank that reads for this one."""
        return self.member_ranks[0]

    @property
    def is_reader(self) -> bool:
        return dist.get_rank() == self.reader


def pack_groups(dp_rank: int, dp_size: int) -> PackGroups:
    """Make the groups; a collective of all ranks."""
    everyone = dist.new_group(backend="gloo", timeout=TIMEOUT)
    found = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(found, torch.tensor([dp_rank]), group=everyone)
    blocks: list[list[int]] = [[] for _ in range(dp_size)]
    for rank, owner in enumerate(found):
        blocks[int(owner)].append(rank)
    groups = [dist.new_group(block, backend="gloo", timeout=TIMEOUT) for block in blocks]
    reader_ranks = [block[0] for block in blocks]
    readers = dist.new_group(reader_ranks, backend="gloo", timeout=TIMEOUT)
    own = readers if dist.get_rank() in reader_ranks else None
    return PackGroups(everyone, groups[dp_rank], blocks[dp_rank], own, reader_ranks, dp_rank)


class SharedPacks:
    """Iterable over this rank's micro-batches.

    Args:
        open_stream: opens this data-parallel rank's `PackStream`; called on the readers only.
        micro_batches: of one rank in an optimizer step, or those of each step, counted from 0.
        steps: optimizer steps that will be taken; nothing is read beyond them.
        cost: by which micro-batches are balanced; None keeps every micro-batch where it was packed.
        dynamic: assigns a step's micro-batches to blocks of the context group; None: all ranks share every one.

    Raises:
        DataError: on every rank, when the stream of any reader cannot be opened or, while iterating, fails.
    """

    def __init__(
        self,
        open_stream: Callable[[], Any],
        groups: PackGroups,
        *,
        micro_batches: int | Callable[[int], int],
        steps: int,
        cost: CostModel | None = None,
        dynamic: DynamicContext | None = None,
    ):
        self.groups, self.steps = groups, steps
        if isinstance(micro_batches, int):
            always = micro_batches
            self.count: Callable[[int], int] = lambda step: always  # noqa: E731
        else:
            self.count = micro_batches
        self.micro_batches = self.count(0)  # of the step that is read
        self.cost = cost if len(groups.reader_ranks) > 1 else None
        self.dynamic = dynamic
        self.stream: Any = None
        self.reading = 0.0  # seconds that this rank took to read the last step; 0 where it does not read
        self.collecting = False  # this rank reads right now; else it waits for others, or is ahead
        failure: BaseException | None = None
        if groups.is_reader:
            try:
                self.stream = open_stream()
            except Exception as error:  # noqa: BLE001 - the other ranks must hear of it
                failure = error
        agree(failure, groups.everyone, list(range(dist.get_world_size())))
        self._ready: queue.SimpleQueue[list[Batch] | BaseException] = queue.SimpleQueue()
        self._next: list[Batch] | BaseException | None = None  # looked at, not yet handed out
        self._permits = threading.Semaphore(1)  # steps that may be read; one more when a step begins
        self._closed = False
        self._thread: threading.Thread | None = None
        self._batches: Iterator[Batch] = iter(())

    def __iter__(self) -> Iterator[Batch]:
        """One iteration, however often it is asked for (Lightning asks several times before the first micro-batch).

        The batch that ends a step carries the state after the step, those before it the one before.
        """
        if self._thread is not None:
            return self._batches
        source, first = self._start()
        self._thread = threading.Thread(target=self._read_steps, args=(source, first), name="packs", daemon=True)
        self._thread.start()  # at once, not at the first `next`: a later pipeline stage asks only when fed by this one
        self._batches = self._hand_out()
        return self._batches

    def _hand_out(self) -> Iterator[Batch]:
        try:
            for _ in range(self.steps):
                batches = self._look_ahead()
                self._next = None
                if isinstance(batches, BaseException):
                    self._closed = True
                    raise batches
                self._permits.release()
                yield from batches
        finally:
            self.close()

    def _look_ahead(self) -> list[Batch] | BaseException:
        if self._next is None:
            self._next = self._ready.get()
        return self._next

    def upcoming(self) -> int:
        """Micro-batches that this rank has in the step that begins now."""
        iter(self)
        batches = self._look_ahead()
        return 1 if isinstance(batches, BaseException) else len(batches)

    def close(self) -> None:
        """Let the thread end. It may be in a collective that others still join, so it is not waited for long."""
        self._closed = True
        self._permits.release()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def _start(self) -> tuple[Any, Batch | BaseException | None]:
        """The readers' first micro-batch, taken here: decoding processes must not be forked off beside a thread."""
        if self.stream is None:
            return None, None
        self._state = self.stream.state()
        source = iter(self.stream)
        try:
            return source, next(source)
        except Exception as error:  # noqa: BLE001 - raised again where the others hear of it
            return source, error

    def _read_steps(self, source: Any, first: Batch | BaseException | None) -> None:
        try:
            for step in range(self.steps):
                self._permits.acquire()
                if self._closed:
                    break
                self.micro_batches = self.count(step)
                self._ready.put(self._step(source, first if step == 0 else None))
        except BaseException as error:  # noqa: BLE001 - it is the training thread's to raise
            self._ready.put(error)
        finally:
            if source is not None:
                source.close()

    def _step(self, source: Any, first: Batch | BaseException | None) -> list[Batch]:
        """One step's micro-batches of this rank; a collective of all ranks."""
        groups = self.groups
        batches: list[Batch] = []
        failure: BaseException | None = None
        if groups.is_reader:
            try:
                start, self.collecting = time.perf_counter(), True
                batches = self._collect(source, first)
                self.reading = time.perf_counter() - start
            except Exception as error:  # noqa: BLE001 - the other ranks must hear of it
                failure = error
            finally:
                self.collecting = False
        agree(failure, groups.everyone, list(range(dist.get_world_size())))
        if groups.is_reader and self.cost is not None and self.micro_batches > 1:
            batches = self._balance(batches)
        if groups.is_reader:
            after = self.stream.state()
            for number, batch in enumerate(batches):
                batch.state = after if number == self.micro_batches - 1 else self._state
            self._state = after
        if len(groups.member_ranks) > 1:
            batches = self._broadcast(batches)
        return batches if self.dynamic is None else self._assign(self.dynamic, batches)

    def _assign(self, dynamic: DynamicContext, batches: list[Batch]) -> list[Batch]:
        """This rank's part of the replica's micro-batches, as its reader assigns them."""
        plan = [astuple(each) for each in dynamic.plan(batches)] if self.groups.is_reader else None
        shipped: Any = _head(plan, self._ship) if len(self.groups.member_ranks) > 1 else plan
        return dynamic.take(batches, [Assignment(*each) for each in shipped])

    def _collect(self, source: Any, first: Batch | BaseException | None) -> list[Batch]:
        if isinstance(first, BaseException):
            raise first
        batches = [] if first is None else [first]
        while len(batches) < self.micro_batches:
            batches.append(next(source))
        return batches

    def _balance(self, batches: list[Batch]) -> list[Batch]:
        """Swap some of the step's micro-batches among the readers, so that all have equal work."""
        groups, me = self.groups, self.groups.dp_rank
        assert self.cost is not None
        own = torch.tensor([self.cost.of(batch) for batch in batches], dtype=torch.int64)
        table = [torch.empty_like(own) for _ in groups.reader_ranks]
        dist.all_gather(table, own, group=groups.readers)
        place = balance(torch.stack(table).numpy())
        givers = [divmod(number, self.micro_batches) for number in place[me].tolist()]
        result = [batches[index] if giver == me else None for giver, index in givers]
        for taker in range(len(place)):  # in the same order everywhere, so sender and taker always meet
            for index, number in enumerate(place[taker].tolist()):
                giver = number // self.micro_batches
                if giver == taker or me not in (giver, taker):
                    continue
                if me == giver:
                    to = partial(dist.send, dst=groups.reader_ranks[taker], group=groups.readers)
                    send(batches[number % self.micro_batches], to)
                else:
                    result[index] = receive(partial(dist.recv, src=groups.reader_ranks[giver], group=groups.readers))
        return [batch for batch in result if batch is not None]

    def _broadcast(self, batches: list[Batch]) -> list[Batch]:
        if not self.groups.is_reader:
            return [receive(self._ship) for _ in range(self.micro_batches)]
        for batch in batches:
            send(batch, self._ship)
        return batches

    def _ship(self, tensor: torch.Tensor) -> None:
        dist.broadcast(tensor, self.groups.reader, group=self.groups.members)


def agree(failure: BaseException | None, group: Any, ranks: list[int]) -> None:
    """All ranks of the group continue, or all raise the failure of the first rank that has one.

    Raises:
        DataError: the first failure is a `DataError` (something a user can fix).
        RuntimeError: it is any other failure.
    """
    failed = torch.tensor([failure is not None], dtype=torch.int64)
    found = [torch.empty_like(failed) for _ in ranks]
    dist.all_gather(found, failed, group=group)
    first = next((i for i, flag in enumerate(found) if int(flag)), None)
    if first is None:
        return
    text: dict[str, Any] = {}
    if failure is not None:
        usual = isinstance(failure, (UserError, OSError))
        text = {"message": str(failure) if usual else f"{type(failure).__name__}: {failure}", "usual": usual}

    def ship(tensor: torch.Tensor) -> None:
        dist.broadcast(tensor, ranks[first], group=group)

    report = _head(text, ship) if dist.get_rank() == ranks[first] else _head(None, ship)
    if report["usual"]:
        raise DataError(report["message"]) from failure
    raise RuntimeError(f"the data loader of rank {ranks[first]} failed: {report['message']}") from failure


def send(batch: Batch, ship: Ship) -> None:
    """Ship a batch; `receive` with the other side's call gives an equal one."""
    arrays = [np.ascontiguousarray(getattr(batch, name)) for name in ARRAYS]
    words = {name: getattr(batch, name) for name in WORDS}
    _head({"arrays": [[a.dtype.str, a.shape] for a in arrays], **words}, ship)
    for array in arrays:
        if array.nbytes:
            ship(torch.from_numpy(array.reshape(-1).view(np.uint8)))


def receive(ship: Ship) -> Batch:
    """The batch that the other side sends."""
    head = _head(None, ship)
    values: dict[str, Any] = {}
    for name, (dtype, shape) in zip(ARRAYS, head["arrays"], strict=True):
        array = np.empty(shape, np.dtype(dtype))
        if array.nbytes:
            ship(torch.from_numpy(array.reshape(-1).view(np.uint8)))
        values[name] = array
    return Batch(**values, **{name: head[name] for name in WORDS})


def _head(value: Any, ship: Ship) -> Any:
    """Ship a JSON value, or receive one if `value` is None."""
    data = b"" if value is None else json.dumps(value).encode()
    size = torch.tensor([len(data)], dtype=torch.int64)
    ship(size)
    text = torch.from_numpy(np.frombuffer(data, np.uint8).copy() if data else np.empty(int(size), np.uint8))
    ship(text)
    return json.loads(text.numpy().tobytes()) if value is None else value
