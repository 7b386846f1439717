"""The attention kernels behind one interface, and the choice among them.

    flash    plain flash calls merged by log-sum-exp (flash.py). CPU, any dtype; CUDA, fp16 and bf16
    flex     PyTorch FlexAttention with a block mask (flex.py). CUDA
    blocks   tile by tile with plain tensor operations (blocks.py). Anywhere
    auto     flash where it can, else blocks; docs/attention.md says what was measured

Every kernel takes q [Q, B, N, H] and k, v [K, B, G, H], query head n reading key head n // (N / G), and a `MaskRegion`
that says which queries may look at which keys.

To add one, put a module beside this file that defines `forward`, `backward` (or a differentiable `forward` alone; both
as `Kernel` says), `plan`, `problem` (why it cannot run, or None) and `implementation` (its name in cost/efficiency.py,
its title in the log). Then add the module to KERNELS, its name to AttentionKernel (model/config.py; to CANNOT_MERGE
there, too, where it has no `backward` of its own), the speed of its implementation to cost/efficiency.py, and what it
counts as in a plan to `efficiency_of` (plan/search.py) where that has another name; where it is the fastest, to
`automatic.py` too. tests/attention/test_kernels.py checks that nothing is missing, and compares kernels with the dense
oracle: name it in KERNELS there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molmo2_nemo.attention import blocks, flash, flex
from molmo2_nemo.attention.automatic import automatic
from molmo2_nemo.attention.kept import Slot, results_of
from molmo2_nemo.attention.regions import MaskRegion
from molmo2_nemo.errors import UserError, nearest
from molmo2_nemo.fused import merge, varlen

Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, MaskRegion, float], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Kernel:
    """A way to compute attention over a region. The two directions are separate so that partial results can be merged.

    forward(q, k, v, region, scale) -> out [Q, B, N, H] in q's dtype, lse fp32 [Q, B, N] (fp64 for fp64 inputs). lse is
    the log of the summed exponentials of the scaled scores; a query that sees no key of the region has lse -inf, out 0.

    backward(grad, q, k, v, out, lse, region, scale) -> dq, dk, dv. With the out and lse of this region these are its
    gradients. With out and lse merged over several regions that share the queries (ring attention), they are this
    region's exact share: dq of all regions add up, dk and dv belong to the region's keys.

    plan(region, device) finds on the host what both need, and keeps it with the region; without it they find it
    themselves, the first time. What it puts on the device goes there by `transfer.to_device`, and nothing is computed
    there: it may run in a thread and on a stream of its own, ahead of training.

    Neither is differentiable by autograd; `attend` is. Where backward is None (flex), forward itself is differentiable,
    in out and in lse.
    """

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, MaskRegion, float], tuple[Tensor, Tensor]]
    backward: (
        Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, MaskRegion, float], tuple[Tensor, Tensor, Tensor]]
        | None
    )
    plan: Callable[[MaskRegion, torch.device], None]
    implementation: str  # its name in cost/efficiency.py
    title: str  # what the log calls it


KERNELS = {module.__name__.rpartition(".")[2]: module for module in (flash, flex, blocks)}
NAMES = ("auto", *KERNELS)


def choose(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    head_size: int,
    *,
    merged: bool = False,
    library: varlen.Library | None = None,
    merging: merge.Merging = merge.PLAIN,
) -> Kernel:
    """The kernel of that name, or for "auto" the fastest that works for these tensors.

    Args:
        merged: the kernel must have a backward direction for results merged over several regions, as ring attention
            needs.
        library, merging: for "flash" on CUDA: what was chosen of `kernels.flash` and `kernels.merge`. None: PyTorch's
            own flash attention, or what has been put in its place.

    Raises:
        UserError: no such kernel, or one that cannot run here; the message names those that can.
    """
    if name not in NAMES:
        raise UserError(f"model.attention={name}: no such attention kernel; {nearest(name, NAMES)}")
    kind, note = torch.device(device).type, ""
    if name == "auto":
        name = automatic(kind, str(dtype).removeprefix("torch."), head_size)
        if name != "flash" and (problem := KERNELS["flash"].problem(kind, dtype, head_size)) is not None:
            note = f"; not flash: {problem}"
    module = KERNELS[name]
    problem = _problem(name, kind, dtype, head_size, merged)
    if problem is not None:
        others = [other for other in KERNELS if _problem(other, kind, dtype, head_size, merged) is None]
        raise UserError(f"model.attention={name}: {problem}; use auto or one of: {', '.join(others)}")
    forward, backward, implementation = module.forward, getattr(module, "backward", None), module.implementation
    if name == "flash":
        own = library or varlen.PLAIN
        forward = functools.partial(forward, library=own, merging=merging)
        backward = functools.partial(flash.backward, library=own, merging=merging)
        implementation = functools.partial(implementation, library=library)
    known_as, title = implementation(kind)
    return Kernel(name, forward, backward, module.plan, known_as, title + note)


def _problem(name: str, device: str, dtype: torch.dtype, head_size: int, merged: bool) -> str | None:
    problem = KERNELS[name].problem(device, dtype, head_size)
    if problem is None and merged and not hasattr(KERNELS[name], "backward"):
        return (
            "it cannot merge results over several parts of a pack, as attention across nodes and memory.sequence_chunk "
            "need"
        )
    return problem


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        region: MaskRegion,
        scale: float,
        kernel: Kernel,
        slot: Slot | None,
    ) -> Tensor:
        out, lse = results_of(slot, lambda: kernel.forward(q, k, v, region, scale))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = region, scale, kernel
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        region, scale, kernel = ctx.rest
        assert kernel.backward is not None
        return *kernel.backward(grad, *ctx.saved_tensors, region, scale), None, None, None, None


@torch.compiler.disable
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    region: MaskRegion,
    scale: float,
    kernel: Kernel,
    slot: Slot | None = None,
) -> Tensor:
    """Attention of the region's queries over its keys, differentiable. Nothing of Q x K elements is ever made.

    Compiled models break their graph here: a plan that differs from pack to pack would be compiled again every time.

    Args:
        q: [Q, B, N, H]; k, v: [K, B, G, H], N a multiple of G.
        scale: multiplies the scores, 1/sqrt(H) for Molmo2.
        slot: where results outlive recomputation. A kernel without a backward of its own keeps none: it runs again.

    Returns:
        [Q, B, N, H].
    """
    if kernel.backward is None:
        return kernel.forward(q, k, v, region, scale)[0]
    return _Attend.apply(q, k, v, region, scale, kernel, slot)
