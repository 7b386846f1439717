"""AdamW's step: the gradients' norms that decide about clipping and faults, and the update.

Plain: each gradient copied to fp64 (8 bytes per element of the largest), then PyTorch's AdamW as it comes. On CUDA that
is its foreach form, with about 4 bytes of temporaries per parameter. Fused: norms from fp32 sums over short chunks, and
an update that reads and writes every element once. Where Transformer Engine or Apex is installed, Megatron-core
computes the update with their FusedAdam either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 256  # elements whose squares are added up in fp32
# Norms between these are exact to fp32 rounding when chunks are added up in fp32. Below, squares of single elements may
# vanish (2^-126 is the smallest, for up to 10^10 elements); above, they may overflow although the norm is finite.
SMALLEST, LARGEST = 1e-6, 1e18


@dataclass(frozen=True)
class AdamW:
    """How a step is computed.

    Args:
        fused: PyTorch's AdamW is to be the fused one; `step` then lives on the parameters' device.
        squares: sum of squares of all elements of some fp32 tensors, fp64 [], on their device.
    """

    fused: bool
    squares: Callable[[Sequence[Tensor]], Tensor]

    def certain(self, norm: float) -> bool:
        """Whether a norm that `squares` led to is exact to fp32 rounding, whatever the elements are."""
        return not self.fused or SMALLEST < norm < LARGEST


def squares_in_fp64(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of squares, every tensor copied to fp64 for it."""
    squares = [torch.linalg.vector_norm(t, dtype=torch.float64).square() for t in tensors]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)


def squares_by_chunks(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of squares: norms of CHUNK elements in fp32, one more element for each; their squares added up in fp64.

    The root of it is within 2e-7 of the exact one for norms that `AdamW.certain` takes (tests/fused/test_adamw.py);
    fp32 sums of everything are off by 1 % on 20 million elements on a CPU.
    """
    norms, rest = [], []
    for tensor in tensors:
        flat = tensor.reshape(-1)
        whole = flat.numel() // CHUNK * CHUNK
        if whole:
            norms.append(torch.linalg.vector_norm(flat[:whole].view(-1, CHUNK), dim=1))
        if whole < flat.numel():
            rest.append(flat[whole:])
    if rest:
        norms.append(torch.stack(torch._foreach_norm(rest)))  # one kernel for all
    return torch.cat(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64)


PLAIN = AdamW(False, squares_in_fp64)
FUSED = AdamW(True, squares_by_chunks)
