"""A step's micro-batches on one rank: taken from the loader, brought to the device, their losses added up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from molmo2_nemo.attention.balance import balanced_order
from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.data.example import Batch
from molmo2_nemo.data.special_tokens import image_numbers
from molmo2_nemo.model.config import Molmo2Config, Trainable
from molmo2_nemo.model.inputs import PackInputs, PackPlan
from molmo2_nemo.model.loss import LossSums, global_loss, global_sums
from molmo2_nemo.parallel.context import ContextGroups, group_size
from molmo2_nemo.parallel.dynamic import reordered, without_padding
from molmo2_nemo.training.ahead import Ahead
from molmo2_nemo.training.step_result import StepResult
from molmo2_nemo.training.step_statistics import StepStatistics, Tasks
from molmo2_nemo.training.whereabouts import here
from molmo2_nemo.transfer import Copies, to_device


@dataclass
class MicroBatch:
    """What training takes: made of a batch at once, or ahead (ahead.py)."""

    inputs: PackInputs
    state: Any  # the loader's, after it
    statistics: StepStatistics
    of_step: int | None  # micro-batches of its step on this rank, where they are assigned step by step
    copies: Copies
    records: list[str]  # keys


@dataclass
class MicroBatches:
    """Takes micro-batches for the model of this rank.

    Args:
        plan: finds what the model does with a micro-batch (Molmo2Model.plan), for those that are made ahead.
    """

    model_config: Molmo2Config
    trainable: Trainable
    groups: dict[int, ContextGroups]  # of the model: number of context ranks that share a pack -> their groups
    tasks: Tasks
    cut_padding: bool
    sequence_parallel: bool
    plan: Callable[[PackInputs], PackPlan]
    token_multiple: int = 1  # cut_padding: of a rank's tokens; settings/precision.py
    balance_ring: bool = (
        False  # ranks that show each other keys get even shares of a pack's pairs (attention/balance.py)
    )

    def take(self, loader: Iterator[Any], result: StepResult, consumed: Callable[[Any], None] | None) -> PackInputs:
        """The next one, on this rank's device; counted in the step's result.

        Args:
            loader: of batches, or of those that `ahead` made of them.
            consumed: told the loader's state after it, for checkpoints; None: nobody keeps it.
        """
        result.clock.begins()
        here.fetches()
        start = time.perf_counter()
        taken = next(loader)
        result.statistics.wait += time.perf_counter() - start
        made = taken if isinstance(taken, MicroBatch) else self.made(taken)
        here.computes(made.records)
        if consumed is not None:
            consumed(made.state)
        result.statistics.include(made.statistics)
        made.copies.use()
        return made.inputs

    def ahead(self, batches: Iterable[Batch], most: int | None = None) -> Ahead[Batch, MicroBatch]:
        """The same micro-batches, each planned and brought to the device while the one before is computed.

        Args:
            most: micro-batches that training will take.
        """
        where = device()
        stream = torch.cuda.Stream(where) if where.type == "cuda" else None

        def make(batch: Batch) -> MicroBatch:
            if stream is not None:
                torch.cuda.set_device(where)  # a thread begins with the first
            copies = Copies(stream)
            with copies.begun():
                made = self.made(batch, ahead=True)
                made.inputs.plan = self.plan(made.inputs)
            return replace(made, copies=copies)

        return Ahead(batches, make, most)

    def made(self, batch: Batch, ahead: bool = False) -> MicroBatch:
        """The batch as training takes it, its arrays on the way to the device; where it is made ahead, without the
        crops, of which `plan` chooses this rank's."""
        groups = self.groups[batch.context_ranks or max(self.groups)]
        statistics = StepStatistics()
        if groups.rank == 0 and is_first_of_replica(context=False):
            statistics.add(batch, self.model_config, self.trainable)
        if self.cut_padding:
            tensor = parallel_state.get_tensor_model_parallel_world_size() if self.sequence_parallel else 1
            batch = without_padding(batch, groups.size * tensor * self.token_multiple)
        mask = None
        if self.balance_ring and group_size(groups.ring) > 1:
            batch, mask = self._balanced(batch, group_size(groups.ring))
        inputs = self._inputs(batch, groups, ahead)
        inputs.in_pack_order = mask
        records = [key for pack in batch.keys for key in pack]
        return MicroBatch(inputs, batch.state, statistics, batch.of_step or None, Copies(), records)

    def _balanced(self, batch: Batch, ranks: int) -> tuple[Batch, TokenMask]:
        """The batch with its tokens in the order of the ranks that hold them, and its mask, which has the pack's."""
        config = self.model_config
        numbers = image_numbers(batch.input_ids, batch.visual, config.text.vocab_size)
        host = np.stack((batch.example_ids, batch.branch_ids, numbers))
        example, branch, image = (to_device(part, device()) for part in host)
        mask = TokenMask(example, branch, image, config.visual_attention, host)
        mask.order = balanced_order(mask, ranks)
        return batch if mask.order is None else reordered(batch, mask.order), mask

    def _inputs(self, batch: Batch, groups: ContextGroups, ahead: bool) -> PackInputs:
        inputs = PackInputs.from_batch(batch, device(), vision_later=ahead)
        inputs.groups = groups
        if (ids := self.tasks.ids(batch)) is not None:
            inputs.tasks = to_device(ids, device())
            inputs.num_tasks = len(self.tasks.names)
        return inputs


def micro_batch_loss(result: StepResult, sums: LossSums, num_tasks: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One micro-batch on the last pipeline stage, as Megatron's schedules want its loss: the sum that gradients flow
    from, a number of tokens, and what is reduced over the step. Adds to this rank's sum of weights.

    Args:
        num_tasks: that the loss is also logged for.
    """
    result.weight = result.weight + sums.weight
    # Megatron adds the middle value to an integer count that takes no part: gradients.py divides by weights.
    unused = sums.loss.new_zeros((), dtype=torch.int)  # torch.zeros(()) would wait for the device
    return sums.loss, unused, {"sums": sums.numbers(num_tasks)}


def step_loss(result: StepResult, micro_batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """Mean loss of the global batch, over micro-batches, data and context parallel ranks, also into the result. A
    collective of the last pipeline stage's ranks.

    Args:
        micro_batches: last values of `micro_batch_loss`, of this rank.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    total = global_sums([part["sums"] for part in micro_batches], group)
    result.loss, result.task_sums = global_loss(total), total[2:]
    return result.loss


def is_first_of_replica(*, context: bool = True) -> bool:
    """True on one of the ranks that work on the same packs; without `context`, on one for each context rank."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.is_pipeline_first_stage()
        and (not context or parallel_state.get_context_parallel_rank() == 0)
    )


def device() -> torch.device:
    """Where this rank's model is."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
