"""Loss on held-out data sets during training, without any effect on it: data, random states and weights stay theirs.

The first `examples` records of each data set, in the order of `data.seed`, formatted as in training. They are packed as
they come, so every layout scores the same examples; the loss of an example does not depend on its pack.

A signal that ends the run is noticed between two packs. What was due is then done when the run resumes.
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

from molmo2_nemo.data.collate import collate
from molmo2_nemo.data.config import DataConfig, PackingConfig
from molmo2_nemo.data.example import Batch, Example
from molmo2_nemo.data.loader import ExampleReader, Skipped, default_builder
from molmo2_nemo.errors import Preempted
from molmo2_nemo.model.inputs import PackInputs
from molmo2_nemo.nemo.callbacks import StopOnSignal
from molmo2_nemo.nemo.module import is_first_of_replica
from molmo2_nemo.rundir.lines import append_line, cut_lines, read_lines
from molmo2_nemo.rundir.paths import VALIDATION
from molmo2_nemo.settings.run import ValidationConfig
from molmo2_nemo.training.faults import agreed


class Validation(pl.Callback):
    """Scores every data set after every `config.every` steps and after the last; writes validation.jsonl. A run that
    resumes at a step where it was due but not done begins with it.

    Examples are read and decoded by the training process itself, between two steps: keep them few.

    Args:
        config: data sets and how many examples of each.
        data: the run's data settings; packs are of its size.
        folder: the run's folder.
        stage: name shown with the losses.
    """

    def __init__(self, config: ValidationConfig, data: DataConfig, folder: str, stage: str) -> None:
        self.config, self.data, self.stage = config, data, stage
        self.path = Path(folder) / VALIDATION
        self.readers: dict[str, ExampleReader] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Open the data sets; score them where that is still to be done.

        Raises:
            DataError: one of them is missing or damaged.
            Preempted: a signal came meanwhile.
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
        missing = False
        if trainer.is_global_zero:
            cut_lines(self.path, trainer.global_step)
            missing = all(line["step"] != trainer.global_step for line in read_lines(self.path, step=int))
        if self._due(trainer) and trainer.global_step > 0 and agreed([float(missing)])[0]:
            self.validate(trainer)
            if trainer.should_stop:
                raise Preempted(f"a signal came before the first step; step {trainer.global_step} is saved as before")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._due(trainer) and not trainer.should_stop:
            self.validate(trainer)

    def _due(self, trainer: pl.Trainer) -> bool:
        step = trainer.global_step
        return bool(self.readers) and (step % self.config.every == 0 or step == trainer.max_steps)

    def validate(self, trainer: pl.Trainer) -> None:
        """Score all data sets and write the losses down, unless a signal ends the run meanwhile."""
        step, start = trainer.global_step, time.perf_counter()
        losses, skipped = {}, 0
        for name, reader in self.readers.items():
            found = self._score(trainer, reader)
            if found is None:
                return
            losses[name] = found[0]
            skipped += found[1]
        if trainer.is_global_zero:
            line = {"step": step, "time": time.time(), "losses": losses, "skipped": skipped}
            append_line(self.path, {**line, "seconds": time.perf_counter() - start})
            for logger in trainer.loggers:
                logger.log_metrics({f"validation/{k}": v for k, v in losses.items() if v is not None}, step=step)
            reported = ", ".join(f"{name} {'-' if loss is None else f'{loss:.4f}'}" for name, loss in losses.items())
            print(f"{self.stage} step {step}  validation loss: {reported}", flush=True)

    def _score(self, trainer: pl.Trainer, reader: ExampleReader) -> tuple[float | None, int] | None:
        """Loss of a data set (None if nothing could be scored) and records that could not be used; None when the run is
        to end."""
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
            for pack in self._until_all_done(trainer, packs(reader, mine, self.data.packing, skipped)):
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
        if trainer.should_stop:
            return None
        first = parallel_state.get_tensor_model_parallel_rank() == 0  # tensor ranks have the same sums
        counts = torch.tensor([float(len(skipped)) if is_first_of_replica() else 0.0], dtype=torch.float64)
        both = torch.cat((sums if first else torch.zeros_like(sums), counts)).to(torch.cuda.current_device())
        dist.all_reduce(both)
        loss, weight, bad = both.tolist()
        return (loss / weight if weight > 0 else None), int(bad)

    def _until_all_done(self, trainer: pl.Trainer, mine: Iterator[Batch]) -> Iterator[Batch]:
        """This rank's packs, until all ranks have had theirs or a signal ends the run. All ranks ask together before
        every pack, also those that have none left."""
        stop = next(c for c in trainer.callbacks if isinstance(c, StopOnSignal))  # type: ignore[attr-defined]
        while True:
            pack = next(mine, None)
            ends, more = stop.leaves(trainer, wish=pack is not None)
            if ends or not more:
                return
            if pack is not None:
                yield pack


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
    return model(inputs), lambda sums: (sums.loss, torch.zeros((), dtype=torch.int), {"sums": sums.numbers()})
