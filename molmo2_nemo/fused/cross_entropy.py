"""Weighted cross entropy with z-loss over a vocabulary-parallel head, a chunk of positions at a time.

    sum_i w_i (CE_i + z * logsumexp_i^2)        with CE_i = logsumexp_i - logit_i[label_i]

Every way takes the arguments of `plain`, and no way waits for a device. They differ in when gradients are computed:

    plain      in backward, from logits computed again: four products with the head
    fused      in forward, beside the loss: three products, or two where the head is frozen. What waits for backward is
               the gradient of hidden, [n, D], and the head's own where it trains
    compiled   as fused, with what is done to logits between two products in few kernels

Shape legend: n positions, D width, V_t rows of the head on this tensor-parallel rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from molmo2_nemo.fused.compiled import Compiled


def plain(
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

    Every label must be one that the head can predict; `check_labels` (model/loss.py) tells, on the host.
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
            logits = _logits(hidden[rows], head, rank_start, vocab_size)
            d_logits = _plain_gradient(logits, lses[rows], labels[rows] - rank_start, grad * weights[rows], z_loss)
            del logits  # a chunk's are gone before the next one's are there
            d_logits = d_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = d_logits @ head
            if grad_head is not None:
                grad_head += d_logits.T @ hidden[rows]
            del d_logits
        return (grad_hidden, None if grad_head is None else grad_head.to(head.dtype), *([None] * 7))


def _plain_gradient(logits: Tensor, lse: Tensor, local: Tensor, weights: Tensor, z_loss: float) -> Tensor:
    """The gradient of weighted losses for fp32 logits [n, V_t], in their place."""
    d_logits = logits.sub_(lse[:, None]).exp_().mul_(1 + 2 * z_loss * lse[:, None])
    mine = (local >= 0) & (local < logits.shape[1])
    # one column of every row: nothing is added up, so the order does not matter
    d_logits.scatter_add_(1, local.clamp(0, logits.shape[1] - 1)[:, None], -mine[:, None].to(d_logits.dtype))
    return d_logits.mul_(weights[:, None])


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


@dataclass(frozen=True)
class _Parts:
    """What is done to the logits of a chunk [n, V_t]; `real` columns are no padding."""

    alone: Callable[..., tuple[Tensor, Tensor]]
    top: Callable[..., Tensor]
    sums: Callable[..., Tensor]
    gradient: Callable[..., tuple[Tensor, Tensor]]


def _masked(logits: Tensor, real: int) -> Tensor:
    """fp32, padded columns -inf."""
    if real == logits.shape[1]:
        return logits.float()
    padding = torch.arange(logits.shape[1], device=logits.device) >= real
    return logits.float().masked_fill(padding, float("-inf"))


def _top(logits: Tensor, real: int) -> Tensor:
    """Each row's largest logit on this rank, fp32 [n]."""
    return _masked(logits, real).amax(1)


def _sums(logits: Tensor, top: Tensor, local: Tensor, real: int) -> Tensor:
    """fp32 [2, n]: this rank's part of the sum of exponentials below `top`, and of the label's logit."""
    shown = _masked(logits, real)
    return torch.stack(((shown - top[:, None]).exp().sum(1), _pick(shown, local)))


def _gradient(
    logits: Tensor, lse: Tensor, target: Tensor, local: Tensor, weights: Tensor, z_loss: float, real: int
) -> tuple[Tensor, Tensor]:
    """Weighted losses, fp32 [n], and their gradient for the logits, in the logits' dtype."""
    losses = weights * (lse - target + z_loss * lse.square())
    columns = torch.arange(logits.shape[1], device=logits.device)
    probabilities = (_masked(logits, real) - lse[:, None]).exp() * (1 + 2 * z_loss * lse[:, None])
    gradient = weights[:, None] * (probabilities - (columns == local[:, None]).float())
    return losses, gradient.to(logits.dtype)


def _alone(logits: Tensor, local: Tensor, weights: Tensor, z_loss: float, real: int) -> tuple[Tensor, Tensor]:
    """`_gradient` where one rank has all columns."""
    top = _top(logits, real)
    total, target = _sums(logits, top, local, real)
    return _gradient(logits, total.log() + top, target, local, weights, z_loss, real)


_EAGER = _Parts(_alone, _top, _sums, _gradient)
_COMPILED = _Parts(
    Compiled(_alone, 0, 1, 2), Compiled(_top, 0), Compiled(_sums, 0, 1, 2), Compiled(_gradient, *range(5))
)


def _fused(
    parts: _Parts,
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
    """`plain`, with gradients computed in forward. Backward works once."""
    wanted = torch.is_grad_enabled()
    needed = wanted and hidden.requires_grad, wanted and head.requires_grad
    return _FusedLoss.apply(hidden, head, parts, *needed, labels, weights, z_loss, vocab_size, group, chunk, each)


fused, by_compiler = functools.partial(_fused, _EAGER), functools.partial(_fused, _COMPILED)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        parts: _Parts,
        need_hidden: bool,
        need_head: bool,
        labels: Tensor,
        weights: Tensor,
        z_loss: float,
        vocab_size: int,
        group: dist.ProcessGroup,
        chunk: int,
        each: Tensor | None,
    ) -> Tensor:
        rank_start = dist.get_rank(group) * head.shape[0]
        real = max(0, min(vocab_size - rank_start, head.shape[0]))
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_head = None
        chunks = _chunks(hidden.shape[0], chunk)
        for rows in chunks:
            local = labels[rows] - rank_start
            losses, d_logits = _losses(parts, hidden[rows], head, local, weights[rows], z_loss, real, group)
            total += losses.sum()
            if each is not None:
                each[rows] = losses
            if grad_hidden is not None:
                torch.mm(d_logits, head, out=grad_hidden[rows])
            if need_head:
                grad_head = _head_gradient(grad_head, d_logits, hidden[rows], alone=len(chunks) == 1)
            del d_logits  # before the next chunk's are there, and before the head's gradient gets its dtype
        if need_head and grad_head is None:
            grad_head = torch.zeros_like(head)
        ctx.gradients = grad_hidden, None if grad_head is None else grad_head.to(head.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the fused loss can be differentiated once: its gradients are used up"
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if g is None else g.mul_(grad) for g in gradients), *([None] * 10))


def _losses(
    parts: _Parts,
    hidden: Tensor,
    head: Tensor,
    local: Tensor,
    weights: Tensor,
    z_loss: float,
    real: int,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Weighted losses [n], and the gradient for this rank's logits [n, V_t]."""
    logits = hidden @ head.T
    if dist.get_world_size(group) == 1:
        return parts.alone(logits, local, weights, z_loss, real)
    top = _reduce(parts.top(logits, real), group, dist.ReduceOp.MAX)
    total, target = _reduce(parts.sums(logits, top, local, real), group, dist.ReduceOp.SUM)
    return parts.gradient(logits, total.log() + top, target, local, weights, z_loss, real)


def _head_gradient(before: Tensor | None, d_logits: Tensor, hidden: Tensor, *, alone: bool) -> Tensor:
    """The head's gradient with a chunk's added in its place: fp32 [V_t, D], or in the head's dtype where there is one
    chunk only."""
    if alone:
        return d_logits.T @ hidden
    if before is None:
        before = torch.zeros(d_logits.shape[1], hidden.shape[1], dtype=torch.float32, device=hidden.device)
    if hidden.dtype == torch.float32:
        return before.addmm_(d_logits.T, hidden)
    if hidden.is_cuda and ADDS_IN_FP32:
        return torch.addmm(before, d_logits.T, hidden, out_dtype=torch.float32, out=before)
    return before.add_(d_logits.T @ hidden)


# whether this PyTorch's products of bf16 are added to fp32 without a detour (CUDA only)
ADDS_IN_FP32 = "dtype_out" in torch.ops.aten.addmm.overloads()
