"""What each kind of parallelism sends: messages and bytes by formula. No torch here: cost/step.py turns them into
seconds, and benchmarks/context_parallel.py compares them with what the collectives carry.

Counted is what one rank sends to others, once for every other rank that gets it; what stays on the rank is not. An
all-gather and a reduce-scatter over n ranks are counted as rings: each rank sends n - 1 shards. A message is one
collective, or one point-to-point send.

Legend: S tokens of a pack, C context ranks = U Ulysses x R in a ring, N query heads and G key heads of a
tensor-parallel rank, H head size, D width, e bytes per element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from molmo2_nemo.parallel.partition import ulysses_degree


@dataclass(frozen=True)
class Traffic:
    """Messages and bytes that one rank sends."""

    messages: float = 0
    bytes: float = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.messages + other.messages, self.bytes + other.bytes)

    def __mul__(self, factor: float) -> Traffic:
        return Traffic(self.messages * factor, self.bytes * factor)


@dataclass(frozen=True)
class AttentionShape:
    """One layer's attention on one tensor-parallel rank."""

    tokens: int  # S, times packs of a micro-batch
    heads: int  # N
    kv_heads: int  # G
    head_size: int  # H
    bytes_per_element: int = 2  # e


@dataclass(frozen=True)
class Steps:
    """Traffic of one layer, forward and backward. Recomputation in the backward sends `forward` once more."""

    forward: Traffic
    backward: Traffic

    def __add__(self, other: Steps) -> Steps:
        return Steps(self.forward + other.forward, self.backward + other.backward)

    def total(self, recompute: bool = False) -> Traffic:
        return self.forward * (2 if recompute else 1) + self.backward


def replicated_kv_heads(kv_heads: int, ulysses: int) -> int:
    """Key heads after replication, so that Ulysses ranks can shard them."""
    return kv_heads if kv_heads % ulysses == 0 else math.lcm(kv_heads, ulysses)


def ulysses_traffic(shape: AttentionShape, context: int, ulysses: int) -> Steps:
    """Two all-to-alls each way: queries, keys and values together, and the output."""
    if ulysses == 1:
        return Steps(Traffic(), Traffic())
    kv_heads = replicated_kv_heads(shape.kv_heads, ulysses)
    heads = 2 * shape.heads + 2 * kv_heads
    sent = shape.tokens // context * heads * shape.head_size * shape.bytes_per_element * (ulysses - 1) // ulysses
    return Steps(Traffic(2, sent), Traffic(2, sent))


def ring_traffic(shape: AttentionShape, context: int, ulysses: int, shown: Sequence[int] | None = None) -> Steps:
    """Keys and values to every rank that may see them; once more in the backward, and gradients back.

    Args:
        shown: tokens that this rank shows to each other rank (its `VisibleKeys` column) and, as gradients, returns to
            each (its row), in that order: [*sent, *returned]; None: all tokens to and from all, an upper bound.
    """
    ranks = context // ulysses
    kv_heads = replicated_kv_heads(shape.kv_heads, ulysses) // ulysses
    per_token = 2 * kv_heads * shape.head_size * shape.bytes_per_element
    if shown is None:
        shown = [shape.tokens // ranks] * (2 * (ranks - 1))
    keys, gradients = shown[: len(shown) // 2], shown[len(shown) // 2 :]

    def traffic(tokens: Sequence[int]) -> Traffic:
        return Traffic(sum(t > 0 for t in tokens), sum(tokens) * per_token)

    return Steps(traffic(keys), traffic(keys) + traffic(gradients))


def all_gather_traffic(shape: AttentionShape, context: int, ulysses: int) -> Steps:
    """Keys and values gathered; gathered again in the backward, and gradients reduce-scattered."""
    ranks = context // ulysses
    if ranks == 1:
        return Steps(Traffic(), Traffic())
    kv_heads = replicated_kv_heads(shape.kv_heads, ulysses) // ulysses
    sent = (ranks - 1) * (shape.tokens // ranks) * 2 * kv_heads * shape.head_size * shape.bytes_per_element
    return Steps(Traffic(1, sent), Traffic(2, 2 * sent))


def context_traffic(
    shape: AttentionShape, context: int, ulysses: int | None = None, cp_comm_type: str = "ring"
) -> Steps:
    """One layer's attention over C ranks, every key shown to every rank."""
    ulysses = ulysses_degree(context, ulysses)
    return ulysses_traffic(shape, context, ulysses) + keys_traffic(shape, context, ulysses, cp_comm_type)


def keys_traffic(shape: AttentionShape, context: int, ulysses: int, cp_comm_type: str = "ring") -> Steps:
    """What ranks that hold the same heads show each other, every key to every rank."""
    return {"ring": ring_traffic, "all_gather": all_gather_traffic}[cp_comm_type](shape, context, ulysses)


def tensor_traffic(tokens: int, width: int, bytes_per_element: int, tensor: int, sequence: bool) -> Steps:
    """One decoder layer's linear maps: an all-reduce behind attention and one behind the MLP, and as many backward; as
    all-gather and reduce-scatter with sequence parallelism, where the backward also gathers the inputs again.

    Args:
        tokens: of one context rank.
    """
    if tensor == 1:
        return Steps(Traffic(), Traffic())
    shard = tokens * width * bytes_per_element * (tensor - 1) / tensor
    if sequence:
        return Steps(Traffic(4, 4 * shard), Traffic(6, 6 * shard))
    return Steps(Traffic(2, 4 * shard), Traffic(2, 4 * shard))


def gradient_traffic(
    parameters: int, ranks: int, *, parameter_bytes: int = 2, gradient_bytes: int = 4, distributed: bool = True
) -> Traffic:
    """Once a step: gradients reduced over data x context ranks, and with a distributed optimizer the updated
    parameters gathered.

    Args:
        parameters: trained ones of one model-parallel rank.
        parameter_bytes, gradient_bytes: of one.
    """
    if ranks == 1:
        return Traffic()
    share = parameters * (ranks - 1) / ranks
    if not distributed:
        return Traffic(1, 2 * share * gradient_bytes)
    return Traffic(2, share * (gradient_bytes + parameter_bytes))
