"""Vision over context- and tensor-parallel ranks: who encodes which crops, and how pooled tokens reach their owners.

Crops are sharded in indivisible units (an image with its tiles, or one video frame), as contiguous runs whose largest
cost is as small as contiguous runs allow: crops lie in the order of their tokens, so most pooled tokens of a run belong
to the rank that made them and never travel. Each rank encodes and pools its own run; one all-to-all then sends every
pooled token to the rank that owns its position in the sequence. Every rank knows the whole plan from the batch alone,
so no sizes are exchanged, and a rank without crops takes part like any other.

With sequence parallelism a position has one owner among the context x tensor ranks. Without, every tensor rank holds
all tokens of its context shard: each gets a copy, and only the one with the sender's tensor rank returns the gradient,
which is the same on all of them. Either way the encoder's gradients are partial sums over the tensor-parallel group too
(`mark_partial`; training/gradients.py adds them up once a step).

Shape legend: U units, C crops, N pooled tokens, B packs, S tokens of a pack, V ranks that share the vision work
(context x tensor, tensor fastest), T tokens of a pack on one of them, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from molmo2_nemo.parallel.context import ContextGroups, group_rank, group_size
from molmo2_nemo.parallel.partition import even_runs
from molmo2_nemo.transfer import to_device


@dataclass(frozen=True)
class VisionUnits:
    """The vision work of a micro-batch, in the order of its tokens. Tensors live on the host."""

    crops: Tensor  # int64 [U], of each unit
    pooled_tokens: Tensor  # int64 [U], of each unit
    costs: np.ndarray  # [U], by which units are balanced over ranks
    positions: Tensor  # int64 [N], flattened b * S + s of each pooled token's place
    packs: int  # B
    size: int  # S


@dataclass(frozen=True)
class VisionRanks:
    """The ranks that share the vision work, and which one this is."""

    context: int = 1  # ranks that share a pack's tokens
    tensor: int = 1  # tensor-parallel ranks of each
    rank: int = 0  # of the context * tensor, tensor fastest
    sequence: bool = False  # a context rank's tokens are cut into one shard per tensor rank

    @classmethod
    def of(cls, groups: ContextGroups, sequence: bool) -> VisionRanks:
        tensor = group_size(groups.vision) // groups.size
        return cls(groups.size, tensor, group_rank(groups.vision), sequence)

    @property
    def count(self) -> int:
        return self.context * self.tensor

    @property
    def copies(self) -> int:
        """Ranks that hold each token."""
        return 1 if self.sequence else self.tensor


@dataclass
class CropPlan:
    """This rank's part of a micro-batch's vision work. Tensors live on the host until `on` moves them."""

    crops: slice  # of the C crops, this rank's run
    pooled_tokens: slice  # of the N pooled tokens, this rank's run
    chunks: list[tuple[slice, slice]]  # crops and pooled tokens made together; consecutive, they make up the run
    send_order: Tensor  # int64 [sent], this rank's pooled tokens by the rank they go to
    send_counts: list[int]  # pooled tokens for every rank of the group
    receive_counts: list[int]  # pooled tokens from every rank of the group
    targets: Tensor  # int64 [received], index into the flattened [T, B] tokens of this rank
    returning: list[bool] = field(
        default_factory=list
    )  # by rank: whether gradients travel to and from it in the backward

    def within_run(self) -> CropPlan:
        """The plan for a rank that holds nothing but its own run of crops and pooled tokens: counted from there."""
        first, pooled = self.crops.start, self.pooled_tokens.start

        def from_run(run: slice, start: int) -> slice:
            return slice(run.start - start, run.stop - start)

        return replace(
            self,
            crops=from_run(self.crops, first),
            pooled_tokens=from_run(self.pooled_tokens, pooled),
            chunks=[(from_run(crops, first), from_run(tokens, pooled)) for crops, tokens in self.chunks],
        )

    def on(self, device: torch.device) -> CropPlan:
        """The plan with its indices on the device."""
        return replace(self, send_order=to_device(self.send_order, device), targets=to_device(self.targets, device))


def plan_crops(units: VisionUnits, ranks: VisionRanks, chunk: int | None = None, *, by_pack: bool = False) -> CropPlan:
    """Shard units among ranks and find out who sends which pooled token where.

    Args:
        units: their `size` is a multiple of the ranks among which a pack's tokens are cut.
        chunk: crops encoded together at most (a larger unit is encoded alone); None: all.
        by_pack: crops of two packs are never encoded together.
    """
    size, packs, copies, rank = units.size, units.packs, ranks.copies, ranks.rank
    tokens = size * copies // ranks.count
    bounds = even_runs(units.costs, ranks.count)
    crop_start, pooled_start = (
        torch.cat((u.new_zeros(1), u.cumsum(0))).tolist() for u in (units.crops, units.pooled_tokens)
    )
    runs = [slice(pooled_start[a], pooled_start[b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    owner = units.positions % size // tokens  # [N], the owning shard; `copies` ranks hold it
    mine = runs[rank]
    targets, receive_counts = [], []
    for run in runs:
        positions = units.positions[run][owner[run] == rank // copies]
        targets.append((positions % size % tokens) * packs + positions // size)
        receive_counts.append(positions.numel())
    packs_of_units = (units.positions[pooled_start[:-1]] // size).tolist() if by_pack else [0] * len(units.crops)
    orders = [(owner[mine] == shard).nonzero()[:, 0] for shard in range(ranks.count // copies)]
    orders = [order for order in orders for _ in range(copies)]
    return CropPlan(
        crops=slice(crop_start[bounds[rank]], crop_start[bounds[rank + 1]]),
        pooled_tokens=mine,
        chunks=_chunks(crop_start, pooled_start, packs_of_units, bounds[rank], bounds[rank + 1], chunk),
        send_order=torch.cat(orders),
        send_counts=[order.numel() for order in orders],
        receive_counts=receive_counts,
        targets=torch.cat(targets),
        returning=[other % copies == rank % copies for other in range(ranks.count)],
    )


def _chunks(
    crop_start: list[int], pooled_start: list[int], groups: list[int], first: int, last: int, most: int | None
) -> list[tuple[slice, slice]]:
    """Units first..last in consecutive chunks of one group and of at most so many crops, or of one unit."""
    found = []
    while first < last:
        stop = first + 1
        while stop < last and groups[stop] == groups[first]:
            if most is not None and crop_start[stop + 1] - crop_start[first] > most:
                break
            stop += 1
        found.append((slice(crop_start[first], crop_start[stop]), slice(pooled_start[first], pooled_start[stop])))
        first = stop
    return found


def send_to_owners(pooled: Tensor, plan: CropPlan, group: dist.ProcessGroup | None) -> Tensor:
    """Send pooled tokens to the owners of their positions.

    Args:
        pooled: [this rank's pooled tokens, D], in their order.
        group: the V ranks; None where this rank is alone.

    Returns:
        [received, D], matching plan.targets.
    """
    return pooled if group is None or dist.get_world_size(group) == 1 else _SendToOwners.apply(pooled, plan, group)


class _SendToOwners(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pooled: Tensor, plan: CropPlan, group: dist.ProcessGroup) -> Tensor:
        ctx.plan, ctx.group, ctx.count = plan, group, pooled.shape[0]
        return _all_to_all(pooled[plan.send_order], plan.send_counts, plan.receive_counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        plan = ctx.plan
        back = _all_to_all(
            _chosen(grad, plan.receive_counts, plan.returning),
            [n * r for n, r in zip(plan.receive_counts, plan.returning, strict=True)],
            [n * r for n, r in zip(plan.send_counts, plan.returning, strict=True)],
            ctx.group,
        )
        order = _chosen(plan.send_order, plan.send_counts, plan.returning)  # every token once
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
            # no memory per element; torch.zeros(()) would wait for the device
            s if s is None else torch.full((), 0, dtype=s[1], device=s[2]).expand(s[0])
            for s in ctx.shapes
        )
        return grad, *zeros


def tie_parameters(x: Tensor, module: torch.nn.Module) -> Tensor:
    """x, with a zero gradient for every parameter of `module`.

    A rank (or micro-batch) without crops does not run the encoder. Its output must still belong to the graph, or this
    rank would sit out the backward all-to-all, and gradient reductions that wait for every parameter would hang.
    """
    return _TieParameters.apply(x, *module.parameters())
