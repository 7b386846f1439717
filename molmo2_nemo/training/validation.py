"""Loss on held-out data sets during training, without any effect on it: data, random states and weights stay theirs.

The first `examples` records of each data set, in the order of `data.seed`, formatted as in training. They are packed as
they come, so every layout scores the same examples; the loss of an example does not depend on its pack.

A signal that ends the run is noticed between two packs. What was due is then done when the run resumes.

What of the records was skipped, left out or cut off is counted as in training: in every line of losses, and said once.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from molmo2_nemo.data.collate import collate
from molmo2_nemo.data.config import DataConfig, PackingConfig
from molmo2_nemo.data.example import Batch, Example
from molmo2_nemo.data.reader import ExampleReader, Skipped, default_builder
from molmo2_nemo.data.tally import SKIPPED, Seen, Tally, counted
from molmo2_nemo.model.inputs import PackInputs
from molmo2_nemo.rundir.lines import append_line
from molmo2_nemo.rundir.paths import VALIDATION
from molmo2_nemo.settings.run import ValidationConfig
from molmo2_nemo.training.between_steps import Leaves, left_to_do, say_left
from molmo2_nemo.training.step import device, is_first_of_replica
from molmo2_nemo.training.whereabouts import Work, here


class HeldOut:
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
        self._said = False  # what was not used in full: the same at every step

    def start(self, step: int, last_step: int) -> bool:
        """Open the data sets; whether they are still to be scored at this step. A collective of all ranks.

        Raises:
            DataError: one of them is missing or damaged.
        """
        builder, im_patch = default_builder(self.data)
        for name, source in self.config.sources.items():
            own = dataclasses.replace(
                self.data,
                sources={name: dataclasses.replace(source, group=None, rate=1.0, length_rates=[])},
                text=dataclasses.replace(self.data.text, shuffle_chunks=None),
                groups={},
                missing="error",
                progression=[],
                lengths=[],
            )
            self.readers[name] = ExampleReader(own, builder, im_patch)
        left = left_to_do(self.path, step)
        return self.due(step, last_step) and step > 0 and left

    def due(self, step: int, last_step: int) -> bool:
        return bool(self.readers) and (step % self.config.every == 0 or step == last_step)

    def score(self, step: int, chunks: list[Any], leaves: Leaves) -> dict[str, float]:
        """Score all data sets and write the losses down, unless a signal ends the run meanwhile. A collective of all
        ranks.

        Args:
            chunks: this rank's parts of the model, as Megatron's schedules take them.

        Returns:
            The losses, for loggers, on rank 0; of data sets that had something to score.
        """
        start = time.perf_counter()
        losses, tally = {}, Tally()
        for name, reader in self.readers.items():
            found = self._score(reader, chunks, leaves)
            if found is None:
                say_left(f"{self.stage} step {step}  validation loss")
                return {}
            losses[name] = found[0]
            tally.update(found[1])
        if dist.get_rank() != 0:
            return {}
        skipped = sum(tally.skipped().values())
        line = {"step": step, "time": time.time(), "losses": losses, "skipped": skipped, "counts": tally.summary()}
        append_line(self.path, {**line, "seconds": time.perf_counter() - start})
        if not self._said and (lines := tally.table(self.data)):
            print(f"{self.stage}: of the held-out data, skipped, left out or replaced:", *lines, sep="\n", flush=True)
        self._said = True
        reported = ", ".join(f"{name} {'-' if loss is None else f'{loss:.4f}'}" for name, loss in losses.items())
        print(f"{self.stage} step {step}  validation loss: {reported}", flush=True)
        return {f"validation/{name}": loss for name, loss in losses.items() if loss is not None}

    def _score(self, reader: ExampleReader, chunks: list[Any], leaves: Leaves) -> tuple[float | None, Tally] | None:
        """Loss of a data set (None if nothing could be scored) and what was not used in full; None when the run is to
        end."""
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        (dataset,) = reader.datasets.values()
        mine = range(rank, min(self.config.examples, len(dataset)), size)
        tally = Tally()
        sums = torch.zeros(2, dtype=torch.float64)
        ended = False
        for chunk in chunks:
            chunk.eval()
        with torch.no_grad():
            own = packs(reader, mine, self.data.packing, tally)
            while True:  # until all ranks have had theirs; all ask together, also those that have none left
                here.at(Work.VALIDATING)
                pack = next(own, None)
                ended, more = leaves(pack is not None)
                if ended or not more:
                    break
                if pack is not None:
                    sums += self._forward(pack, chunks)
        for chunk in chunks:
            chunk.train()
        return None if ended else overall(sums, tally)

    def _forward(self, pack: Batch, chunks: list[Any]) -> torch.Tensor:
        """Weighted loss and weight of a pack, float64 [2] on the host; 0 before the last pipeline stage."""
        found = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter([pack]),
            model=chunks,
            num_microbatches=1,
            seq_length=self.data.packing.sequence_length,
            micro_batch_size=1,
            forward_only=True,
        )
        return sum((part["sums"].double().cpu() for part in found), torch.zeros(2, dtype=torch.float64))


def overall(sums: torch.Tensor, tally: Tally) -> tuple[float | None, Tally]:
    """The loss over all ranks, None where nothing has weight, and what was counted. A collective of all ranks.

    Args:
        sums: this rank's weighted losses and weights, float64 [2].
        tally: what this data-parallel rank has counted.
    """
    first = parallel_state.get_tensor_model_parallel_rank() == 0  # tensor ranks have the same sums
    both = (sums if first else torch.zeros_like(sums)).to(torch.cuda.current_device())
    dist.all_reduce(both)
    loss, weight = both.tolist()
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, tally.json() if is_first_of_replica() else {})
    together = Tally()
    for found in counts:
        together.update(Tally.of_json(found))
    return (loss / weight if weight > 0 else None), together


def packs(reader: ExampleReader, numbers: Iterable[int], budget: PackingConfig, tally: Tally) -> Iterator[Batch]:
    """Examples in their order, as many to a pack as fit; `tally` counts them and the records that cannot be used."""
    waiting: list[Example] = []

    def full(example: Example) -> bool:
        together = [*waiting, example]
        tokens, crops = sum(e.num_tokens for e in together), sum(e.num_crops for e in together)
        return tokens > budget.sequence_length or crops > budget.max_crops

    def packed() -> Batch:
        return collate([waiting], sequence_length=budget.sequence_length, im_patch_id=reader.im_patch_id)

    for number in numbers:
        examples = reader.whole(number)
        if isinstance(examples, Skipped):
            tally.add(examples.source, SKIPPED + examples.cause, 1, (number, examples.key))
            continue
        for example in examples:
            tally.read(Seen(number, example.key, example.source, counted(example.info)))
            if waiting and full(example):
                yield packed()
                waiting = []
            waiting.append(example)
    if waiting:
        yield packed()


def _forward_step(batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
    """One pack through one pipeline stage, as Megatron's schedules want it."""
    inputs = PackInputs.from_batch(next(batches), device())
    inputs.groups = model.groups[max(model.groups)]
    return model(inputs), lambda sums: (sums.loss, torch.zeros((), dtype=torch.int), {"sums": sums.numbers()})
