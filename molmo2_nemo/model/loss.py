"""What the loss is divided by, and which labels it takes. The loss itself is fused/cross_entropy.py.

    sum_i w_i (CE_i + z * logsumexp_i^2)        with CE_i = logsumexp_i - logit_i[label_i]

Only positions with w > 0 reach the head.

The normaliser is the sum of the weights of the WHOLE GLOBAL BATCH: over micro-batches, data and context parallel ranks
(paper, token weighting; official code olmo/train/trainer.py). No rank knows it before the last micro-batch, so the
model returns `LossSums`, undivided; `global_loss` divides the loss, and `finalize_gradients` (training/gradients.py)
the gradients by the same sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class LossSums:
    """What one rank's part of a micro-batch adds to the loss of its global batch."""

    loss: Tensor  # fp32 scalar, sum of weighted token losses; gradients flow from it alone
    weight: Tensor  # fp32 scalar, sum of the weights
    by_task: Tensor | None = None  # fp32 [2, tasks], the same two sums for every task, for the log; None: not known

    def numbers(self, num_tasks: int = 0) -> Tensor:
        """For adding up: fp32 [2 + 2 * num_tasks], loss, weight, losses of every task, weights of every task."""
        sums = torch.stack((self.loss.detach().float(), self.weight))
        by_task = sums.new_zeros(2 * num_tasks) if self.by_task is None else self.by_task.flatten()
        return torch.cat((sums, by_task))


def sum_of_weights(weights: Tensor) -> Tensor:
    """A micro-batch's part of the normaliser. weights: [B, T], those below 0 count as 0 -> fp32 scalar."""
    return weights.clamp(min=0).sum(dtype=torch.float32)


def global_sums(micro_batches: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
    """`LossSums.numbers` of a global batch, the same on every rank of `group`.

    Args:
        micro_batches: those of this rank.
        group: data and context parallel ranks together.
    """
    total = torch.stack(list(micro_batches)).sum(0)
    dist.all_reduce(total, group=group)
    return total


def global_loss(sums: Tensor) -> Tensor:
    """The loss of a global batch, weighted losses over weights, fp32 scalar; 0 where nothing has weight.

    Args:
        sums: from `global_sums`.
    """
    return sums[0] / sums[1].clamp(min=torch.finfo(torch.float32).tiny)


def check_labels(labels: np.ndarray, vocab_size: int) -> None:
    """Refuse labels that the head cannot predict: an extra id, or padding with a positive weight.

    Args:
        labels: int64 [n], of the positions with a loss, on the host: to look at them on a device would wait for it.

    Raises:
        AssertionError: names the first one.
    """
    bad = labels[(labels < 0) | (labels >= vocab_size)]
    if len(bad):
        raise AssertionError(
            f"a position with loss has label {int(bad[0])}, but only ids 0..{vocab_size - 1} can be predicted: "
            "visual special tokens and padding must carry loss weight 0"
        )
