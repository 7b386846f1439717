"""Number in the global stream -> the example of its record, in two steps: without crops, and its crops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from molmo2_nemo.data.collate import check_example
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.coverage import coverage, standing_in
from molmo2_nemo.data.example import Example
from molmo2_nemo.data.manifest import ShardError
from molmo2_nemo.data.mixture import Draw, Mixture, example_rng, normalised_rates
from molmo2_nemo.data.objects.files import use as use_store
from molmo2_nemo.data.pieces import Numbered, record_of, split
from molmo2_nemo.data.record import BadRecord, Record, parse_record
from molmo2_nemo.data.shards import ShardDataset

if TYPE_CHECKING:
    from molmo2_nemo.data.build import ExampleBuilder

T = TypeVar("T")


class Builder(Protocol):
    """The part of `ExampleBuilder` (data/build.py) that the loader uses."""

    def plan(
        self,
        record: Record,
        rng: np.random.Generator,
        *,
        weight: float | None = None,
        p_high_res: float | None = None,
        max_tokens: int | None = None,
    ) -> Example: ...

    def decode(self, record: Record, images: list[dict[str, Any]] | None, out: np.ndarray) -> dict[str, Any]: ...


@dataclass(slots=True)
class Skipped:
    """A record that could not be used; stands in the stream in place of its example."""

    key: str
    cause: str
    detail: str
    source: str = ""  # the data set


class ExampleReader:
    """Number in the global stream -> `Example` or `Skipped`. Runs in workers.

    An example is read in two steps: `plan` makes all of it but its crops, and so its size; `decode` makes these from
    the record, which is read again. Indexing does both.
    """

    def __init__(self, config: DataConfig, builder: Builder, im_patch_id: int):
        self.config, self.builder, self.im_patch_id = config, builder, im_patch_id
        use_store(config.store)
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

    def standing_in(self) -> list[str]:
        """One line for each data set of which few records stand in for many."""
        sets = ((name, self.config.sources[name], dataset) for name, dataset in self.datasets.items())
        found = (standing_in(name, coverage(name, dataset.manifest), source) for name, source, dataset in sets)
        return [f"warning: {words}; molmo2 mixture shows all" for words in found if words]

    def __getitem__(self, n: int) -> Example | Skipped:
        """The n-th example of the stream, or a document's first piece. A record that cannot be used gives `Skipped`.

        Raises:
            ShardError: the shard itself cannot be read.
        """
        found = self.whole(n)
        return found if isinstance(found, Skipped) else found[0]

    def whole(self, n: int) -> list[Example] | Skipped:
        """The n-th example of the stream, or all pieces of a document. Raises ShardError."""

        def make(draw: Draw, record: Record) -> list[Example]:
            examples = [example for _, example in self._planned(n, draw, record)]
            for example in examples:
                example.make_room()
                example.info |= self.builder.decode(record, example.info.get("images"), example.crops)
            return examples

        return self._of_record(n, make)

    def plan(self, n: int) -> Example | Skipped:
        """The n-th example without its crops, or the first piece of a document. Raises ShardError."""
        found = self.pieces(n)
        return found if isinstance(found, Skipped) else found[0][1]

    def pieces(self, n: int) -> list[Numbered] | Skipped:
        """The n-th example without its crops, or the pieces of a document, with their numbers. Raises ShardError."""
        return self._of_record(n, lambda draw, record: self._planned(n, draw, record))

    def _planned(self, n: int, draw: Draw, record: Record) -> list[Numbered]:
        source = self.config.sources[draw.source]
        example = self.builder.plan(
            record,
            example_rng(self.config.seed, draw),
            weight=source.weight,
            p_high_res=source.p_high_res,
            max_tokens=self.config.packing.sequence_length,
        )
        example.key, example.source = record.key, draw.source
        check_example(example, self.im_patch_id)
        document = example.info.get("raw_text", False)
        pieces = split(n, example, self.config.packing.sequence_length) if document else [(n, example)]
        for _, piece in pieces:
            self._check_size(piece)
        return pieces

    def decode(self, n: int, images: list[dict[str, Any]] | None, out: np.ndarray) -> dict[str, Any] | Skipped:
        """Decode the crops of the n-th example to `out`, uint8 [C, P, D_p]; see `ExampleBuilder.decode`.

        Raises:
            ShardError: the shard itself cannot be read.
        """
        if not len(out):
            return {}
        return self._of_record(n, lambda draw, record: self.builder.decode(record, images, out))

    def _of_record(self, n: int, work: Callable[[Draw, Record], T]) -> T | Skipped:
        draw = self.mixture.draw(record_of(n))
        key = f"{draw.source}[{draw.index}]"
        try:
            key, members = self.datasets[draw.source].read(draw.index)
            return work(draw, parse_record(key, members, max_json_bytes=self.config.limits.json_bytes))
        except ShardError:
            raise
        except BadRecord as error:
            return Skipped(error.key or key, error.cause, error.detail, draw.source)
        except Exception as error:  # hostile media may raise anything; a bug of this package shows as many in a row
            return Skipped(key, type(error).__name__, str(error)[:500], draw.source)

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


def default_builder(config: DataConfig) -> tuple[ExampleBuilder, int]:
    """`ExampleBuilder` with the configured tokenizer, and the id of <im_patch>."""
    from molmo2_nemo.data.build import ExampleBuilder
    from molmo2_nemo.data.tokenizer import Molmo2Tokenizer

    tokenizer = Molmo2Tokenizer.load(config.tokenizer, vocab_size=config.vocab_size)
    return ExampleBuilder(config, tokenizer), tokenizer.special.im_patch
