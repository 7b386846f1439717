"""The stream of batches of one data-parallel rank: plan, pack, decode, collate, and resume to the bit.

Example n of the global stream belongs to data-parallel rank n % dp_size. An example's size follows from its texts and
the headers of its media, so packs are decided before anything is decoded (planner.py), in the consuming process and in
stream order. Worker processes plan examples, and decode the crops of packs ahead of their turn; the batches are the
same for any number of workers. What has to be saved is small: how far the rank has read, and the numbers of the
examples that wait in the packer.

Examples that wait hold no pixels, and no encoded media either: the record is read a second time when its pack is
decoded. Media would be tens of megabytes for a film, and the second reading comes from the page cache as a rule.
"""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np

from molmo2_nemo.data.collate import collate
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.example import Batch, Example
from molmo2_nemo.data.joining import join_documents
from molmo2_nemo.data.phases import phase_at, phase_problems, phases
from molmo2_nemo.data.pieces import record_of
from molmo2_nemo.data.planner import PackPlanner, Place, PlannedBatch, check_bad, seen
from molmo2_nemo.data.reader import Builder, ExampleReader, Skipped, default_builder
from molmo2_nemo.data.states import STATE_VERSION, check_identity, merge_states, unread
from molmo2_nemo.data.tally import SKIPPED, Seen, Tally, counted, waiting_unused
from molmo2_nemo.data.workers import (
    MIB,
    DecodeTasks,
    PackPixels,
    PackTask,
    Room,
    array_of,
    in_order,
    packs_ahead,
)
from molmo2_nemo.errors import DataError

Mark = tuple[Place, Tally, int]
QUARANTINE_KEPT = 1000  # skipped records remembered in memory


class PackStream:
    """Infinite iterable over `Batch` for one data-parallel rank.

    A record whose media turn out to be damaged only when its pack is decoded leaves its place in the pack empty: the
    pack is as if that example were cut out of it, and all others are where they were. It counts as skipped, and under
    `places_left_empty`.

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
        self.place = Place(dp_rank)  # after the last batch
        self._late, self._late_in_a_row = Tally(), 0  # found while decoding, beside what the place counts
        self.quarantined: deque[Skipped] = deque(maxlen=QUARANTINE_KEPT)
        self.seen: list[Seen] = []  # the examples of the last batch as planned, damaged ones included
        self.found_late = Tally()  # what decoding them has found
        self.examples: list[list[Example]] = []  # of its packs, without crops: for those who want to see `info`

    @property
    def phase(self) -> int:
        """Number of the phase of the batch that comes next."""
        return phase_at(self.config, self.place.batches // self.batches_per_step)

    @property
    def reader(self) -> ExampleReader:
        """The reader of the phase that the next batch belongs to."""
        return self.readers[self.phase]

    @property
    def skipped(self) -> Counter[str]:
        """Cause -> records skipped since the start of the run."""
        return self.tally.skipped()

    @property
    def counts(self) -> Counter[str]:
        """Examples read, and how much was counted of each of `KINDS` (tally.py)."""
        return self.tally.counts()

    @property
    def tally(self) -> Tally:
        """Both, for each data set."""
        tally = self.place.tally.copy()
        tally.update(self._late)
        return tally

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position of the stream on; only one iterator may be active at a time."""
        return self.batches(lambda planned: planned)

    def batches(self, arrange: Callable[[Iterator[PlannedBatch]], Iterator[PlannedBatch]]) -> Iterator[Batch]:
        """The same in another order, in which they are decoded. Each batch puts the stream to its own place."""
        planner = PackPlanner(
            self.config,
            self.readers,
            self.place.copy(),
            micro_batch_size=self.micro_batch_size,
            dp_size=self.dp_size,
            batches_per_step=self.batches_per_step,
        )
        planned: deque[PlannedBatch] = deque()
        asked: deque[PackTask] = deque()
        failed: list[Exception] = []
        tasks = _tasks(arrange(iter(planner)), planned, asked, failed)
        workers = self.config.num_workers
        room = Room(self.config.ahead_mib * MIB) if workers else None
        source = in_order(DecodeTasks(self.readers, room), tasks, workers, packs_ahead(self.config))
        try:
            found: list[PackPixels] = []
            for pixels in source:
                task = asked.popleft()
                if room is not None:
                    room.take(task)
                found.append(pixels)
                if len(found) == self.micro_batch_size:
                    yield self._finish(planned.popleft(), found)
                    found = []
            for error in failed:  # planning got as far as here; what it had planned before has been used
                self.place.tally = planner.place.tally
                for bad in planner.skipped:
                    self._list(bad)
                raise error
        finally:
            if room is not None:
                room.close()
            source.close()
            tasks.close()

    def _finish(self, planned: PlannedBatch, found: list[PackPixels]) -> Batch:
        """The batch of a plan and its pixels; the stream's place is then after it."""
        self.place = planned.place
        for bad in planned.skipped:
            self._list(bad)
        self.seen, self.found_late = [seen(item) for pack in planned.packs for item in pack], Tally()
        records = iter(self.seen)
        self.examples = [
            [
                item.payload
                for item, said in zip(pack, pixels.said, strict=True)
                if self._decoded(item.payload, next(records), said)
            ]
            for pack, pixels in zip(planned.packs, found, strict=True)
        ]
        self.examples = self._joined(planned, self.examples)
        crops = [array_of(pixels.crops) for pixels in found]
        reader = self.readers[planned.phase]
        batch = collate(
            self.examples,
            sequence_length=reader.config.packing.sequence_length,
            im_patch_id=reader.im_patch_id,
            crops=crops[0] if len(crops) == 1 else np.concatenate(crops),
        )
        batch.state = self.state()
        return batch

    def without_pixels(self, planned: PlannedBatch) -> Batch:
        """The batch of a plan as if all its media could be decoded; its crops are zeros that take no memory."""
        reader = self.readers[planned.phase]
        packs = self._joined(planned, [[item.payload for item in pack] for pack in planned.packs])
        count = sum(example.num_crops for pack in packs for example in pack)
        return collate(
            packs,
            sequence_length=reader.config.packing.sequence_length,
            im_patch_id=reader.im_patch_id,
            crops=np.broadcast_to(np.uint8(0), (count, *packs[0][0].crops.shape[1:])),
        )

    def _joined(self, planned: PlannedBatch, packs: list[list[Example]]) -> list[list[Example]]:
        """The packs of a plan with their documents joined, where they see each other. Documents are always decoded:
        other examples may be missing."""
        config, joined = self.config, []
        for pack, items in zip(packs, planned.packs, strict=True):
            numbers = [item.id for item in items if item.payload.info.get("raw_text")]
            joined.append(join_documents(pack, numbers, config.text, config.seed))
        return joined

    def _decoded(self, example: Example, record: Seen, said: dict[str, Any] | Skipped) -> bool:
        """Take note of how the decoding of an example went; whether it can be used."""
        first = (record_of(record.number), record.key)
        if not isinstance(said, Skipped):
            example.info |= said
            for kind, count in counted(said).items():
                self._note(record.source, kind, count, first)
            if example.num_crops:
                self._late_in_a_row = 0
            return True
        detail = f"{said.detail}; found after packing, so its place in a pack is left empty"
        said = Skipped(said.key, said.cause, detail, record.source)
        self._note(record.source, SKIPPED + said.cause, 1, first)
        self._note(record.source, "places_left_empty", 1, first)
        for tally in (self._late, self.found_late):
            tally.unread(record)
        self._late_in_a_row += 1
        self._list(said)
        check_bad(self.config, said, self._late_in_a_row, self.tally)
        return False

    def _note(self, source: str, kind: str, count: int, first: tuple[int, str]) -> None:
        for tally in (self._late, self.found_late):
            tally.add(source, kind, count, first)

    def mark(self) -> Mark:
        """Where the stream is, for `go_back`."""
        return self.place.copy(), self._late.copy(), self._late_in_a_row

    def go_back(self, mark: Mark) -> None:
        """Go on from a mark; not while an iterator is active."""
        place, late, self._late_in_a_row = mark
        self.place, self._late = place.copy(), late.copy()

    def warnings(self) -> list[str]:
        """What the user should know of the data before they are read, a line each."""
        return [*self.reader.without_crc(), *self.reader.standing_in()]

    def state(self) -> dict[str, Any]:
        """The position of the stream as JSON values, for `load_states`; every batch carries it too."""
        place, tally = self.place, self.tally
        state = {
            "version": STATE_VERSION,
            "identity": self.reader.identity(),
            "dp_rank": self.dp_rank,
            "dp_size": self.dp_size,
            "position": place.position,
            "backlog": list(place.backlog),
            "packer": place.packer_state(len(self.readers) > 1),
            "steps": place.batches // self.batches_per_step,
            "skipped": dict(sorted(tally.skipped().items())),
            "counts": dict(sorted(tally.counts().items())),
            "by_source": tally.json(),
            "bad_in_a_row": place.bad_in_a_row,
        }
        return state | ({"undecoded_in_a_row": self._late_in_a_row} if self._late_in_a_row else {})

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
        self._late, self._late_in_a_row = Tally(), 0
        if size == self.dp_size and not any(state.get("ahead") for state in by_rank):
            own = by_rank[self.dp_rank]
            self.place = Place(
                own["position"],
                own["steps"] * self.batches_per_step,
                list(own["backlog"]),
                tally=Tally.of_state(own),
                bad_in_a_row=own["bad_in_a_row"],
                restore=own["packer"],
            )
            self._late_in_a_row = own.get("undecoded_in_a_row", 0)
            return
        left, start = unread(by_rank)
        self.place = place = Place(
            start + (self.dp_rank - start) % self.dp_size,
            by_rank[0]["steps"] * self.batches_per_step,
            left[self.dp_rank :: self.dp_size],
        )
        if self.dp_rank == 0:  # one rank takes over the counts of the whole run
            for state in by_rank:
                place.tally.update(Tally.of_state(state))
                for record in waiting_unused(state):  # counted when they are reread
                    place.tally.unread(record)

    def _list(self, bad: Skipped) -> None:
        """Remember a skipped record, and write it down where the settings say."""
        self.quarantined.append(bad)
        if self.config.quarantine:
            line = {"record": bad.key, "cause": bad.cause, "detail": bad.detail}
            os.makedirs(os.path.dirname(self.config.quarantine) or ".", exist_ok=True)
            with open(self.config.quarantine, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _tasks(
    batches: Iterator[PlannedBatch], planned: deque[PlannedBatch], asked: deque[PackTask], failed: list[Exception]
) -> Generator[PackTask, None, None]:
    """The packs of all batches. Batches are appended to `planned`, packs to `asked`. An error ends them and is left in
    `failed`: batches that were planned before it come first."""
    before = 0
    try:
        for batch in batches:
            planned.append(batch)
            for task in batch.tasks(before):
                before += task.bytes
                asked.append(task)
                yield task
    except Exception as error:
        failed.append(error)
