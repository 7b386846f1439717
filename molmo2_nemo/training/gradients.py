"""From the gradients of a rank's micro-batches to those of the global batch: reduced, divided, added up.

The divisor is the sum of the global batch's loss weights (model/loss.py), floats whose sum may be below 1. Megatron
divides by a number of tokens: before 0.18 by any above 0, from 0.18 on by one that it raises to 1. So it is given no
number, and the division is here, the same under every version.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from molmo2_nemo.training.whereabouts import Work, here


def finalize_gradients(model: list[Any], weight: Tensor | float, **options: Any) -> None:
    """Turn sums of this rank's weighted gradients into the gradient of the global batch's loss. What a host sets as
    Megatron's `finalize_model_grads_func`, with the weight in place of a number of tokens.

    Args:
        model: this rank's parts, each in Megatron's DistributedDataParallel.
        weight: this rank's sum of loss weights over the micro-batches of the step; 0 on pipeline stages without a loss.
        options: further arguments of Megatron's function.
    """
    here.at(Work.EXCHANGING)
    for chunk in model:
        if (reductions := getattr(chunk, "reductions", None)) is not None:  # beside the backward pass: overlap.py
            reductions.start_rest()
    finalize_model_grads(model, None, **options)
    factor = scale(weight)
    for chunk in model:
        chunk.scale_gradients(factor)
    sum_partial_gradients(model)


def scale(weight: Tensor | float) -> Tensor:
    """What gradients are multiplied by, fp32 [1], alike on all ranks: one over the sum of the global batch's weights. 1
    where nothing has weight, and so no gradient. No rank waits for a device.

    Args:
        weight: this rank's sum. The last pipeline stage's counts, all others compute no loss; it is added up over data
            and context parallel ranks.
    """
    total = torch.as_tensor(weight, dtype=torch.float32, device=torch.cuda.current_device()).clone().reshape(1)
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(total, src=dist.get_process_group_ranks(pipeline)[-1], group=pipeline)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return torch.where(total > 0, 1.0 / total, torch.ones_like(total))


def sum_partial_gradients(model: list[Any]) -> None:
    """Add up over the tensor-parallel group what its ranks computed from different crops (parallel/crops.py)."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    grads = [
        p.main_grad
        for m in model
        for p in m.parameters()
        if getattr(p, "partial_over_tensor", False) and p.requires_grad
    ]
    for together in torch._utils._take_tensors(grads, 1 << 28):  # bytes that travel at once
        flat = torch._utils._flatten_dense_tensors(together)
        torch.distributed.all_reduce(flat, group=group)
        for grad, summed in zip(together, torch._utils._unflatten_dense_tensors(flat, together), strict=True):
            grad.copy_(summed)
