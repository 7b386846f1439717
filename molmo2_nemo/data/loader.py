"""The stream of batches of one data-parallel rank: read, build, pack, collate, and resume to the bit.

Example n of the global stream belongs to data-parallel rank n % dp_size. Worker processes only read and build examples;
packing happens in the consuming process, in stream order, so the batches are the same for any number of workers. What
has to be saved is therefore small: how far the rank has read, and the numbers of the examples that wait in the packer.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
from collections import Counter, deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from molmo2_nemo.data.collate import check_example, collate
from molmo2_nemo.data.config import DataConfig, PackingConfig
from molmo2_nemo.data.example import Batch, Example
from molmo2_nemo.data.manifest import ShardError
from molmo2_nemo.data.mixture import Mixture, example_rng, normalised_rates
from molmo2_nemo.data.packing import Item, Packer
from molmo2_nemo.data.phases import phase_at, phase_problems, phases
from molmo2_nemo.data.record import BadRecord, Record, parse_record
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.data.states import STATE_VERSION, check_identity, merge_states, unread
from molmo2_nemo.errors import DataError
from molmo2_nemo.processes import die_with_parent

SHARE_AFTER = 1000  # records read before max_bad_share applies: a share of few records is noise
QUARANTINE_KEPT = 1000  # skipped records remembered in memory
# Of `Example.info`; `ignored` and `truncated` count images.
COUNTED = ("branches_dropped", "tokens_cut", "ignored", "truncated", "replaced_frames")


class Builder(Protocol):
    """The part of `ExampleBuilder` (data/build.py) that the loader uses."""

    def build(
        self,
        record: Record,
        rng: np.random.Generator,
        *,
        weight: float | None = None,
        p_high_res: float | None = None,
        max_tokens: int | None = None,
    ) -> Example: ...


class TooManyBadRecords(DataError):
    """So many records cannot be used that the run stops."""


@dataclass(slots=True)
class Skipped:
    """A record that could not be used; stands in the stream in place of its example."""

    key: str
    cause: str
    detail: str


class ExampleReader:
    """Map-style data set: number in the global stream -> `Example` or `Skipped`. Runs in workers."""

    def __init__(self, config: DataConfig, builder: Builder, im_patch_id: int):
        self.config, self.builder, self.im_patch_id = config, builder, im_patch_id
        rates = normalised_rates(config.sources, config.groups, config.missing)
        self.datasets = {name: ShardDataset(config.sources[name].path, name, config.limits) for name in rates}
        self.mixture = Mixture(config.seed, rates, {name: len(d) for name, d in self.datasets.items()})
        self.rates = rates

    def identity(self) -> dict[str, Any]:
        """What determines the order of the stream; a saved state is valid only where this is equal."""
        return {
            "seed": self.config.seed,
            "sources": {
                n: [self.datasets[n].fingerprint, len(self.datasets[n]), rate] for n, rate in self.rates.items()
            },
        }

    def without_crc(self) -> list[str]:
        """One line for each data set whose records cannot all be told from damaged ones."""
        counts = {name: dataset.without_crc() for name, dataset in self.datasets.items()}
        return [
            f"data set {name}: {count:,} of {len(self.datasets[name]):,} records have no checksum in the manifest; "
            "damaged bytes in them may be trained on unnoticed. molmo2 shards index writes checksums"
            for name, count in counts.items()
            if count
        ]

    def __getitem__(self, n: int) -> Example | Skipped:
        """The n-th example of the stream. A record that cannot be used gives `Skipped`.

        Raises:
            ShardError: the shard itself cannot be read.
        """
        draw = self.mixture.draw(n)
        dataset = self.datasets[draw.source]
        key = f"{draw.source}[{draw.index}]"
        source = self.config.sources[draw.source]
        packing = self.config.packing
        try:
            key, members = dataset.read(draw.index)
            record = parse_record(key, members, max_json_bytes=self.config.limits.json_bytes)
            example = self.builder.build(
                record,
                example_rng(self.config.seed, draw),
                weight=source.weight,
                p_high_res=source.p_high_res,
                max_tokens=packing.sequence_length,
            )
            example.key, example.source = key, draw.source
            check_example(example, self.im_patch_id)
            self._check_size(example)
            return example
        except ShardError:
            raise
        except BadRecord as error:
            return Skipped(error.key or key, error.cause, error.detail)
        except Exception as error:  # hostile media may raise anything; a bug of this package shows as many in a row
            return Skipped(key, type(error).__name__, str(error)[:500])

    def _check_size(self, example: Example) -> None:
        packing = self.config.packing
        if example.num_tokens > packing.sequence_length or example.num_crops > packing.max_crops:
            raise BadRecord(
                example.key,
                "too long",
                f"{example.num_tokens} tokens and {example.num_crops} crops; a pack holds "
                f"{packing.sequence_length} and {packing.max_crops}",
            )
        if not (example.loss_weights > 0).any():
            raise BadRecord(example.key, "no loss", "no token of it has a loss weight above 0")


class PackStream:
    """Infinite iterable over `Batch` for one data-parallel rank.

    Args:
        config: data settings; `sources` name folders of shards with a manifest.
        micro_batch_size: packs per batch.
        dp_rank, dp_size: this data-parallel rank, and the number of data-parallel ranks. All ranks of one tensor-,
            pipeline- or context-parallel group pass the same and get the same batches.
        batches_per_step: batches of this rank in an optimizer step; `data.progression` counts steps.
        builder, im_patch_id: default to `ExampleBuilder` with the configured tokenizer.
    Raises:
        DataError: a source without usable shards, invalid rates or budgets; raised before the first batch.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        batches_per_step: int = 1,
        builder: Builder | None = None,
        im_patch_id: int | None = None,
    ):
        if micro_batch_size < 1 or not 0 <= dp_rank < dp_size:
            raise DataError(f"micro batch of {micro_batch_size} packs, rank {dp_rank} of {dp_size}: out of range")
        for problem in phase_problems(config):
            raise DataError(problem)
        self.config = config
        self.micro_batch_size, self.dp_rank, self.dp_size = micro_batch_size, dp_rank, dp_size
        self.batches_per_step = batches_per_step
        self.readers = [
            ExampleReader(
                phase, *((builder, im_patch_id) if builder and im_patch_id is not None else default_builder(phase))
            )
            for phase in phases(config)
        ]
        self._batches = 0  # batches yielded since the start of the stage
        self._built_in: dict[int, int] = {}  # the phase in which each waiting example was built
        self.skipped: Counter[str] = Counter()  # cause -> records skipped since the start of the run
        self.quarantined: deque[Skipped] = deque(maxlen=QUARANTINE_KEPT)
        self.counts: Counter[str] = Counter()  # examples read, and what did not fit: see COUNTED
        self.packer = new_packer(self.reader.config.packing)
        self._position = dp_rank  # next number of the stream this rank reads
        self._backlog: list[int] = []  # numbers to read before that (after a change of dp_size)
        self._bad_in_a_row = 0
        self._restore: dict[str, Any] | None = None
        self.numbers: list[int] = []  # stream numbers of the examples in the last batch

    @property
    def phase(self) -> int:
        """Number of the phase of the batch that comes next."""
        return phase_at(self.config, self._batches // self.batches_per_step)

    @property
    def reader(self) -> ExampleReader:
        """The reader of the phase that the next batch belongs to."""
        return self.readers[self.phase]

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position of the stream on; only one iterator may be active at a time."""
        while True:
            yield from self._one_phase(self.reader)

    def _one_phase(self, reader: ExampleReader) -> Iterator[Batch]:
        """Batches until the next phase begins; that phase rebuilds the examples that workers had built ahead."""
        source = _examples(reader, self._numbers_ahead(), self.config.num_workers, self.config.prefetch)
        try:
            self._new_packer(reader.config.packing)
            self._fill_packer()
            packs: list[list[Example]] = []
            numbers: list[int] = []
            for n, result in source:
                pack = self._take(n, result)
                if pack is None:
                    continue
                packs.append([item.payload for item in pack])
                numbers += [item.id for item in pack]
                if len(packs) == self.micro_batch_size:
                    length = reader.config.packing.sequence_length
                    batch = collate(packs, sequence_length=length, im_patch_id=reader.im_patch_id)
                    self._batches += 1
                    batch.state = self.state()
                    self.numbers = numbers
                    yield batch
                    packs, numbers = [], []
                    if self.reader is not reader:
                        return
        finally:
            source.close()

    def state(self) -> dict[str, Any]:
        """The position of the stream as JSON values, for `load_states`; every batch carries it too."""
        return {
            "version": STATE_VERSION,
            "identity": self.reader.identity(),
            "dp_rank": self.dp_rank,
            "dp_size": self.dp_size,
            "position": self._position,
            "backlog": list(self._backlog),
            "packer": self._packer_state() if self._restore is None else self._restore,
            "steps": self._batches // self.batches_per_step,
            "skipped": dict(sorted(self.skipped.items())),
            "counts": dict(sorted(self.counts.items())),
            "bad_in_a_row": self._bad_in_a_row,
        }

    def load_states(self, states: list[dict[str, Any]]) -> None:
        """Continue the stream of a saved run. Call before iterating.

        Args:
            states: the state after the last batch used, of every data-parallel rank of the saved run, in any order;
                duplicates (from the ranks of one context-parallel group) are fine.
        Raises:
            DataError: a rank is missing, states disagree, or the data are not those of the saved run.
        """
        by_rank = merge_states(states)
        size = len(by_rank)
        check_identity(by_rank[0]["identity"], json.loads(json.dumps(self.reader.identity())))
        if size == self.dp_size and not any(state.get("ahead") for state in by_rank):
            own = by_rank[self.dp_rank]
            self._position = own["position"]
            self._backlog = list(own["backlog"])
            self.skipped, self.counts = Counter(own["skipped"]), Counter(own["counts"])
            self._bad_in_a_row = own["bad_in_a_row"]
            self._restore = own["packer"]
            self._batches = own["steps"] * self.batches_per_step
            return
        left, start = unread(by_rank)
        self._backlog = left[self.dp_rank :: self.dp_size]
        self._position = start + (self.dp_rank - start) % self.dp_size
        self.skipped, self.counts = Counter(), Counter()
        if self.dp_rank == 0:  # one rank takes over the counts of the whole run
            for state in by_rank:
                self.skipped.update(state["skipped"])
                self.counts.update(state["counts"])
                used = state.get("ahead", {}).get("used", ())  # waiting examples are counted when they are reread
                self.counts["examples"] += len(used) - len(state["packer"]["waiting"])
        self._bad_in_a_row = 0
        self._batches = by_rank[0]["steps"] * self.batches_per_step
        self._restore = None
        self.packer = new_packer(self.reader.config.packing)
        self._built_in = {}

    def _new_packer(self, packing: PackingConfig) -> None:
        """Start a packer with a phase's budgets that takes over the waiting examples."""
        before, self.packer = self.packer, new_packer(packing)
        self.packer.emitted, self.packer.waiting = before.emitted, before.waiting

    def _packer_state(self) -> dict[str, Any]:
        state = self.packer.state()
        if len(self.readers) > 1:
            state["phases"] = [self._built_in[item.id] for item in self.packer.waiting]
        return state

    def _numbers_ahead(self) -> Iterator[int]:
        """Stream numbers from the current position on. Workers run ahead along them; the saved state does not."""
        yield from list(self._backlog)
        n = self._position
        while True:
            yield n
            n += self.dp_size

    def _take(self, n: int, result: Example | Skipped) -> list[Item] | None:
        if self._backlog:
            expected = self._backlog.pop(0)
        else:
            expected, self._position = self._position, self._position + self.dp_size
        assert n == expected, "examples arrive in the order they were requested"
        if isinstance(result, Skipped):
            self._skip(result)
            return None
        self._bad_in_a_row = 0
        self.counts["examples"] += 1
        for name in COUNTED:
            if result.info.get(name):
                self.counts[name] += int(result.info[name])
        self._built_in[n] = self.phase
        pack = self.packer.add(Item(n, result.num_tokens, result.num_crops, result))
        for item in pack or ():
            del self._built_in[item.id]
        return pack

    def _skip(self, bad: Skipped) -> None:
        self.skipped[bad.cause] += 1
        self.quarantined.append(bad)
        if self.config.quarantine:
            line = {"record": bad.key, "cause": bad.cause, "detail": bad.detail}
            os.makedirs(os.path.dirname(self.config.quarantine) or ".", exist_ok=True)
            with open(self.config.quarantine, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self._bad_in_a_row += 1
        skipped = sum(self.skipped.values())
        read = skipped + self.counts["examples"]
        if self._bad_in_a_row >= self.config.max_bad_in_a_row:
            found, setting = f"{self._bad_in_a_row} records in a row", "max_bad_in_a_row"
        elif read >= SHARE_AFTER and skipped > self.config.max_bad_share * read:
            found, setting = f"{skipped} of {read} records ({skipped / read:.0%})", "max_bad_share"
        else:
            return
        causes = ", ".join(f"{cause}: {count}" for cause, count in self.skipped.most_common(5))
        raise TooManyBadRecords(
            f"{found} could not be used; the last: record {bad.key}: {bad.detail}. "
            f"Skipped so far: {causes}. Repair the data or raise data.{setting}."
        )

    def _fill_packer(self) -> None:
        """Rebuild the examples that waited in the packer when the state was saved."""
        if self._restore is None:
            return
        saved, self._restore = self._restore, None
        numbers = [int(number) for number, _ in saved["waiting"]]
        self._built_in = dict(zip(numbers, saved.get("phases", [0] * len(numbers)), strict=True))
        examples: dict[int, Example | Skipped] = {}
        for phase, reader in enumerate(self.readers):
            own = [n for n in numbers if self._built_in[n] == phase]
            examples |= dict(_examples(reader, iter(own), self.config.num_workers, self.config.prefetch)) if own else {}

        def rebuild(n: int) -> Item:
            example = examples[n]
            if isinstance(example, Skipped):
                raise DataError(
                    f"record {example.key} was read before the restart and cannot be read now ({example.detail}); "
                    "the data or their settings changed since the checkpoint"
                )
            return Item(n, example.num_tokens, example.num_crops, example)

        self.packer.restore(saved, rebuild)


def new_packer(packing: PackingConfig) -> Packer:
    return Packer(
        packing.sequence_length,
        packing.max_crops,
        buffer_size=packing.buffer_size,
        crop_value=packing.crop_value,
        mode=packing.mode,
        max_wait=packing.max_wait,
    )


def default_builder(config: DataConfig) -> tuple[Builder, int]:
    """`ExampleBuilder` with the configured tokenizer, and the id of <im_patch>."""
    from molmo2_nemo.data.build import ExampleBuilder
    from molmo2_nemo.data.tokenizer import Molmo2Tokenizer

    tokenizer = Molmo2Tokenizer.load(config.tokenizer, vocab_size=config.vocab_size)
    return ExampleBuilder(config, tokenizer), tokenizer.special.im_patch


def _examples(
    reader: ExampleReader, numbers: Iterator[int], num_workers: int, prefetch: int
) -> Generator[tuple[int, Example | Skipped], None, None]:
    """(n, result) in the order of `numbers`; workers, if any, run `num_workers * prefetch` examples ahead."""
    if num_workers == 0:
        for n in numbers:
            yield n, reader[n]
        return
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        _Shipped(reader),  # type: ignore[arg-type]
        sampler=numbers,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch,
        collate_fn=_same,
        worker_init_fn=_start_worker,
    )
    with _inherited_whole():
        iterator = iter(loader)
    try:
        for n, shipped in iterator:
            yield n, _unship(shipped)
    finally:
        iterator._shutdown_workers()  # a generator that is closed must not leave processes behind


class _Shipped:
    """The reader as workers run it: crops are returned as tensors, which travel through shared memory."""

    def __init__(self, reader: ExampleReader):
        self.reader = reader

    def __getitem__(self, n: int) -> tuple[int, Any]:
        import torch

        try:
            result = self.reader[n]
        except ShardError as error:
            return n, error
        if isinstance(result, Skipped):
            return n, result
        values = {f.name: getattr(result, f.name) for f in fields(result)}
        values["crops"] = torch.from_numpy(np.ascontiguousarray(result.crops))
        return n, values


def _unship(shipped: Any) -> Example | Skipped:
    if isinstance(shipped, ShardError):
        raise shipped
    if isinstance(shipped, Skipped):
        return shipped
    return Example(**{**shipped, "crops": shipped["crops"].numpy()})


@contextmanager
def _inherited_whole() -> Iterator[None]:
    """What processes that are forked off here inherit is not theirs to take apart: a process group without owner that
    one of them collected as garbage would end it with SIGABRT, or let it wait forever, because the threads of that
    group are not in it. So their collector is off until `_start_worker` has hidden what they inherit from it."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _start_worker(worker: int) -> None:
    """Make a worker outlive SIGTERM, but not the process that reads from it.

    Launchers send SIGTERM to a whole process group. The trainer then finishes its step and saves, and needs its workers
    until it closes the loader itself. If it is killed, torch's own check does not always end them: a worker
    that waits for room in the queue it shares with the others would wait forever.

    When it ends, the thread that sends its crops may still be in the middle of one. Where processes are spawned, Python
    would then take itself apart beneath that thread, which ends in SIGABRT, so the worker leaves without that.
    """
    gc.freeze()
    gc.enable()
    atexit.register(os._exit, 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent()


def _same(value: Any) -> Any:
    return value
