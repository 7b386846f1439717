"""Keys and values that outlive a forward pass: what a new token looks at when text is generated.

The first pass over the prompts fills the cache with each layer's keys and values, after rotary and before context ranks
trade anything: every rank keeps those of its own tokens. Then tokens come one at a time. A new token sees its prompt's
root and branch and all that was generated before it, so what may be seen is a flag per key; padding and other branches
have none. New keys go to the ranks of the context group in turn. Each rank attends to the keys that it holds, and the
parts are merged by their log-sum-exp.

Shape legend: B prompts, T slots of this rank for prompt tokens, K for all; N query heads, G key heads, H head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from molmo2_nemo.parallel.context import group_rank, group_size

FIRST = 64  # slots for generated tokens before there are any; later as many again as are full, whatever may still come


class KVCache:
    """The cache of one batch of prompts on one rank.

    Args:
        visible: bool [B, T], which of this rank's tokens of the prompts the generated ones may see.
        room: most tokens that will be generated.
        group: the ranks that share the prompts (context parallelism); None: this one alone.
    """

    def __init__(self, visible: Tensor, room: int, group: Any = None) -> None:
        self.group, self.size, self.rank = group, group_size(group), group_rank(group)
        self._room = -(-room // self.size)  # slots for generated tokens, at most
        self._own = min(self._room, FIRST)  # those that are there
        self.visible = pad(visible, (0, self._own))  # bool [B, K]
        self.used = visible.shape[1]  # slots with keys
        self.generated = 0
        self.decoding = False
        self.slot: int | None = None  # where the new token's keys go; None: to another rank
        self._keys: dict[int, Tensor] = {}  # layer -> [B, G, K, H]
        self._values: dict[int, Tensor] = {}

    @property
    def bytes(self) -> int:
        """What keys and values take on this rank."""
        return sum(held.nbytes for held in (*self._keys.values(), *self._values.values()))

    def fill(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep a layer's keys and values of the prompts, each [T, B, G, H]."""
        for held, new in ((self._keys, key), (self._values, value)):
            tokens, batch, heads, size = new.shape
            held[layer] = new.new_zeros(batch, heads, self.visible.shape[1], size)
            held[layer][:, :, :tokens] = new.permute(1, 2, 0, 3)

    def next_token(self) -> None:
        """Make room for another token of every prompt."""
        self.decoding = True
        self.slot = None
        if self.generated % self.size == self.rank:
            if self.used == self.visible.shape[1]:
                self._grow()
            self.slot = self.used
            self.visible[:, self.slot] = True
            self.used += 1
        self.generated += 1

    def _grow(self) -> None:
        """Twice the slots for generated tokens, but no more than may be used."""
        more = min(self._own, self._room - self._own)
        self._own += more
        self.visible = pad(self.visible, (0, more))
        for held in (self._keys, self._values):
            for layer, tensor in held.items():
                held[layer] = pad(tensor, (0, 0, 0, more))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of the new token of every prompt, whose keys and values are kept.

        Args:
            query: [1, B, N, H]; key, value: [1, B, G, H].

        Returns:
            [1, B, N, H].
        """
        keys, values = self._keys[layer], self._values[layer]
        if self.slot is not None:
            keys[:, :, self.slot], values[:, :, self.slot] = key[0], value[0]
        grouped = query[0].unflatten(1, (keys.shape[1], -1))  # [B, G, N / G, H]
        scores = (grouped @ keys[:, :, : self.used].transpose(2, 3)).float() * scale
        scores = scores.masked_fill(~self.visible[:, None, None, : self.used], float("-inf"))
        lse = scores.logsumexp(-1, keepdim=True)  # -inf where this rank has nothing to see
        weights = torch.exp(scores - lse.clamp(min=torch.finfo(lse.dtype).min))
        out = (weights.to(values.dtype) @ values[:, :, : self.used]).float()
        if self.size > 1:
            out = _merged(out, lse, self.group)
        return out.to(query.dtype).flatten(1, 2)[None]

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the prompts only; `rows`: their numbers, int64 [fewer]."""
        self.visible = self.visible[rows]
        for held in (self._keys, self._values):
            for layer, tensor in held.items():
                held[layer] = tensor[rows]


def _merged(out: Tensor, lse: Tensor, group: Any) -> Tensor:
    """Attention over all ranks' keys from each rank's own, [..., H] and [..., 1], fp32."""
    largest = lse.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    weight = torch.exp(lse - largest)
    both = torch.cat((out * weight, weight), dim=-1)
    dist.all_reduce(both, group=group)
    return both[..., :-1] / both[..., -1:]
