"""The stream of a rank whose steps have packs of several lengths (lengths.py): one `PackStream` for each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.example import Batch, Example
from molmo2_nemo.data.lengths import length_at, length_problems, micro_batches, of_length
from molmo2_nemo.data.loader import PackStream
from molmo2_nemo.data.reader import ExampleReader
from molmo2_nemo.data.states import STATE_VERSION, merge_states
from molmo2_nemo.data.tally import Tally
from molmo2_nemo.errors import DataError


class LengthStream:
    """Infinite iterable over `Batch`, whose state is that of all lengths.

    Args:
        batches_per_step: batches of this rank in a step of the longest packs. Others as in `PackStream`.
    Raises:
        DataError: lengths that make no sense; what `PackStream` raises.
    """

    def __init__(self, config: DataConfig, *, batches_per_step: int, dp_rank: int, dp_size: int, **rest: Any):
        for problem in length_problems(config, batches_per_step):
            raise DataError(problem)
        self.config, self.dp_rank, self.dp_size = config, dp_rank, dp_size
        self.counts = [micro_batches(config, i, batches_per_step) for i in range(len(config.lengths))]
        self.streams = [
            PackStream(of_length(config, i), batches_per_step=count, dp_rank=dp_rank, dp_size=dp_size, **rest)
            for i, count in enumerate(self.counts)
        ]
        self.steps = 0
        self.examples: list[list[Example]] = []  # of the last batch, as `PackStream` has them

    @property
    def reader(self) -> ExampleReader:
        """The reader of the length that the next batch has."""
        return self.streams[length_at(self.config, self.steps)].reader

    @property
    def skipped(self) -> Counter[str]:
        """Cause -> records skipped since the start of the run, by whichever length."""
        found: Counter[str] = Counter()
        for stream in self.streams:
            found.update(stream.skipped)
        return found

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position on; only one iterator may be active at a time."""
        sources = [iter(stream) for stream in self.streams]
        try:
            while True:
                number = length_at(self.config, self.steps)
                for i in range(self.counts[number]):
                    batch = next(sources[number])
                    self.examples = self.streams[number].examples
                    self.steps += i + 1 == self.counts[number]
                    batch.state = self.state()
                    yield batch
        finally:
            for source in sources:
                source.close()  # type: ignore[attr-defined]

    def state(self) -> dict[str, Any]:
        """The position as JSON values, for `load_states`; the counts are those of all lengths."""
        states = [stream.state() for stream in self.streams]
        tally = Tally()
        for stream in self.streams:
            tally.update(stream.tally)
        return {
            "version": STATE_VERSION,
            "identity": states[0]["identity"],
            "dp_rank": self.dp_rank,
            "dp_size": self.dp_size,
            "steps": self.steps,
            "skipped": dict(sorted(tally.skipped().items())),
            "counts": dict(sorted(tally.counts().items())),
            "by_source": tally.json(),
            "lengths": states,
        }

    def load_states(self, states: list[dict[str, Any]]) -> None:
        """Continue the stream of a saved run; arguments and errors as in `PackStream.load_states`."""
        by_rank = merge_states(states)
        if any(len(state.get("lengths", ())) != len(self.streams) for state in by_rank):
            raise DataError("the saved run had other data.lengths; use those of its config.yaml")
        for i, stream in enumerate(self.streams):
            stream.load_states([state["lengths"][i] for state in by_rank])
        self.steps = by_rank[0]["steps"]

    def warnings(self) -> list[str]:
        """What the user should know of the data before they are read, a line each."""
        return self.streams[-1].warnings()
