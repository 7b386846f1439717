"""Data-parallel communication beside computation: gradients reduced in backward, parameters gathered in forward.

Megatron's DistributedDataParallel does the sending, bucket by bucket. What is here makes it safe for a model whose
ranks do not all run the same modules.

Gradients: Megatron reduces a bucket once all its gradients are there. A rank without crops has the vision encoder's
zeros in another order than a rank that ran it, and would send its buckets in another order than the others: a hang, or
sums of different things. `InOrder` sends every bucket after the one before.

Parameters: Megatron begins a gather when a module's forward first asks for it, so a rank that runs no vision encoder
would gather nothing of it. Here all gathers begin right after the update, in one order on all ranks; before a part of
the model runs (`parts`), it waits for its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from megatron.core.transformer.transformer_block import TransformerBlock
from torch import nn

from molmo2_nemo.model.molmo2 import Molmo2Model
from molmo2_nemo.model.vision import VisionEncoder
from molmo2_nemo.training.fsdp import is_sharded

CONTAINERS = (Molmo2Model, TransformerBlock, VisionEncoder, nn.ModuleList)  # run their parts one after another


class InOrder:
    """Starts the reduction of bucket groups in their order, whatever order they become ready in.

    Args:
        groups: of one DistributedDataParallel; their `start_grad_sync` is replaced.
    """

    def __init__(self, groups: list[Any]) -> None:
        self.groups = groups
        self._starts = [group.start_grad_sync for group in groups]
        self._ready: dict[int, dict[str, Any]] = {}
        self._next = 0
        for number, group in enumerate(groups):
            group.start_grad_sync = functools.partial(self._start, number)

    def _start(self, number: int, **options: Any) -> None:
        self._ready[number] = options
        while self._next in self._ready:
            self._starts[self._next](**self._ready.pop(self._next))
            self._next += 1
        if self._next == len(self.groups):
            self._next = 0

    def start_rest(self) -> None:
        """The backward pass of the last micro-batch is over: start what has not been ready.

        Raises:
            RuntimeError: gradients were added to a bucket after its reduction had begun.
        """
        for number, group in enumerate(self.groups):
            usual, seen = group.golden_per_param_grad_ready_counts, group.per_param_grad_ready_counts
            if not group.is_first_batch and any(count > usual.get(p, 0) for p, count in seen.items()):
                raise RuntimeError(
                    "a parameter got more gradients in one backward pass than in the first step's, after their "
                    "reduction had begun; train with parallel.overlap_grad_reduce=false"
                )
            if not group.is_first_batch and group.grad_reduce_handle is None and number not in self._ready:
                self._start(number)


def install(chunk: Any) -> None:
    """Make the overlap that a DistributedDataParallel was asked for safe. Called once, before the first step."""
    config = chunk.ddp_config
    if config.overlap_grad_reduce:
        chunk.reductions = InOrder(chunk.bucket_groups)
    if config.use_distributed_optimizer and config.overlap_param_gather:
        chunk.disable_forward_pre_hook(param_sync=False)
        for part, groups in parts(chunk):
            part.register_forward_pre_hook(functools.partial(_wait, groups))


def parts(chunk: Any) -> Iterator[tuple[nn.Module, list[Any]]]:
    """The modules that wait for parameters before they run, with the bucket groups of these. Together they have all
    parameters that are trained; what lies inside one may use the parameters of any other inside."""
    model = next(module for module in chunk.modules() if isinstance(module, Molmo2Model))

    def inside(module: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
        whole = not isinstance(module, CONTAINERS)
        yield module, whole
        if not whole:
            for child in module.children():
                yield from inside(child)

    for module, whole in inside(model):
        own = {id(g): g for p in module.parameters(recurse=whole) if (g := chunk.param_to_bucket_group.get(p))}
        if own:
            yield module, list(own.values())


def _wait(groups: list[Any], *unused: Any) -> None:
    for group in groups:
        if group.param_gather_handle is not None:
            group.param_gather_dispatched = True  # which Megatron forgets when gradients have been reduced meanwhile
            group.finish_param_sync(skip_next_bucket_dispatch=True)


def finish_gathers(chunks: list[Any]) -> None:
    """Wait for all parameters. For whoever reads them otherwise than by running the model, such as a checkpoint."""
    for chunk in chunks:
        if not is_sharded(chunk):
            _wait(chunk.bucket_groups)


def start_gathers(chunks: list[Any]) -> None:
    """Begin to gather the parameters that an update has changed, where that is to happen beside the forward pass. A
    collective of the data-parallel ranks."""
    for chunk in chunks:
        if is_sharded(chunk):
            continue  # as layers run
        if chunk.ddp_config.use_distributed_optimizer and chunk.ddp_config.overlap_param_gather:
            finish_gathers([chunk])  # those of parts that have not run since
            chunk.start_param_sync()


def described(config: Any, adding: str | None) -> str:
    """One line for the log.

    Args:
        config: a DistributedDataParallelConfig.
        adding: the library that adds weight gradients in their product (training/model.py).
    """
    added = f"added by {adding}" if adding else "added one by one (neither Transformer Engine nor Apex is there)"
    reduced = "fp32" if config.grad_reduce_in_fp32 else "the parameters' dtype"
    if config.use_megatron_fsdp:
        return f"gradients: reduced in {reduced}, layer by layer; parameters: gathered layer by layer by Megatron-FSDP"
    reducing = "beside the backward pass" if config.overlap_grad_reduce else "after the backward pass"
    gathering = "beside the forward pass" if config.overlap_param_gather else "after the update"
    line = f"gradients: {added}, reduced in {reduced}, {reducing}"
    return f"{line}; parameters gathered {gathering}" if config.use_distributed_optimizer else line
