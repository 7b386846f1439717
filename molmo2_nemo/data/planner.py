"""Which examples share a pack, decided from their sizes alone: the stream without its pixels.

Planning runs ahead of the batches that are used, so it has a place of its own in the stream; every planned batch
carries a copy of the place after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from molmo2_nemo.data.config import DataConfig, PackingConfig
from molmo2_nemo.data.example import Example
from molmo2_nemo.data.packing import Item, Packer
from molmo2_nemo.data.phases import phase_at
from molmo2_nemo.data.pieces import Numbered, record_of, rest
from molmo2_nemo.data.reader import ExampleReader, PassedOver, Skipped
from molmo2_nemo.data.tally import EXAMPLES, PASSED_OVER, SKIPPED, Seen, Tally, counted
from molmo2_nemo.data.workers import PackTask, PlanTasks, in_order, planners
from molmo2_nemo.errors import DataError, plural

PASSED_AT_LEAST = 10_000  # examples passed over in a row before a run gives up
SHARE_AFTER = 1000  # records read before max_bad_share applies: a share of few records is noise


class TooManyBadRecords(DataError):
    """So many records cannot be used that the run stops."""


@dataclass(slots=True)
class Place:
    """How far a rank has read and packed."""

    position: int  # next number of the stream this rank reads
    batches: int = 0  # since the start of the stage
    backlog: list[int] = field(default_factory=list)  # numbers to read before that (after a change of dp_size)
    emitted: int = 0  # packs
    waiting: list[Item] = field(default_factory=list)  # examples in the packer, oldest first
    built_in: dict[int, int] = field(default_factory=dict)  # number -> the phase in which it was built
    tally: Tally = field(default_factory=Tally)  # of what was read since the start of the run
    bad_in_a_row: int = 0
    restore: dict[str, Any] | None = None  # a saved packer's state, as long as its examples have not been planned again

    def copy(self) -> Place:
        return Place(
            self.position,
            self.batches,
            list(self.backlog),
            self.emitted,
            list(self.waiting),
            dict(self.built_in),
            self.tally.copy(),
            self.bad_in_a_row,
            self.restore,
        )

    def packer_state(self, phases: bool) -> dict[str, Any]:
        """What `Packer.state` says, with the phases of its examples if there are several."""
        if self.restore is not None:
            return self.restore
        state: dict[str, Any] = {
            "emitted": self.emitted,
            "waiting": [[item.id, item.arrived] for item in self.waiting],
            "counted": [list(seen(item)[1:]) for item in self.waiting],
        }
        if phases:
            state["phases"] = [self.built_in[item.id] for item in self.waiting]
        return state


@dataclass(slots=True)
class PlannedBatch:
    """The examples of a batch, without crops."""

    packs: list[list[Item]]  # of a micro-batch; the payloads are examples
    phases: list[list[int]]  # of each example
    phase: int
    skipped: list[Skipped]  # records that could not be used, read since the batch before
    place: Place  # after it

    def numbers(self) -> list[int]:
        """Stream numbers of its examples."""
        return [item.id for pack in self.packs for item in pack]

    def tasks(self, before: int = 0) -> Iterator[PackTask]:
        """Of its packs. `before`: bytes of the crops of all packs before them."""
        for pack, phases in zip(self.packs, self.phases, strict=True):
            examples: list[Example] = [item.payload for item in pack]
            task = PackTask(
                tuple(
                    (item.id, phase, item.payload.info.get("images"), item.crops)
                    for item, phase in zip(pack, phases, strict=True)
                ),
                examples[0].crops.shape[1:],  # type: ignore[arg-type]
                before,
            )
            before += task.bytes
            yield task


class PackPlanner:
    """Plans batches from a place on, without end.

    Args:
        place: the planner's own; it moves on with the plan.
    """

    def __init__(
        self,
        config: DataConfig,
        readers: list[ExampleReader],
        place: Place,
        *,
        micro_batch_size: int,
        dp_size: int,
        batches_per_step: int,
    ):
        self.config, self.readers, self.place = config, readers, place
        self.micro_batch_size, self.dp_size, self.batches_per_step = micro_batch_size, dp_size, batches_per_step
        self.packer = new_packer(config.packing)
        self.skipped: list[Skipped] = []  # since the last batch
        self.passed = 0  # examples passed over in a row

    @property
    def phase(self) -> int:
        """Number of the phase of the batch that comes next."""
        return phase_at(self.config, self.place.batches // self.batches_per_step)

    def __iter__(self) -> Iterator[PlannedBatch]:
        """
        Raises:
            ShardError: a shard cannot be read.
            TooManyBadRecords: `skipped` has those since the last batch.
        """
        while True:
            yield from self._one_phase(self.phase)

    def _one_phase(self, phase: int) -> Iterator[PlannedBatch]:
        """Batches until the next phase begins; that phase plans anew what this one had planned ahead."""
        source = self._planned(phase, self._numbers_ahead())
        packs: list[list[Item]] = []
        phases: list[list[int]] = []
        try:
            self._open_packer(phase)
            for n, result in source:
                for pack in self._take(n, result):
                    packs.append(pack)
                    phases.append([self.place.built_in.pop(item.id) for item in pack])
                    if len(packs) < self.micro_batch_size:
                        continue
                    self.place.batches += 1
                    self.place.emitted, self.place.waiting = self.packer.emitted, list(self.packer.waiting)
                    yield PlannedBatch(packs, phases, phase, self.skipped, self.place.copy())
                    packs, phases, self.skipped = [], [], []
                    if self.phase != phase:
                        return
        finally:
            source.close()

    def _planned(self, phase: int, numbers: Iterator[int]) -> Any:
        config = self.config
        return in_order(PlanTasks(self.readers[phase]), numbers, planners(config.num_workers), config.prefetch)

    def _open_packer(self, phase: int) -> None:
        """Start a packer with a phase's budgets that takes over the waiting examples."""
        self.packer = new_packer(self.readers[phase].config.packing)
        if self.place.restore is None:
            self.packer.emitted, self.packer.waiting = self.place.emitted, list(self.place.waiting)
        else:
            self._refill(self.place.restore)

    def _numbers_ahead(self) -> Iterator[int]:
        """Stream numbers from the current position on. Workers run ahead along them; the place does not."""
        yield from list(self.place.backlog)
        n = self.place.position
        while True:
            yield n
            n += self.dp_size

    def _take(self, n: int, result: list[Numbered] | Skipped) -> Iterator[list[Item]]:
        """The packs that are due with the n-th example, or with the pieces of a document. When a pack leaves, the
        place says which pieces have not been taken yet."""
        self._arrived(n)
        if isinstance(result, PassedOver):
            self._pass_over(n, result)
            return
        self.passed = 0
        if isinstance(result, Skipped):
            self._skip(n, result)
            return
        place = self.place
        place.bad_in_a_row = 0
        for i, (number, example) in enumerate(result):
            if i:
                place.backlog.pop(0)
            if later := result[i + 1 :]:
                place.backlog.insert(0, rest(later))
            item = Item(number, example.num_tokens, example.num_crops, example)
            place.tally.read(seen(item))
            place.built_in[number] = self.phase
            pack = self.packer.add(item)
            if pack is not None:
                yield pack

    def _pass_over(self, n: int, result: PassedOver) -> None:
        if result.cause == PASSED_OVER:
            self.place.tally.add(result.source, PASSED_OVER, 1, (record_of(n), result.key))
        self.passed += 1
        if self.passed > max(PASSED_AT_LEAST, 2 * sum(len(data) for data in self.readers[0].datasets.values())):
            raise DataError(
                f"none of {self.passed:,} examples in a row can be used in packs of {self.readers[0].length} tokens: "
                "leave that length out of data.lengths, or raise rates in length_rates"
            )

    def _arrived(self, n: int) -> None:
        """The place is then behind the n-th example."""
        place = self.place
        if place.backlog:
            expected = place.backlog.pop(0)
        else:
            expected, place.position = place.position, place.position + self.dp_size
        assert n == expected, "examples arrive in the order they were requested"

    def _skip(self, n: int, bad: Skipped) -> None:
        self.place.tally.add(bad.source, SKIPPED + bad.cause, 1, (record_of(n), bad.key))
        self.place.bad_in_a_row += 1
        self.skipped.append(bad)
        check_bad(self.config, bad, self.place.bad_in_a_row, self.place.tally)

    def _refill(self, saved: dict[str, Any]) -> None:
        """Plan the examples again that waited in the packer when the state was saved."""
        numbers = [int(number) for number, _ in saved["waiting"]]
        built_in = dict(zip(numbers, saved.get("phases", [0] * len(numbers)), strict=True))
        examples: dict[int, list[Numbered] | Skipped] = {}
        for phase in range(len(self.readers)):
            own = [n for n in numbers if built_in[n] == phase]
            examples |= dict(self._planned(phase, iter(own))) if own else {}

        def rebuild(n: int) -> Item:
            found = examples[n]
            if isinstance(found, Skipped):
                raise DataError(
                    f"record {found.key} was read before the restart and cannot be read now ({found.detail}); "
                    "the data or their settings changed since the checkpoint"
                )
            example = found[0][1]
            if len(found) > 1:
                raise DataError(
                    f"a piece of the document {example.key} waited when the checkpoint was written, and is longer than "
                    f"a pack now; data.packing.sequence_length must not become smaller"
                )
            return Item(n, example.num_tokens, example.num_crops, example)

        self.packer.restore(saved, rebuild)
        self.place.restore, self.place.built_in = None, built_in


def seen(item: Item) -> Seen:
    """What is counted for an example that is planned, and not decoded yet."""
    example: Example = item.payload
    return Seen(item.id, example.key, example.source, counted(example.info))


def check_bad(config: DataConfig, last: Skipped, in_a_row: int, tally: Tally) -> None:
    """
    Raises:
        TooManyBadRecords: more records cannot be used than the settings allow.
    """
    skipped = tally.skipped()
    bad = sum(skipped.values())
    read = bad + tally.totals()[EXAMPLES]
    if in_a_row >= config.max_bad_in_a_row:
        found, setting = f"{plural(in_a_row, 'record')} in a row", "max_bad_in_a_row"
    elif read >= SHARE_AFTER and bad > config.max_bad_share * read:
        found, setting = f"{bad} of {read} records ({bad / read:.0%})", "max_bad_share"
    else:
        return
    causes = ", ".join(f"{cause}: {count}" for cause, count in skipped.most_common(5))
    raise TooManyBadRecords(
        f"{found} could not be used; the last: record {last.key}: {last.detail}. "
        f"Skipped so far: {causes}. Repair the data or raise data.{setting}."
    )


def new_packer(packing: PackingConfig) -> Packer:
    return Packer(
        packing.sequence_length,
        packing.max_crops,
        buffer_size=packing.buffer_size,
        crop_value=packing.crop_value,
        mode=packing.mode,
        max_wait=packing.max_wait,
    )
