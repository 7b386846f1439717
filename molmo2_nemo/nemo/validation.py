"""Loss on held-out data sets while training goes on, without touching it: data, random states and weights stay theirs.

The first `examples` records of each data set, in the order of `data.seed`, formatted as in training. They are packed as
they come, so every layout scores the same examples; the loss of an example does not depend on its pack.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from molmo2_nemo.config import ValidationConfig
from molmo2_nemo.data.collate import collate
from molmo2_nemo.data.config import DataConfig, PackingConfig
from molmo2_nemo.data.example import Batch, Example
from molmo2_nemo.data.loader import ExampleReader, Skipped, default_builder
from molmo2_nemo.model.inputs import PackInputs
from molmo2_nemo.nemo.metrics import append_line, cut_lines
from molmo2_nemo.nemo.module import WeightedLossReduction, is_first_of_replica


class Validation(pl.Callback):
    """Scores every data set after every `config.every` steps and after the last; writes validation.jsonl.

    Examples are read and decoded by the training process itself, between two steps: keep them few.

    Args:
        config: data sets and how many examples of each.
        data: the run's data settings; packs are of its size.
        folder: the run's folder.
        stage: name shown with the losses.
    """

    def __init__(self, config: ValidationConfig, data: DataConfig, folder: str, stage: str) -> None:
        self.config, self.data, self.stage = config, data, stage
        self.path = Path(folder) / "validation.jsonl"
        self.readers: dict[str, ExampleReader] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Open the data sets.

        Raises:
            DataError: one of them is missing or damaged.
        """
        builder, im_patch = default_builder(self.data)
        for name, source in self.config.sources.items():
            own = dataclasses.replace(
                self.data,
                sources={name: dataclasses.replace(source, group=None, rate=1.0)},
                groups={},
                missing="error",
                progression=[],
            )
            self.readers[name] = ExampleReader(own, builder, im_patch)
        if trainer.is_global_zero:
            cut_lines(self.path, trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        due = step % self.config.every == 0 or step == trainer.max_steps
        if not due or trainer.should_stop or not self.readers:
            return
        start = time.perf_counter()
        losses, skipped = {}, 0
        for name, reader in self.readers.items():
            losses[name], bad = self._score(trainer, pl_module, reader)
            skipped += bad
        if trainer.is_global_zero:
            line = {"step": step, "time": time.time(), "losses": losses, "skipped": skipped}
            append_line(self.path, {**line, "seconds": time.perf_counter() - start})
            for logger in trainer.loggers:
                logger.log_metrics({f"validation/{k}": v for k, v in losses.items() if v is not None}, step=step)
            told = ", ".join(f"{name} {'-' if loss is None else f'{loss:.4f}'}" for name, loss in losses.items())
            print(f"{self.stage} step {step}  validation loss: {told}", flush=True)

    def _score(self, trainer: pl.Trainer, pl_module: Any, reader: ExampleReader) -> tuple[float | None, int]:
        """Loss of a data set (None if nothing could be scored) and records that could not be used."""
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        (dataset,) = reader.datasets.values()
        mine = range(rank, min(self.config.examples, len(dataset)), size)
        skipped: list[Skipped] = []
        sums = torch.zeros(2, dtype=torch.float64)
        chunks = list(trainer.strategy.megatron_parallel)  # type: ignore[attr-defined]
        schedule = get_forward_backward_func()
        for chunk in chunks:
            chunk.eval()
        with torch.no_grad():
            for pack in packs(reader, mine, self.data.packing, skipped):
                found = schedule(
                    forward_step_func=_forward,
                    data_iterator=iter([pack]),
                    model=chunks,
                    num_microbatches=1,
                    seq_length=self.data.packing.sequence_length,
                    micro_batch_size=1,
                    forward_only=True,
                )
                for part in found:  # only on the last pipeline stage
                    sums += part["sums"].double().cpu()
        for chunk in chunks:
            chunk.train()
        first = parallel_state.get_tensor_model_parallel_rank() == 0  # tensor ranks have the same sums
        counts = torch.tensor([float(len(skipped)) if is_first_of_replica() else 0.0], dtype=torch.float64)
        both = torch.cat((sums if first else torch.zeros_like(sums), counts)).to(torch.cuda.current_device())
        dist.all_reduce(both)
        loss, weight, bad = both.tolist()
        return (loss / weight if weight > 0 else None), int(bad)


def packs(
    reader: ExampleReader, numbers: Iterable[int], budget: PackingConfig, skipped: list[Skipped]
) -> Iterator[Batch]:
    """Examples in their order, as many to a pack as fit; records that cannot be used go to `skipped`."""
    waiting: list[Example] = []

    def full(example: Example) -> bool:
        together = [*waiting, example]
        tokens, crops = sum(e.num_tokens for e in together), sum(e.num_crops for e in together)
        return tokens > budget.sequence_length or crops > budget.max_crops

    def packed() -> Batch:
        return collate([waiting], sequence_length=budget.sequence_length, im_patch_id=reader.im_patch_id)

    for number in numbers:
        example = reader[number]
        if isinstance(example, Skipped):
            skipped.append(example)
            continue
        if waiting and full(example):
            yield packed()
            waiting = []
        waiting.append(example)
    if waiting:
        yield packed()


def _forward(batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
    """One pack through one pipeline stage, as Megatron's schedules want it."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    inputs = PackInputs.from_batch(next(batches), device)
    inputs.groups = model.groups[max(model.groups)]
    return model(inputs), lambda output: WeightedLossReduction().forward(inputs, output)
