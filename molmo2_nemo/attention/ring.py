"""Attention over keys that other ranks hold: a ring of direct sends, or an all-gather. This is the second dimension of
context parallelism, beside Ulysses (ulysses.py).

Each of R ranks has a chunk of a pack's queries and keys (of the same heads): consecutive tokens, or the few runs that
balance.py gives it. Which keys of chunk j the queries of chunk i may see follows from the pack's description, on the
host (`visible_keys`); it is nothing at all for most pairs of a pack of many examples, and a short run for some.

    ring        in step s rank i sends to rank i + s the runs of its keys and values that are visible there and works on
                what came from i - s; the messages of step s + 1 travel meanwhile. A pair that sees nothing neither
                sends nor computes. The backward travels once more and sends each run's gradient straight back.
    all_gather  every rank gets all keys and values, forward and again in the backward, whose gradients are
                reduce-scattered. Fewer, larger messages that do not depend on the mask, and memory for all keys.

Both keep only this rank's q, k, v, output and log-sum-exp between forward and backward.

Shape legend: S tokens of the pack, Q = S / R tokens of a chunk, B packs, N query heads, G key heads, H head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from molmo2_nemo.attention.kept import Results, Slot, results_of
from molmo2_nemo.attention.kernels import Kernel
from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.attention.regions import MaskRegion, Runs, region_of, runs_of, tokens_in
from molmo2_nemo.data.example import PAD_EXAMPLE, ROOT_BRANCH
from molmo2_nemo.parallel.context import ContextGroups, group_rank, group_size
from molmo2_nemo.transfer import to_device


@dataclass(frozen=True)
class VisibleKeys:
    """For every pair of chunks (i, j): the runs of chunk j's keys that some query of chunk i may see, at most one in
    each run of the chunk. They may hold keys that are not visible; the mask decides inside them. Within a chunk they
    are all of it."""

    chunks: list[Runs]  # [R], of the pack
    runs: list[list[Runs]]  # [R][R], of the pack

    def keys(self, queries: int, owner: int) -> list[slice]:
        """The same counted in chunk `owner`."""
        found, before = [], 0
        for start, stop in self.chunks[owner]:
            inside = [run for run in self.runs[queries][owner] if start <= run[0] < stop]
            found += [slice(low - start + before, high - start + before) for low, high in inside]
            before += stop - start
        return found

    def count(self, queries: int, owner: int) -> int:
        return tokens_in(self.runs[queries][owner])


def chunk_runs(mask: TokenMask, chunks: int) -> list[Runs]:
    """What each of so many ranks holds of the pack, [R]."""
    size = mask.size // chunks
    if mask.order is None:
        return [((i * size, (i + 1) * size),) for i in range(chunks)]
    return [runs_of(places) for places in mask.order.reshape(chunks, size)]


def visible_keys(mask: TokenMask, chunks: int) -> VisibleKeys:
    """What the chunks of a pack may see of each other, from the description alone: O(chunks * S), on the host.

    Padding is not shown across chunks: nothing depends on what it attends to.

    Args:
        mask: of S tokens, S a multiple of `chunks`.
    """
    example, branch, block = mask.on_host()
    packs, length = example.shape
    real, at_root = example != PAD_EXAMPLE, branch == ROOT_BRANCH
    example = example * packs + np.arange(packs)[:, None]  # unique over the packs
    member = _numbered(example * (int(branch.max()) + 2) + branch + 1)  # example and branch as one number
    example = _numbered(example)
    place = np.broadcast_to(np.arange(length), example.shape)
    held = chunk_runs(mask, chunks)
    runs = []
    for i in range(chunks):
        mine = np.zeros_like(real)
        for start, stop in held[i]:
            mine[:, start:stop] = real[:, start:stop]
        visible = _largest(place, mine, example, member, at_root) >= place
        if mask.visual_attention != "none":
            visual = mine & (block > 0)
            within = mask.visual_attention == "within_image"
            later = _largest(block, visual, example, member, at_root) >= (block if within else 1)
            visible |= later & (block > 0)
        shown = (visible & real).any(0)
        row = []
        for j in range(chunks):
            found = [start + np.flatnonzero(shown[start:stop]) for start, stop in held[j]]
            seen = tuple((int(places[0]), int(places[-1]) + 1) for places in found if len(places))
            row.append(held[j] if i == j else seen)
        runs.append(row)
    return VisibleKeys(held, runs)


def _largest(
    values: np.ndarray, queries: np.ndarray, example: np.ndarray, member: np.ndarray, at_root: np.ndarray
) -> np.ndarray:
    """int64 [B, S]: for every token the largest value among the chosen queries whose branch it shares, or, in a root,
    whose example; -1 where there is none. Values are 0 and more, and never decrease along an example."""
    top = np.full((2, example.size), -1)  # by number of example, of member
    top[0, example[queries]] = top[1, member[queries]] = values[queries]  # of a repeated number the last one stays
    return np.where(at_root, top[0][example], top[1][member])


def _numbered(labels: np.ndarray) -> np.ndarray:
    """The labels as numbers 0, 1, 2 ..., same shape. Labels lie in runs, so only where they change are they sorted."""
    flat = labels.ravel()
    starts = np.concatenate(([0], np.flatnonzero(np.diff(flat)) + 1))
    numbers = np.unique(flat[starts], return_inverse=True)[1]
    return np.repeat(numbers, np.diff(starts, append=flat.size)).reshape(labels.shape)


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions of the same queries over different keys as one: out [Q, B, N, H] fp32, lse [Q, B, N] fp32, -inf
    (and out 0) where a query saw nothing."""
    total = torch.logaddexp(lse, more_lse)
    safe = total.masked_fill(total == float("-inf"), 0.0)
    return out * (lse - safe).exp()[..., None] + more * (more_lse - safe).exp()[..., None], total


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TokenMask,
    scale: float,
    kernel: Kernel,
    group: Any,
    cp_comm_type: str,
    visible: VisibleKeys,
    slot: Slot | None = None,
) -> Tensor:
    """Attention of this rank's chunk over the keys of all ranks of the group.

    Args:
        q: [Q, B, N, H]; k, v: [Q, B, G, H].
        kernel: one with a backward for merged results (`kernels.choose(..., merged=True)`).
        cp_comm_type: "ring" or "all_gather".
        visible: of the group's R chunks.
        slot: where the results outlive recomputation. With it the keys travel once forward, not again when the layer is
            recomputed.

    Returns:
        [Q, B, N, H] in q's dtype.
    """
    function = {"ring": _Ring, "all_gather": _AllGather}[cp_comm_type]
    return function.apply(q, k, v, mask, scale, kernel, group, visible, slot)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: TokenMask,
        scale: float,
        kernel: Kernel,
        group: Any,
        visible: VisibleKeys,
        slot: Slot | None,
    ) -> Tensor:
        kv = torch.stack((k, v))
        out, lse = results_of(slot, lambda: _round(q, kv, mask, scale, kernel, group, visible))
        ctx.save_for_backward(q, kv, out, lse)
        ctx.settings = mask, scale, kernel, group, visible
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, lse = ctx.saved_tensors
        mask, scale, kernel, group, visible = ctx.settings
        assert kernel.backward is not None
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        coming = _send_keys(kv, 1, visible, group)
        region = _region(mask, visible, rank, rank)
        dq, *own = (t.float() for t in kernel.backward(grad, q, kv[0], kv[1], out, lse, region, scale))
        d_kv = torch.stack(own)
        returning = _Message(None, [])
        for step in range(1, size):
            received, coming = coming.wait(), _send_keys(kv, step + 1, visible, group)
            d_received = None
            if received is not None:
                region = _region(mask, visible, rank, (rank - step) % size)
                more, *d_pair = kernel.backward(grad, q, received[0], received[1], out, lse, region, scale)
                dq += more
                d_received = torch.stack(d_pair)
            _add_returned(d_kv, returning, step - 1, visible, group)
            returning = _send_gradients(d_received, kv, step, visible, group)
        _add_returned(d_kv, returning, size - 1, visible, group)
        dk, dv = d_kv.to(kv.dtype)
        return (dq.to(q.dtype), dk, dv, *([None] * 6))


def _round(
    q: Tensor, kv: Tensor, mask: TokenMask, scale: float, kernel: Kernel, group: Any, visible: VisibleKeys
) -> Results:
    """Forward once round the ring. kv: [2, Q, B, G, H]."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    coming = _send_keys(kv, 1, visible, group)
    own, lse = kernel.forward(q, kv[0], kv[1], _region(mask, visible, rank, rank), scale)
    out = own.float()
    for step in range(1, size):
        received, coming = coming.wait(), _send_keys(kv, step + 1, visible, group)
        if received is not None:
            region = _region(mask, visible, rank, (rank - step) % size)
            out, lse = merge(out, lse, *kernel.forward(q, received[0], received[1], region, scale))
    return out.to(q.dtype), lse


def regions_of_rank(mask: TokenMask, groups: ContextGroups, visible: VisibleKeys | None) -> list[MaskRegion]:
    """The regions that `ring_attention` works on, on this rank of `groups.ring`."""
    rank, size = group_rank(groups.ring), group_size(groups.ring)
    if groups.cp_comm_type == "all_gather":
        return [region_of(mask, chunk_runs(mask, size)[rank])]
    visible = visible or visible_keys(mask, size)
    return [_region(mask, visible, rank, owner) for owner in range(size) if visible.count(rank, owner)]


def _region(mask: TokenMask, visible: VisibleKeys, queries: int, owner: int) -> MaskRegion:
    """What chunk `queries` sees of the runs of chunk `owner` that are shown to it."""
    return region_of(mask, visible.chunks[queries], visible.runs[queries][owner])


@dataclass
class _Message:
    """What is on its way to this rank, and the requests to wait for."""

    content: Tensor | None
    requests: list[Any]
    sent: Tensor | None = None  # must live until it has left

    def wait(self) -> Tensor | None:
        for request in self.requests:
            request.wait()
        self.requests, self.sent = [], None
        return self.content


def _send_keys(kv: Tensor, step: int, visible: VisibleKeys, group: Any) -> _Message:
    """Start step `step`: this rank's visible keys [2, run, B, G, H] to rank + step, those of rank - step to here."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if step >= size:
        return _Message(None, [])
    to, source = (rank + step) % size, (rank - step) % size
    runs, expected = visible.keys(to, rank), visible.count(rank, source)
    sent = None
    if runs:
        sent = kv[:, runs[0]].contiguous() if len(runs) == 1 else torch.cat([kv[:, run] for run in runs], dim=1)
    content = kv.new_empty(2, expected, *kv.shape[2:]) if expected else None
    return _post(sent, to, content, source, group)


def _send_gradients(d_received: Tensor | None, kv: Tensor, step: int, visible: VisibleKeys, group: Any) -> _Message:
    """Gradients of what came in step `step` go back to rank - step; those of what was sent come from rank + step."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    to, source = (rank - step) % size, (rank + step) % size
    sent = visible.count(source, rank)
    content = kv.new_empty(2, sent, *kv.shape[2:]) if sent else None
    return _post(d_received, to, content, source, group)


def _add_returned(d_kv: Tensor, returning: _Message, step: int, visible: VisibleKeys, group: Any) -> None:
    """Wait for the gradients that another rank computed for this rank's keys in step `step`, and add them."""
    content = returning.wait()
    if content is not None:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        runs = visible.keys((rank + step) % size, rank)
        for run, part in zip(runs, content.split([run.stop - run.start for run in runs], dim=1), strict=True):
            d_kv[:, run] += part


def _post(sent: Tensor | None, to: int, content: Tensor | None, source: int, group: Any) -> _Message:
    operations = []
    if sent is not None:
        operations.append(dist.P2POp(dist.isend, sent, group=group, group_peer=to))
    if content is not None:
        operations.append(dist.P2POp(dist.irecv, content, group=group, group_peer=source))
    return _Message(content, dist.batch_isend_irecv(operations) if operations else [], sent)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: TokenMask,
        scale: float,
        kernel: Kernel,
        group: Any,
        visible: VisibleKeys,
        slot: Slot | None,
    ) -> Tensor:
        kv = torch.stack((k, v), dim=1)  # [Q, 2, B, G, H]: a gathered tensor is in the order of the ranks' tokens
        region = region_of(mask, chunk_runs(mask, dist.get_world_size(group))[dist.get_rank(group)])

        def over_all_keys() -> Results:
            keys, values = _gather(kv, mask, group).unbind(1)
            return kernel.forward(q, keys, values, region, scale)

        out, lse = results_of(slot, over_all_keys)
        ctx.save_for_backward(q, kv, out, lse)
        ctx.settings = mask, region, scale, kernel, group
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, lse = ctx.saved_tensors
        mask, region, scale, kernel, group = ctx.settings
        assert kernel.backward is not None
        keys, values = _gather(kv, mask, group).unbind(1)
        dq, *own = kernel.backward(grad, q, keys, values, out, lse, region, scale)
        d_kv, d_all = torch.empty_like(kv), torch.stack(own, dim=1)
        if mask.order is not None:
            d_all = d_all[to_device(mask.order, kv.device)]
        dist.reduce_scatter_tensor(d_kv, d_all, group=group)
        return (dq, *d_kv.unbind(1), *([None] * 6))


def _gather(kv: Tensor, mask: TokenMask, group: Any) -> Tensor:
    """All ranks' [Q, ...] in the order of the pack, [S, ...]."""
    out = kv.new_empty(dist.get_world_size(group) * kv.shape[0], *kv.shape[1:])
    dist.all_gather_into_tensor(out, kv, group=group)
    return out if mask.order is None else out[to_device(np.argsort(mask.order), kv.device)]


def shown_keys(mask: TokenMask, groups: ContextGroups, visible: VisibleKeys) -> list[Runs]:
    """Places in the pack of the keys that `show_keys` brings to this rank."""
    if groups.cp_comm_type == "all_gather":
        return [((0, mask.size),)]
    rank, size = group_rank(groups.ring), group_size(groups.ring)
    return [visible.runs[rank][(rank - step) % size] for step in range(size)]


def show_keys(kv: Tensor, mask: TokenMask, groups: ContextGroups, visible: VisibleKeys) -> list[Tensor]:
    """All keys and values that this rank's queries may see, at once: for a layer whose queries come in chunks.

    Args:
        kv: [2, Q, B, G, H] of this rank.

    Returns:
        [2, keys, B, G, H] for each of `shown_keys`.
    """
    if groups.cp_comm_type == "all_gather":
        return [_gather(kv.transpose(0, 1).contiguous(), mask, groups.ring).transpose(0, 1)]
    found = [kv]
    for step in range(1, group_size(groups.ring)):
        received = _send_keys(kv, step, visible, groups.ring).wait()
        found.append(kv[:, :0] if received is None else received)
    return found


def return_gradients(
    sums: list[Tensor], dtype: torch.dtype, mask: TokenMask, groups: ContextGroups, visible: VisibleKeys
) -> Tensor:
    """Backward of `show_keys`: the gradient of its `kv`.

    Args:
        sums: for each of `shown_keys` [2, keys, B, G, H], over this rank's queries.
        dtype: in which they travel.
    """
    if groups.cp_comm_type == "all_gather":
        together = sums[0].transpose(0, 1).to(dtype).contiguous()
        if mask.order is not None:
            together = together[to_device(mask.order, together.device)]
        own = together.new_empty(len(together) // group_size(groups.ring), *together.shape[1:])
        dist.reduce_scatter_tensor(own, together, group=groups.ring)
        return own.transpose(0, 1)
    own = sums[0]
    for step in range(1, group_size(groups.ring)):
        sent = sums[step].to(dtype).contiguous() if sums[step].shape[1] else None
        returning = _send_gradients(sent, own[:, :0].to(dtype), step, visible, groups.ring)
        _add_returned(own, returning, step, visible, groups.ring)
    return own
