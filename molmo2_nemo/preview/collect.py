"""The input of a preview: packs of a stage exactly as training would get them, or one record on its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import torch

from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.data.collate import collate
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.example import ROOT_BRANCH, Batch, Example
from molmo2_nemo.data.length_stream import LengthStream
from molmo2_nemo.data.loader import PackStream
from molmo2_nemo.data.mixture import Draw, example_rng, normalised_rates
from molmo2_nemo.data.objects.files import use as use_store
from molmo2_nemo.data.pieces import split
from molmo2_nemo.data.reader import default_builder
from molmo2_nemo.data.record import parse_record
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.data.special_tokens import image_numbers
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.errors import DataError
from molmo2_nemo.settings.run import RunConfig, data_config


@dataclass(slots=True)
class Part:
    """One example inside a pack."""

    example: Example
    start: int  # first token in the pack

    @property
    def stop(self) -> int:
        return self.start + self.example.num_tokens

    @property
    def root_tokens(self) -> int:
        """Number of tokens that every branch sees; in an example with one conversation, those before it."""
        return int(self.example.info.get("root_tokens", self.example.num_tokens))

    def branches(self) -> list[slice]:
        """The tokens of each branch, counted from the example's first token."""
        ids = self.example.branch_ids
        if (ids == ROOT_BRANCH).all():
            return [slice(self.root_tokens, self.example.num_tokens)]
        found = []
        for branch in range(int(ids.max()) + 1):
            where = np.flatnonzero(ids == branch)
            if len(where):
                found.append(slice(int(where[0]), int(where[-1]) + 1))
        return found


@dataclass(slots=True)
class PackView:
    """One pack with the examples in it."""

    title: str
    batch: Batch  # a single row
    parts: list[Part]
    budget: tuple[int, int]  # tokens and crops that a pack may hold
    skipped: dict[str, int] = field(default_factory=dict)  # records skipped so far, by cause

    def mask(self, vocab_size: int, visual_attention: str) -> TokenMask:
        """The attention mask that the model makes from the pack."""
        ids, visual = torch.from_numpy(self.batch.input_ids), torch.from_numpy(self.batch.visual)
        blocks = image_numbers(ids, visual, vocab_size)
        example_ids, branch_ids = torch.from_numpy(self.batch.example_ids), torch.from_numpy(self.batch.branch_ids)
        return TokenMask(example_ids, branch_ids, blocks, visual_attention)


def in_process(cfg: RunConfig) -> DataConfig:
    """The data settings as training uses them, but read in this process."""
    return dataclasses.replace(data_config(cfg), num_workers=0)


def packs(cfg: RunConfig, count: int, rank: int = 0, ranks: int = 1) -> list[PackView]:
    """The first `count` packs of one of `ranks` data-parallel ranks, from the loader itself, in the order packed.

    Raises:
        DataError: a source cannot be opened, or too many records cannot be used.
    """
    per_step = max(1, cfg.stage.global_batch_size // ranks)
    data = in_process(cfg)
    kind: type[LengthStream] | type[PackStream] = LengthStream if data.lengths else PackStream
    stream = kind(data, micro_batch_size=1, dp_rank=rank, dp_size=ranks, batches_per_step=per_step)
    found: list[PackView] = []
    batches = iter(stream)
    try:
        while len(found) < count:
            packing = stream.reader.config.packing
            batch = next(batches)
            parts = _parts(stream.examples[0], batch)
            title = f"pack {len(found) + 1} of {cfg.stage.name}" + (f", rank {rank} of {ranks}" if ranks > 1 else "")
            budget = packing.sequence_length, packing.max_crops
            found.append(PackView(title, batch, parts, budget, dict(stream.skipped)))
    finally:
        batches.close()  # type: ignore[attr-defined]
    return found


def _parts(examples: list[Example], batch: Batch) -> list[Part]:
    """The examples of a batch of one pack, with their crops."""
    parts, token, crop = [], 0, 0
    for example in examples:
        crops = batch.crops[crop : crop + example.num_crops]
        parts.append(Part(dataclasses.replace(example, crops=crops), token))
        token, crop = parts[-1].stop, crop + len(crops)
    return parts


def record(cfg: RunConfig, key: str) -> PackView:
    """One record, built as an example of epoch 0, alone in a pack that is just long enough.

    Args:
        key: "key" or "shard:key"; the first data set that has it is taken.
    Raises:
        DataError: no such record.
        BadRecord: it cannot be used, for the reason that training would skip it.
    """
    data = in_process(cfg)
    use_store(data.store)
    for name in normalised_rates(data.sources, data.groups, data.missing):
        dataset = ShardDataset(data.sources[name].path, name, data.limits)
        index = _find(dataset, key)
        if index is None:
            continue
        label, members = dataset.read(index)
        builder, im_patch = default_builder(data)
        source = data.sources[name]
        example = builder.build(
            parse_record(label, members, max_json_bytes=data.limits.json_bytes),
            example_rng(data.seed, Draw(name, 0, index)),
            weight=source.weight,
            p_high_res=source.p_high_res,
            max_tokens=data.packing.sequence_length,
        )
        if example.info.get("raw_text"):
            example = split(0, example, data.packing.sequence_length)[0][1]
        example.key = label
        batch = collate([[example]], sequence_length=example.num_tokens, im_patch_id=im_patch)
        budget = data.packing.sequence_length, data.packing.max_crops
        return PackView(f"record {label}", batch, [Part(example, 0)], budget)
    raise DataError(f"no record {key!r} in {', '.join(data.sources)}; keys look like {_some_key(data)!r}")


def _find(dataset: ShardDataset, key: str) -> int | None:
    """Index of the record in the data set, found in the shards' indexes alone; None if it is not there."""
    shard_name, _, own = key.rpartition(":")
    for number, shard in enumerate(dataset.shards):
        if shard_name and shard["name"] != shard_name:
            continue
        index = dataset._index(number)
        for inner in range(len(index)):
            if index[inner][0] == own:
                return dataset.starts[number] + inner
    return None


def _some_key(data: DataConfig) -> str:
    for name, source in data.sources.items():
        try:
            return ShardDataset(source.path, name).read(0)[0]
        except DataError:
            continue
    return "shard-000000.tar:key"


def tokenizer_of(cfg: RunConfig) -> Molmo2Tokenizer:
    return Molmo2Tokenizer.load(cfg.data.tokenizer, vocab_size=data_config(cfg).vocab_size)
