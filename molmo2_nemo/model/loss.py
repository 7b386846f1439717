"""Weighted cross entropy with z-loss over a vocabulary-parallel head, a chunk of positions at a time.

    sum_i w_i (CE_i + z * logsumexp_i^2)        with CE_i = logsumexp_i - logit_i[label_i]

Only positions with w > 0 reach the head. Logits exist for one chunk at a time and are recomputed in backward, so memory
is O(chunk * V / TP).

The normaliser is the sum of the weights of the WHOLE GLOBAL BATCH: over micro-batches, data and context parallel ranks
(paper, token weighting; official code olmo/train/trainer.py). No rank knows it before the last micro-batch, so the
model returns `LossSums`, undivided; `global_loss` divides the loss, and `finalize_gradients` (training/gradients.py)
the gradients by the same sum.

Shape legend: n positions, D width, V_t rows of the head on this tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


def weighted_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    weights: Tensor,
    z_loss: float,
    vocab_size: int,
    group: dist.ProcessGroup,
    chunk: int,
    each: Tensor | None = None,
) -> Tensor:
    """Sum of weighted losses, fp32 scalar, the same on every rank of the tensor-parallel group.

    Args:
        hidden: [n, D]; its gradient is this rank's part only (sum it over the group).
        head: [V_t, D], this rank's consecutive rows of the padded vocabulary.
        labels: int64 [n], below vocab_size.
        weights: fp32 [n].
        vocab_size: true columns; padded ones beyond it take no part.
        each: fp32 [n], filled with the weighted loss of every position (for logging: no gradient flows from it).

    Every label must be one that the head can predict; `check_labels` tells, on the host.
    """
    return _WeightedLoss.apply(hidden, head, labels, weights, z_loss, vocab_size, group, chunk, each)


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        weights: Tensor,
        z_loss: float,
        vocab_size: int,
        group: dist.ProcessGroup,
        chunk: int,
        each: Tensor | None,
    ) -> Tensor:
        rank_start = dist.get_rank(group) * head.shape[0]
        total = hidden.new_zeros((), dtype=torch.float32)
        sums = []
        for rows in _chunks(hidden.shape[0], chunk):
            logits = _logits(hidden[rows], head, rank_start, vocab_size)
            lse = _logsumexp(logits, group)
            target = _reduce(_pick(logits, labels[rows] - rank_start), group, dist.ReduceOp.SUM)
            losses = weights[rows] * (lse - target + z_loss * lse.square())
            total += losses.sum()
            if each is not None:
                each[rows] = losses
            sums.append(lse)
        ctx.save_for_backward(hidden, head, labels, weights, torch.cat(sums) if sums else weights.new_zeros(0))
        ctx.settings = (z_loss, vocab_size, rank_start, chunk)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, labels, weights, lses = ctx.saved_tensors
        z_loss, vocab_size, rank_start, chunk = ctx.settings
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if need_head else None
        for rows in _chunks(hidden.shape[0], chunk):
            probabilities = (_logits(hidden[rows], head, rank_start, vocab_size) - lses[rows, None]).exp()
            d_logits = probabilities * (1 + 2 * z_loss * lses[rows, None])
            local = labels[rows] - rank_start
            mine = (local >= 0) & (local < head.shape[0])
            # one column of every row: nothing is added up, so the order does not matter
            d_logits.scatter_add_(1, local.clamp(0, head.shape[0] - 1)[:, None], -mine[:, None].to(d_logits.dtype))
            d_logits *= (grad * weights[rows])[:, None]
            d_logits = d_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = d_logits @ head
            if grad_head is not None:
                grad_head += (d_logits.T @ hidden[rows]).float()
        return (grad_hidden, None if grad_head is None else grad_head.to(head.dtype), *([None] * 7))


def _chunks(n: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)]


def _logits(hidden: Tensor, head: Tensor, rank_start: int, vocab_size: int) -> Tensor:
    """fp32 [n, V_t]; padded columns are -inf."""
    logits = (hidden @ head.T).float()
    real = max(0, min(vocab_size - rank_start, head.shape[0]))
    logits[:, real:] = float("-inf")
    return logits


def _logsumexp(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    top = _reduce(logits.amax(1), group, dist.ReduceOp.MAX)
    return _reduce((logits - top[:, None]).exp().sum(1), group, dist.ReduceOp.SUM).log() + top


def _pick(logits: Tensor, local: Tensor) -> Tensor:
    """Each row's logit of its label, 0 where another rank holds it."""
    mine = (local >= 0) & (local < logits.shape[1])
    return logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0].masked_fill(~mine, 0.0)


def _reduce(x: Tensor, group: dist.ProcessGroup, op: Any) -> Tensor:
    if dist.get_world_size(group) > 1:
        dist.all_reduce(x, op=op, group=group)
    return x
