"""Floating-point operations of a pack, component by component. No torch: numpy and the model's sizes.

A multiplication and its addition count as two. Only what the model needs is counted, so that a utilisation figure
cannot be flattered: attention by the number of (query, key) pairs the mask allows, crops and window positions that
exist, tokens that are not padding, head columns of scored tokens only, no recomputation. Norms, activations, softmax
and rotary are left out, as is usual (well under 1 %).

Legend: S tokens, A allowed (query, key) pairs, C crops, N pooled tokens, K positions of a pooling window.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from molmo2_nemo.data.counts import PackCounts
from molmo2_nemo.model.config import Molmo2Config, Trainable
from molmo2_nemo.model.flops import connector_flops, crop_flops


@dataclass(frozen=True)
class Flops:
    """Operations by component."""

    linear: float = 0.0  # the decoder's linear layers
    attention: float = 0.0  # the decoder's QK^T and PV, over allowed pairs
    vit: float = 0.0
    connector: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: Flops) -> Flops:
        return Flops(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __mul__(self, factor: float) -> Flops:
        return Flops(**{f.name: getattr(self, f.name) * factor for f in fields(self)})


def forward_flops(
    model_config: Molmo2Config,
    *,
    tokens: float,
    pairs: float,
    crops: float = 0,
    pooled_tokens: float = 0,
    window_positions: float = 0,
    scored_tokens: float = 0,
) -> Flops:
    """Operations of a forward pass, by component.

    Args:
        tokens: S, padding not counted.
        pairs: A (data/counts.py); S * S for full and S * (S + 1) / 2 for causal attention.
        crops: C.
        pooled_tokens: N.
        window_positions: filled ones of all pooled tokens, at most N * K.
        scored_tokens: positions whose logits are needed (loss weight > 0).
    """
    text = model_config.text
    heads_width = text.num_heads * text.head_dim
    return Flops(
        linear=2.0 * layer_weights(model_config) * text.num_layers * tokens,
        attention=4.0 * pairs * heads_width * text.num_layers,
        vit=crop_flops(model_config) * crops,
        connector=connector_flops(model_config, pooled_tokens, window_positions),
        head=2.0 * text.vocab_size * text.hidden_size * scored_tokens,
    )


def training_flops(
    forward: Flops,
    *,
    train_vit: bool = True,
    train_connector: bool = True,
    train_llm: bool = True,
    train_head: bool | None = None,
) -> Flops:
    """Operations of forward and backward: the backward is twice the forward, for the gradients of inputs and of
    weights.

    A frozen part computes no gradients of its weights, and those of its inputs only if something before it is
    trainable: a frozen vision encoder, which comes first, has no backward at all, nor has a frozen connector behind
    it. Not counted are what the first trainable part saves by passing no gradient on (a fraction of a layer), and
    adapters.

    Args:
        train_llm: the language model's own weights are trainable, not adapters beside them.
        train_head: the head is trainable (where it is tied, it is the base embedding); default: as `train_llm`.
    """
    train_head = train_llm if train_head is None else train_head
    passes = Flops(
        linear=3.0 if train_llm else 2.0,
        attention=3.0,
        vit=3.0 if train_vit else 1.0,
        connector=3.0 if train_connector else 2.0 if train_vit else 1.0,
        head=3.0 if train_head else 2.0,
    )
    return Flops(**{f.name: getattr(forward, f.name) * getattr(passes, f.name) for f in fields(Flops)})


def trained_flops(forward: Flops, trainable: Trainable) -> Flops:
    """`training_flops` of a model with these parts trainable: as planner and log count them."""
    return training_flops(
        forward,
        train_vit=trainable.vit,
        train_connector=trainable.connector,
        train_llm=trainable.llm,
        train_head=trainable.head,
    )


def layer_weights(model_config: Molmo2Config) -> int:
    """Weights of one decoder layer's linear maps."""
    text = model_config.text
    queries, keys = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    return text.hidden_size * (2 * queries + 2 * keys + 3 * text.ffn_size)


def qkv_weights(model_config: Molmo2Config) -> int:
    """Of them, those that make queries, keys and values."""
    text = model_config.text
    return text.hidden_size * (text.num_heads + 2 * text.num_kv_heads) * text.head_dim


def pack_flops(model_config: Molmo2Config, pack: PackCounts) -> Flops:
    """Operations of a micro-batch's forward pass, from its counts."""
    return forward_flops(
        model_config,
        tokens=pack.tokens,
        pairs=pack.pairs,
        crops=pack.crops,
        pooled_tokens=pack.pooled_tokens,
        window_positions=pack.window_positions,
        scored_tokens=pack.scored,
    )
