"""Attention's results kept outside recomputation: a layer that is computed again in backward runs no kernel again.

Megatron's checkpoints run a layer twice: first without autograd, and in backward once more with it. In the first pass
the attention function leaves its output and log-sum-exp with the micro-batch (`PackDescription.kept`), where its kernel
has produced them: in head layout under Ulysses, merged over the ring. In the second it takes them from there and saves
them for its backward, which is the same as without recomputation. Nothing is kept where no backward follows, and what
was kept and never taken goes with the micro-batch.

Shape legend: Q queries of this rank inside attention, B packs, N its query heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Results = tuple[Tensor, Tensor]  # out [Q, B, N, H], lse fp32 [Q, B, N]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@dataclass
class KeptResults:
    """Results of one micro-batch's attention layers between the two passes.

    Args:
        pack, unpack: where they wait; default: where they are (a `Line` of model/memory.py puts them on the host).
    """

    pack: Callable[[Tensor], Any] = _as_it_is
    unpack: Callable[[Any], Tensor] = _as_it_is
    _waiting: dict[Hashable, tuple[Any, Any]] = field(default_factory=dict)

    def put(self, layer: Hashable, results: Results) -> None:
        out, lse = results
        self._waiting[layer] = self.pack(out), self.pack(lse)

    def take(self, layer: Hashable) -> Results | None:
        """The layer's results, once."""
        waiting = self._waiting.pop(layer, None)
        return None if waiting is None else (self.unpack(waiting[0]), self.unpack(waiting[1]))

    def __len__(self) -> int:
        return len(self._waiting)


@dataclass(frozen=True)
class Slot:
    """One layer's place in `KeptResults`, in one of its passes."""

    kept: KeptResults
    layer: Hashable
    again: bool  # autograd is on: this is the pass in backward, or a layer that is not recomputed

    def results(self, compute: Callable[[], Results]) -> Results:
        if self.again:
            return self.kept.take(self.layer) or compute()
        results = compute()
        self.kept.put(self.layer, results)
        return results


def slot_of(kept: KeptResults | None, layer: Hashable) -> Slot | None:
    """The layer's slot. To be called where autograd's state is the layer's own, not inside a torch.autograd.Function.

    Args:
        kept: None where nothing is to be kept.
    """
    return None if kept is None else Slot(kept, layer, torch.is_grad_enabled())


def results_of(slot: Slot | None, compute: Callable[[], Results]) -> Results:
    """Out and log-sum-exp: those that were kept, or computed (and kept, in a checkpoint's first pass)."""
    return compute() if slot is None else slot.results(compute)
