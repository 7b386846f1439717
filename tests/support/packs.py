"""Random and real micro-batches for tests of the model and of the parallel layouts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from molmo2_nemo.data.config import DataConfig, ImageConfig, PackingConfig, SourceConfig, VideoConfig
from molmo2_nemo.data.example import Batch
from molmo2_nemo.settings.run import RunConfig
from tests.support.shards import demo_shards


def demo_data(folder: Path, part: str = "sft", length: int = 768, crops: int = 24) -> DataConfig:
    """The demo's shards with the settings of the tiny recipe."""
    return DataConfig(
        sources={"demo": SourceConfig(path=str(folder / part))},
        image=ImageConfig(crop_size=126, margin=2, max_crops=4, max_multi_image_crops=2),
        video=VideoConfig(max_frames=8),
        packing=PackingConfig(sequence_length=length, max_crops=crops, buffer_size=8),
    )


@functools.cache
def demo_packs(count: int = 20, length: int = 768, micro_batch: int = 1) -> list[Batch]:
    """Real micro-batches from the demo's shards: text-only, pictures, several pictures, video, trees."""
    from molmo2_nemo.data.loader import PackStream

    stream = iter(
        PackStream(demo_data(demo_shards(), length=length), micro_batch_size=micro_batch, dp_rank=0, dp_size=1)
    )
    return [next(stream) for _ in range(count)]


def text_only(batch: Batch) -> Batch:
    """The batch without its crops: visual tokens become text, nothing is pooled."""
    none = {
        name: getattr(batch, name)[:0]
        for name in ("crops", "pooling", "pooled_positions", "unit_crops", "unit_pooled_tokens")
    }
    ids = np.where(batch.visual, 5, batch.input_ids)
    return dataclasses.replace(batch, input_ids=ids, visual=np.zeros_like(batch.visual), **none)


def weighing(batches: list[Batch], total: float) -> list[Batch]:
    """The micro-batches with loss weights that sum to `total` over all of them, in the same proportions."""
    now = sum(float(batch.loss_weights.clip(0).sum(dtype=np.float64)) for batch in batches)
    return [
        dataclasses.replace(batch, loss_weights=(batch.loss_weights * (total / now)).astype(np.float32))
        for batch in batches
    ]


def padding_only(batch: Batch) -> Batch:
    """As many packs without a token."""
    empty = text_only(batch)
    nothing = {name: np.full_like(getattr(empty, name), -1) for name in ("input_ids", "labels", "example_ids")}
    packs = [[] for _ in batch.keys]
    return dataclasses.replace(
        empty,
        **nothing,
        loss_weights=np.zeros_like(empty.loss_weights),
        position_ids=np.zeros_like(empty.position_ids),
        branch_ids=np.full_like(empty.branch_ids, -1),
        keys=packs,
        sources=packs,
        source_tokens=packs,
    )


class FixedPacks:
    """A loader over ready-made packs: rank r of n takes every n-th, so all layouts see the same global batches."""

    def __init__(self, packs: list[Batch], dp_rank: int, dp_size: int) -> None:
        self.packs, self.rank, self.size, self.position = packs, dp_rank, dp_size, 0

    def __iter__(self) -> Any:
        while True:
            batch = self.packs[(self.position * self.size + self.rank) % len(self.packs)]
            self.position += 1
            batch.state = {"position": self.position}
            yield batch

    def warnings(self) -> list[str]:
        return []

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_states(self, states: list[dict[str, Any]]) -> None:
        self.position = states[0]["position"]


def tiny_run(folder: Path, steps: int = 5, **parallel: Any) -> RunConfig:
    """A run of the tiny model without dropout on ready-made packs; global batch 4, micro-batch 1.

    `memory`, a dict among the rest, sets keys of MemoryConfig; all others are ParallelConfig's.
    """
    cfg = RunConfig(output_dir=str(folder), save_every=1000)
    cfg.stage.max_steps, cfg.stage.global_batch_size, cfg.stage.micro_batch_size = steps, 4, 1
    cfg.stage.residual_dropout, cfg.stage.train_base_embedding = 0.0, True
    cfg.data.packing.sequence_length = 768
    for group in (cfg.stage.optim.vit, cfg.stage.optim.connector, cfg.stage.optim.llm):
        group.lr, group.warmup_steps = 1e-3, 2
    for name, value in parallel.pop("memory", {}).items():
        setattr(cfg.memory, name, value)
    for name, value in parallel.items():
        setattr(cfg.parallel, name, value)
    return cfg


def train_on_packs(cfg: RunConfig, packs: list[Batch]) -> list[dict[str, Any]]:
    """Train with the real trainer on fixed packs; the metrics of every step (rank 0 writes them, all ranks read)."""
    from megatron.core import parallel_state

    from molmo2_nemo.data import length_stream, loader, ordering  # noqa: F401 - those that keep the real PackStream
    from molmo2_nemo.nemo.train import train
    from molmo2_nemo.rundir.lines import read_metrics
    from molmo2_nemo.rundir.paths import stage_dir
    from molmo2_nemo.training.data import TrainingData

    def fixed(self: Any, steps: int) -> FixedPacks:
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        stream = FixedPacks(packs, rank, size)
        if self.restored is not None:
            stream.load_states(self.restored)
        return stream

    def open_stream(config: Any, *, dp_rank: int, dp_size: int, **rest: Any) -> FixedPacks:
        return FixedPacks(packs, dp_rank, dp_size)

    if cfg.parallel.dynamic_context:  # the loader itself assigns packs to ranks: only what it reads is replaced
        original_stream, loader.PackStream = loader.PackStream, open_stream
        try:
            train(cfg)
        finally:
            loader.PackStream = original_stream
        return read_metrics(stage_dir(cfg))
    original = TrainingData._open
    TrainingData._open = fixed
    try:
        train(cfg)
    finally:
        TrainingData._open = original
    return read_metrics(stage_dir(cfg))


def random_mask_data(rng: np.random.Generator, packs: int, size: int) -> dict[str, np.ndarray]:
    """Random packs of random message trees: example ids, branch ids and visual blocks, int64 [packs, size]."""
    example = np.full((packs, size), -1, np.int64)
    branch = np.full((packs, size), -1, np.int64)
    block = np.zeros((packs, size), np.int64)
    for b in range(packs):
        at, number, pictures = 0, 0, 0
        while at < size and rng.random() < 0.93:
            root, branches = int(rng.integers(1, size // 2)), int(rng.integers(0, 4))
            end = min(at + root, size)
            example[b, at:end] = number
            for start in sorted(rng.integers(at, end, int(rng.integers(0, 3)))):  # runs of visual tokens in the root
                pictures += 1
                block[b, start:end] = 0  # a picture ends where the next begins
                block[b, start : min(start + int(rng.integers(1, 12)), end)] = pictures
            at = end
            for k in range(branches):
                end = min(at + int(rng.integers(1, 10)), size)
                example[b, at:end], branch[b, at:end] = number, k
                at = end
            number += 1
    return {"example_ids": example, "branch_ids": branch, "visual_block": block}


@contextlib.contextmanager
def shared_packs() -> Iterator[list[list[tuple[int, int]]]]:
    """In a job with dynamic context groups: of each step, (ranks that share it, tokens) of every pack of this rank."""
    from molmo2_nemo.parallel.dynamic import DynamicContext

    seen: list[list[tuple[int, int]]] = []
    take = DynamicContext.take

    def watched(self: Any, batches: Any, assignments: Any) -> Any:
        found = take(self, batches, assignments)
        seen.append([(batch.context_ranks, batch.input_ids.shape[1]) for batch in found])
        return found

    DynamicContext.take = watched  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        DynamicContext.take = take  # type: ignore[method-assign]
