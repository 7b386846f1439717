"""Vision over context- and tensor-parallel ranks: who encodes which crops, and how pooled tokens reach their owners.

Crops are dealt in indivisible units (a picture with its tiles, or one video frame) in contiguous runs whose largest
cost is as small as contiguous runs allow: crops lie in the order of their tokens, so most pooled tokens of a run belong
to the rank that made them and never travel. Each rank encodes and pools its own run; one all-to-all then sends every
pooled token to the rank that owns its position in the sequence. Every rank knows the whole plan from the batch alone,
so no sizes are exchanged, and a rank without crops takes part like any other.

With sequence parallelism a position has one owner among the context x tensor ranks. Without, every tensor rank holds
all tokens of its context shard: each gets a copy, and only the one with the sender's tensor rank returns the gradient,
which is the same on all of them. Either way the encoder's gradients are partial sums over the tensor-parallel group too
(`mark_partial`; nemo/optimizer.py adds them up once a step).

Shape legend: U units, C crops, P patches per crop, N pooled tokens, K window slots, S tokens of a pack, V ranks that
share the vision work (context x tensor, tensor fastest), T tokens of a pack on one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from molmo2_nemo.parallel.partition import deal_runs


@dataclass
class CropPlan:
    """This rank's part of a micro-batch's vision work. All tensors live on the host."""

    crops: slice  # of the C crops, this rank's run
    rows: slice  # of the N pooling rows, this rank's run
    pieces: list[tuple[slice, slice]]  # crops and rows that are encoded together; consecutive, they make up the run
    send_order: Tensor  # int64 [sent], this rank's rows by the rank they go to
    send_counts: list[int]  # rows for every rank of the group
    receive_counts: list[int]  # rows from every rank of the group
    targets: Tensor  # int64 [received], index into the flattened [T, B] tokens of this rank
    returning: list[bool] = field(default_factory=list)  # ranks with which gradients are exchanged in the backward


def plan_crops(
    unit_crops: Tensor,
    unit_pooled_tokens: Tensor,
    pooled_positions: Tensor,
    size: int,
    packs: int,
    context: int,
    rank: int,
    *,
    tensor: int = 1,
    sequence: bool = False,
    crop_cost: float = 1.0,
    row_cost: float = 0.0,
    chunk: int | None = None,
) -> CropPlan:
    """Deal units to ranks and find out who sends which pooled token where.

    Args:
        unit_crops, unit_pooled_tokens: int64 [U], crops and pooling rows of each unit, in order.
        pooled_positions: int64 [N], flattened b * S + s of each row's token.
        size: S, a multiple of context (times tensor with `sequence`).
        packs: B.
        context, tensor: ranks that share a pack, and tensor-parallel ranks of each.
        rank: place among the context * tensor ranks, tensor fastest.
        sequence: a context rank's tokens are cut into one shard per tensor rank.
        crop_cost, row_cost: what encoding a crop and pooling a row cost.
        chunk: crops encoded together at most (a larger unit is encoded alone); None: all.
    """
    ranks, copies = context * tensor, 1 if sequence else tensor
    tokens = size * copies // ranks
    bounds = deal_runs((unit_crops * crop_cost + unit_pooled_tokens * row_cost).numpy(), ranks)
    crop_start, row_start = (
        torch.cat((u.new_zeros(1), u.cumsum(0))).tolist() for u in (unit_crops, unit_pooled_tokens)
    )
    runs = [slice(row_start[a], row_start[b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    owner = pooled_positions % size // tokens  # [N], the owning shard; `copies` ranks hold it
    mine = runs[rank]
    targets, receive_counts = [], []
    for run in runs:
        positions = pooled_positions[run][owner[run] == rank // copies]
        targets.append((positions % size % tokens) * packs + positions // size)
        receive_counts.append(positions.numel())
    orders = [(owner[mine] == shard).nonzero()[:, 0] for shard in range(ranks // copies)]
    orders = [order for order in orders for _ in range(copies)]
    return CropPlan(
        crops=slice(crop_start[bounds[rank]], crop_start[bounds[rank + 1]]),
        rows=mine,
        pieces=_pieces(crop_start, row_start, bounds[rank], bounds[rank + 1], chunk),
        send_order=torch.cat(orders),
        send_counts=[order.numel() for order in orders],
        receive_counts=receive_counts,
        targets=torch.cat(targets),
        returning=[other % copies == rank % copies for other in range(ranks)],
    )


def _pieces(
    crop_start: list[int], row_start: list[int], first: int, last: int, chunk: int | None
) -> list[tuple[slice, slice]]:
    """Units first..last in consecutive pieces of at most `chunk` crops, or of one unit."""
    found = []
    while first < last:
        stop = first + 1
        while stop < last and (chunk is None or crop_start[stop + 1] - crop_start[first] <= chunk):
            stop += 1
        found.append((slice(crop_start[first], crop_start[stop]), slice(row_start[first], row_start[stop])))
        first = stop
    return found


def exchange(rows: Tensor, plan: CropPlan, group: dist.ProcessGroup | None) -> Tensor:
    """Send pooled tokens to the owners of their positions.

    Args:
        rows: [this rank's rows, D], in row order.
        group: the V ranks; None where this rank is alone.

    Returns:
        [received, D], matching plan.targets.
    """
    return rows if group is None or dist.get_world_size(group) == 1 else _Exchange.apply(rows, plan, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: CropPlan, group: dist.ProcessGroup) -> Tensor:
        ctx.plan, ctx.group, ctx.count = plan, group, rows.shape[0]
        return _all_to_all(rows[plan.send_order.to(rows.device)], plan.send_counts, plan.receive_counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        plan = ctx.plan
        back = _all_to_all(
            _chosen(grad, plan.receive_counts, plan.returning),
            [n * r for n, r in zip(plan.receive_counts, plan.returning, strict=True)],
            [n * r for n, r in zip(plan.send_counts, plan.returning, strict=True)],
            ctx.group,
        )
        order = _chosen(plan.send_order, plan.send_counts, plan.returning).to(grad.device)  # every row once
        return grad.new_empty(ctx.count, grad.shape[1]).index_copy_(0, order, back), None, None


def _chosen(x: Tensor, counts: list[int], chosen: list[bool]) -> Tensor:
    """The parts of x that belong to chosen ranks."""
    if all(chosen):
        return x
    return torch.cat([part for part, keep in zip(x.split(counts), chosen, strict=True) if keep])


def _all_to_all(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(receive), x.shape[1])
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out


def mark_partial(module: torch.nn.Module) -> None:
    """Mark parameters whose gradients are partial sums over the tensor-parallel group."""
    for parameter in module.parameters():
        parameter.partial_over_tensor = True  # type: ignore[attr-defined]


class _TieParameters(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.shapes = [(p.shape, p.dtype, p.device) if p.requires_grad else None for p in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        zeros = (
            s if s is None else torch.zeros((), dtype=s[1], device=s[2]).expand(s[0])  # no memory per element
            for s in ctx.shapes
        )
        return grad, *zeros


def tie_parameters(x: Tensor, module: torch.nn.Module) -> Tensor:
    """x, with a zero gradient for every parameter of `module`.

    A rank (or micro-batch) without crops does not run the encoder. Its output must still belong to the graph, or this
    rank would sit out the backward all-to-all, and gradient reductions that wait for every parameter would hang.
    """
    return _TieParameters.apply(x, *module.parameters())
