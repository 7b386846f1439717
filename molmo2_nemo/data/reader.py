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
from molmo2_nemo.data.joining import Mark, cut_chunks, random_bits
from molmo2_nemo.data.length_rates import keeps
from molmo2_nemo.data.lengths import of_document, of_example
from molmo2_nemo.data.manifest import ShardError
from molmo2_nemo.data.mixture import Draw, Mixture, example_rng, normalised_rates
from molmo2_nemo.data.objects.files import use as use_store
from molmo2_nemo.data.pieces import Numbered, piece_number, record_of, split
from molmo2_nemo.data.record import BadRecord, Record, parse_record
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.data.tally import PASSED_OVER
from molmo2_nemo.errors import plural

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

    def marks(self, count: int) -> list[Mark]: ...


@dataclass(slots=True)
class Skipped:
    """A record that could not be used; stands in the stream in place of its example."""

    key: str
    cause: str
    detail: str
    source: str = ""  # the data set


class PassedOver(Skipped):
    """A document that does not come in this epoch (length_rates.py), or what packs of another length get (lengths.py).
    Not a bad record. Its cause is what it counts as, if anything."""


class NotNow(Exception):
    """Says the same of a record while it is planned; its argument is the cause."""


class ExampleReader:
    """Number in the global stream -> `Example` or `Skipped`. Runs in workers.

    An example is read in two steps: `plan` makes all of it but its crops, and so its size; `decode` makes these from
    the record, which is read again. Indexing does both.
    """

    def __init__(self, config: DataConfig, builder: Builder, im_patch_id: int):
        self.config, self.builder, self.im_patch_id = config, builder, im_patch_id
        self.length = config.packing.sequence_length
        self.longest = max([self.length, *(one.sequence_length for one in config.lengths)])
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
            max_tokens=self.longest,
        )
        example.key, example.source = record.key, draw.source
        check_example(example, self.im_patch_id)
        lengths = self.config.lengths
        if example.info.get("raw_text"):
            pieces = self._pieces(n, draw, example)
        elif lengths and of_example(lengths, example.num_tokens, example.num_crops) not in (None, self.length):
            raise NotNow("")
        else:
            pieces = [(n, example)]
        for _, piece in pieces:
            self._check_size(piece)
        return pieces

    def _pieces(self, n: int, draw: Draw, document: Example) -> list[Numbered]:
        """The parts of a document that are each an example. Raises NotNow: it does not come in this epoch."""
        seed, room = self.config.seed, self.length
        if not keeps(self.config.sources[draw.source].length_rates, document.num_tokens, seed, draw):
            raise NotNow(PASSED_OVER)
        if self.config.lengths and n == record_of(n):
            part = of_document(self.config.lengths, document.num_tokens, self.length)
            if part is None:
                raise NotNow("")
            n = piece_number(n, part[0], 0 if part[1] == document.num_tokens else part[1])
        pieces = split(n, document, room)
        if self.config.text.shuffle_chunks:
            marks = self.builder.marks(self.config.text.shuffle_chunks)
            pieces = [(m, cut_chunks(piece, marks, room, random_bits(seed, "cuts", m))) for m, piece in pieces]
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
        except NotNow as error:
            return PassedOver(key, str(error), "it comes in another epoch, or in packs of another length", draw.source)
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
                f"{plural(example.num_tokens, 'token')} and {plural(example.num_crops, 'crop')}; a pack holds "
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
