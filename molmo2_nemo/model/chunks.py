"""A decoder layer that works on one chunk of its tokens at a time, forward and backward (`memory.sequence_chunk`).

Forward keeps the layer's input and, as recomputation does, attention's results or nothing. In backward everything
inside the layer exists for one chunk at a time (StreamBP, arXiv 2506.03077, does so for plain causal attention); of all
tokens there are keys, values and their gradients (attention/carried.py), the layer's input and output and their
gradients. Both directions go over the chunks:

    keys        keys and values of every chunk, computed and carried
    layer       the whole layer with one chunk's queries; in backward, differentiated with respect to all but keys and
                values, whose gradients are summed
    keys again  in backward only: what leads to keys and values, differentiated with those sums

A chunk's gradients of parameters are summed in fp32 and leave once, as those of any layer do.

Shape legend: R rows of this rank's residual stream, B packs, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import _fork_rng, _get_all_rng_states, _set_all_rng_states
from torch import Tensor

from molmo2_nemo.attention.carried import CarriedKeys, ChunkedPack, ChunkOfQueries, KeptChunks
from molmo2_nemo.attention.core import PackDescription
from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.attention.regions import Range
from molmo2_nemo.attention.ring import VisibleKeys
from molmo2_nemo.fused.merge import accumulator
from molmo2_nemo.parallel.context import ContextGroups


def chunked_pack(
    mask: TokenMask, groups: ContextGroups | None, visible: VisibleKeys | None, sequence_parallel: bool
) -> ChunkedPack:
    """How a micro-batch lies in chunks on this rank."""
    sharded = parallel_state.get_tensor_model_parallel_world_size() if sequence_parallel else 1
    return ChunkedPack(mask, groups or ContextGroups(None, None, None, None), sharded, visible)


def in_chunks(layer: Any, hidden: Tensor, pack: PackDescription, tokens: int, keeps_attention: bool) -> Tensor:
    """A decoder layer's output, [R, B, D] -> the same.

    Args:
        tokens: of a chunk, of this context rank.
        keeps_attention: attention's results wait for backward; else they are computed again.
    """
    work = _Work(layer, pack, tokens, keeps_attention and torch.is_grad_enabled())
    return _InChunks.apply(hidden, work, *(p for p in layer.parameters() if p.requires_grad))


class _Work:
    """One layer's pass over one micro-batch, in chunks."""

    def __init__(self, layer: Any, pack: PackDescription, tokens: int, keeps: bool) -> None:
        self.layer, self.pack, self.keeps = layer, pack, keeps
        self.attention, self.core = layer.self_attention, layer.self_attention.core_attention
        self.chunked = chunked_pack(pack.mask, pack.groups, pack.visible, layer.config.sequence_parallel)
        self.chunks = self.chunked.chunks(tokens)

    def part(self, rows: Range) -> PackDescription:
        """The description of the pack for a chunk."""
        part = copy.copy(self.pack)
        part.rotary = {
            name: (self._tokens(cos, rows), self._tokens(sin, rows)) for name, (cos, sin) in self.pack.rotary.items()
        }
        part.response = None if self.pack.response is None else self.pack.response[slice(*rows)]
        return part

    def _tokens(self, table: Tensor, rows: Range) -> Tensor:
        """Of a tensor over this rank's tokens, those of a chunk: some of every rank's that shards the stream."""
        return table.unflatten(0, (self.chunked.sharded, -1))[:, slice(*rows)].flatten(0, 1)

    def keys(self, x: Tensor, pack: PackDescription, carried: CarriedKeys | None = None) -> tuple[Any, Tensor, Tensor]:
        """A chunk's keys and values as attention holds them."""
        q, k, v = self.attention.get_query_key_value_tensors(self.layer.input_layernorm(x), None)
        carried = carried or self.core.carry(self.chunked, q)
        k = self.core.rotated(q, k, pack)[1]
        return carried, *carried.exchanged(q.shape[2], k, v)

    def carry(self, hidden: Tensor) -> CarriedKeys:
        """Keys and values of all tokens."""
        carried = None
        for rows in self.chunks:
            carried, k, v = self.keys(hidden[slice(*rows)], self.part(rows), carried)
            carried.fill(rows, k, v)
        assert carried is not None
        carried.show()
        return carried

    def output(self, x: Tensor, rows: Range, carried: CarriedKeys, kept: KeptChunks | None, again: bool) -> Tensor:
        """The layer's output for a chunk."""
        part = self.part(rows)
        part.chunk = ChunkOfQueries(carried, rows, kept, again)
        return self.layer(hidden_states=x, attention_mask=None, packed_seq_params=part)[0]

    def forward(self, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output for all tokens, and what is kept of attention."""
        carried, out = self.carry(hidden), torch.empty_like(hidden)
        kept = KeptChunks(self.chunked) if self.keeps else None
        for rows in self.chunks:
            out[slice(*rows)] = self.output(hidden[slice(*rows)], rows, carried, kept, again=False)
        return out, kept.tensors if kept is not None else ()

    def backward(self, hidden: Tensor, grad: Tensor, results: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients of the input and of every trained parameter."""
        parameters = [p for p in self.layer.parameters() if p.requires_grad]
        sums, d_hidden = _Sums(parameters), torch.empty_like(hidden)
        kept = KeptChunks(self.chunked, results) if self.keeps else None
        carried = self.carry(hidden)
        for rows, x in self._inputs(hidden):
            with torch.enable_grad():
                out = self.output(x, rows, carried, kept, again=True)
            d_hidden[slice(*rows)] = sums.add([out], x, [grad[slice(*rows)]])
        carried.collect()
        for rows, x in self._inputs(hidden):
            with torch.enable_grad():
                _, *kv = self.keys(x, self.part(rows), carried)
            d_hidden[slice(*rows)] += sums.add(kv, x, carried.gradients(rows, kv[0].dtype))
        return d_hidden, sums.total()

    def _inputs(self, hidden: Tensor) -> Iterator[tuple[Range, Tensor]]:
        for rows in self.chunks:
            yield rows, hidden[slice(*rows)].detach().requires_grad_()


class _Sums:
    """Gradients of parameters, summed over chunks."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, outputs: Sequence[Tensor], x: Tensor, grads: Sequence[Tensor]) -> Tensor:
        """Differentiates a chunk's outputs; returns the gradient of its input."""
        d_x, *found = torch.autograd.grad(outputs, [x, *self.parameters], grads, allow_unused=True)
        for number, more in enumerate(found):
            if more is not None:
                total = self.sums[number]
                if total is None:
                    total = self.sums[number] = torch.zeros_like(more, dtype=accumulator(more.dtype))
                total += more
        return d_x

    def total(self) -> list[Tensor | None]:
        return [None if s is None else s.to(p.dtype) for s, p in zip(self.sums, self.parameters, strict=True)]


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, work: _Work, *parameters: Tensor) -> Tensor:
        ctx.work, ctx.states = work, _get_all_rng_states()
        out, results = work.forward(hidden)
        ctx.save_for_backward(hidden, *results)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *results = ctx.saved_tensors
        with _fork_rng():  # dropout draws what it drew forward: chunks come in the same order
            _set_all_rng_states(*ctx.states)
            d_hidden, of_parameters = ctx.work.backward(hidden, grad, tuple(results))
        return d_hidden if ctx.needs_input_grad[0] else None, None, *of_parameters
