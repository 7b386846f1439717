"""Where in its work this rank is: what the watchdog compares between ranks, and what a stack alone does not say.

Whoever does a piece of the work says so here; that costs a few assignments. A move is a sign of progress.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Kind:
    """A part of the work."""

    order: int  # within a step; micro-batches are fetched and computed by turns
    allowance: int  # how many times faults.hang_seconds it may take without a sign of progress


class Work(Enum):
    """The parts of the work, by the words that say what a rank does in them."""

    STARTING = "starting"
    FETCHING = "waiting for data"
    COMPUTING = "computing"
    EXCHANGING = "exchanging gradients"
    UPDATING = "updating weights"
    FINISHING = "finishing the step"
    VALIDATING = "validating"
    EVALUATING = "evaluating"
    SAVING = "saving"

    @property
    def kind(self) -> Kind:
        return KINDS[self]


KINDS = {
    Work.STARTING: Kind(0, 4),
    Work.FETCHING: Kind(1, 1),
    Work.COMPUTING: Kind(1, 1),
    Work.EXCHANGING: Kind(2, 1),
    Work.UPDATING: Kind(3, 1),
    Work.FINISHING: Kind(4, 1),
    Work.VALIDATING: Kind(5, 4),
    Work.EVALUATING: Kind(6, 10),
    Work.SAVING: Kind(7, 4),
}


class Whereabouts:
    """Of this process; `here` is the one there is."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As at the start of a run."""
        self.step = 0  # from 1; 0 before the first
        self.work = Work.STARTING
        self.micro_batch = 0  # of the step on this rank, from 1
        self.records: Sequence[str] = ()  # keys of those in the micro-batch that is computed
        self.moves = 0
        self.reads: Callable[[], bool] | None = None  # where ranks read for each other: whether this one does right now
        self.steps_begun = 0  # by this process

    def begin(self, step: int) -> None:
        """A step begins."""
        self.step, self.micro_batch = step, 0
        self.steps_begun += 1
        self.at(Work.FETCHING)

    def fetches(self) -> None:
        """The next micro-batch is waited for."""
        self.micro_batch += 1
        self.at(Work.FETCHING)

    def computes(self, records: Sequence[str]) -> None:
        """It is there, with these records."""
        self.records = records
        self.at(Work.COMPUTING)

    def at(self, work: Work) -> None:
        """Another part of the work begins, or the same goes on."""
        self.work = work
        self.moves += 1

    @property
    def allowance(self) -> int:
        """How many times faults.hang_seconds may pass until the next move. The first step, in which kernels are
        compiled, may take as long as the start."""
        first = KINDS[Work.STARTING].allowance if self.steps_begun <= 1 else 1
        return max(first, self.work.kind.allowance)

    @property
    def order(self) -> list[int]:
        """Sorts the places of ranks: the earlier in the work, the smaller."""
        micro = 0 if self.work.kind.order != KINDS[Work.FETCHING].order else self.micro_batch
        return [self.step, self.work.kind.order, 2 * micro + (self.work is Work.COMPUTING)]

    @property
    def waits_for_readers(self) -> bool:
        """Whether the data that this rank waits for are other ranks' to read."""
        return self.work is Work.FETCHING and self.reads is not None and not self.reads()

    def words(self) -> str:
        """Such as `step 7, computing micro-batch 2`."""
        micro = f" micro-batch {self.micro_batch}" if self.work is Work.COMPUTING else ""
        where = f"step {self.step}, " if self.step else ""
        return f"{where}{self.work.value}{micro}"


here = Whereabouts()
