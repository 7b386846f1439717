"""Vision over the context-parallel group: who encodes which crops, and how pooled tokens reach their owners.

Crops are dealt in indivisible units (a picture with its tiles, or one video frame) in contiguous runs of about equal
size. Each rank encodes and pools its own run; one all-to-all then sends every pooled token to the rank that owns its
position in the sequence. Every rank knows the whole plan from the batch alone, so no sizes are exchanged, and a rank
without crops takes part like any other.

Shape legend: U units, C crops, P patches per crop, N pooled tokens, K window slots, S tokens of a pack, T = S / CP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class CropPlan:
    """This rank's part of a micro-batch's vision work. All tensors live on the host."""

    crops: slice  # of the C crops, this rank's run
    rows: slice  # of the N pooling rows, this rank's run
    send_order: Tensor  # int64 [rows], this rank's rows sorted by the rank that owns their position
    send_counts: list[int]  # rows for every rank of the group
    receive_counts: list[int]  # rows from every rank of the group
    targets: Tensor  # int64 [received], index into the flattened [T, B] tokens of this rank


def plan_crops(
    unit_crops: Tensor, unit_rows: Tensor, pooled_positions: Tensor, size: int, packs: int, cp_size: int, cp_rank: int
) -> CropPlan:
    """Deal units to ranks and find out who sends which pooled token where.

    Args:
        unit_crops, unit_rows: int64 [U], crops and pooling rows of each unit, in order.
        pooled_positions: int64 [N], flattened b * S + s of each row's token.
        size: S, a multiple of cp_size.
        packs: B.
    """
    tokens = size // cp_size
    bounds = _deal(unit_crops, cp_size)
    crop_start = torch.cat((unit_crops.new_zeros(1), unit_crops.cumsum(0)))
    row_start = torch.cat((unit_rows.new_zeros(1), unit_rows.cumsum(0)))
    runs = [slice(int(row_start[bounds[r]]), int(row_start[bounds[r + 1]])) for r in range(cp_size)]
    owner = pooled_positions % size // tokens  # [N]
    mine = runs[cp_rank]
    targets, receive_counts = [], []
    for run in runs:
        positions = pooled_positions[run][owner[run] == cp_rank]
        targets.append((positions % size % tokens) * packs + positions // size)
        receive_counts.append(positions.numel())
    return CropPlan(
        crops=slice(int(crop_start[bounds[cp_rank]]), int(crop_start[bounds[cp_rank + 1]])),
        rows=mine,
        send_order=torch.sort(owner[mine], stable=True).indices,
        send_counts=torch.bincount(owner[mine], minlength=cp_size).tolist(),
        receive_counts=receive_counts,
        targets=torch.cat(targets),
    )


def _deal(unit_crops: Tensor, ranks: int) -> list[int]:
    """Cut the units into `ranks` runs whose ends are nearest to equal shares of the crops; runs may be empty."""
    total = unit_crops.cumsum(0)
    bounds = [0]
    for rank in range(1, ranks):
        share = total[-1] * rank / ranks if len(total) else torch.tensor(0.0)
        ends = torch.cat((total.new_zeros(1), total)).float()
        bounds.append(max(bounds[-1], int((ends - share).abs().argmin())))
    return [*bounds, len(unit_crops)]


def exchange(rows: Tensor, plan: CropPlan, group: dist.ProcessGroup) -> Tensor:
    """Send pooled tokens to the owners of their positions.

    Args:
        rows: [this rank's rows, D], in row order.

    Returns:
        [received, D], matching plan.targets.
    """
    if dist.get_world_size(group) == 1:
        return rows
    ordered = rows[plan.send_order.to(rows.device)]
    return _Exchange.apply(ordered, plan.send_counts, plan.receive_counts, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = (send, receive), group
        return _all_to_all(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive = ctx.counts
        return _all_to_all(grad, receive, send, ctx.group), None, None, None


def _all_to_all(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(receive), x.shape[1])
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out


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
