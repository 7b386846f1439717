"""Floating-point operations of a pack, component by component. No torch: numpy and the model's sizes.

A multiplication and its addition count as two. Only what the model needs is counted, so that a utilisation figure
cannot be flattered: attention by the number of (query, key) pairs the mask allows, crops and window slots that exist,
tokens that are not padding, head columns of scored tokens only, no recomputation. Norms, activations, softmax and
rotary are left out, as is usual (well under 1 %).

Legend: S tokens, A allowed (query, key) pairs, C crops, P patches, N pooled rows, K window slots.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from molmo2_nemo.data.example import PAD_EXAMPLE, ROOT_BRANCH, Batch
from molmo2_nemo.model.config import Molmo2Config


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
    config: Molmo2Config,
    *,
    tokens: int,
    pairs: float,
    crops: int = 0,
    pooled_rows: int = 0,
    pooled_slots: int = 0,
    scored_tokens: int = 0,
) -> Flops:
    """Forward pass.

    Args:
        tokens: S, padding not counted.
        pairs: A, see `attention_pairs`; S * S for full and S * (S + 1) / 2 for causal attention.
        crops: C.
        pooled_rows: N.
        pooled_slots: filled window slots of all rows, at most N * K.
        scored_tokens: positions whose logits are needed (loss weight > 0).
    """
    text = config.text
    heads_width = text.num_heads * text.head_dim
    return Flops(
        linear=2.0 * layer_weights(config) * text.num_layers * tokens,
        attention=4.0 * pairs * heads_width * text.num_layers,
        vit=crop_flops(config) * crops,
        connector=connector_flops(config, pooled_rows, pooled_slots),
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
    """Forward and backward: twice the forward again, for the gradients of inputs and of weights.

    What is frozen computes none of its weights. It passes on those of its inputs, but where nothing in front of it
    learns: a frozen vision encoder, being first, has no backward at all, nor has a connector frozen behind it. What the
    first part that learns saves by passing none on is left out (a fraction of a layer), as are adapters.

    Args:
        train_llm: the language model's own weights learn, not adapters beside them.
        train_head: the same of the head, which is the base embedding where it is tied; default as `train_llm`.
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


def layer_weights(config: Molmo2Config) -> int:
    """Weights of one decoder layer's linear maps."""
    text = config.text
    queries, keys = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    return text.hidden_size * (2 * queries + 2 * keys + 3 * text.ffn_size)


def crop_flops(config: Molmo2Config) -> float:
    """The vision encoder on one crop: built blocks with full attention over its patches, and the patch embedding."""
    vision = config.vision
    width, patches = vision.hidden_size, vision.num_patches
    weights = 4 * width * width + 2 * width * vision.ffn_size
    block = 2.0 * patches * weights + 4.0 * patches * patches * width
    return vision.num_built_layers * block + 2.0 * patches * vision.patch_dim * width


def connector_flops(config: Molmo2Config, rows: int, slots: int) -> float:
    """Pooling (keys and values per filled slot, query and output per row) and the projector per row."""
    connector, features, width = config.connector, config.vision.feature_size, config.connector.hidden_size
    per_slot = 2.0 * 2 * features * width + 4.0 * width
    weights = features * width + width * width + connector.ffn_size * (2 * width + config.text.hidden_size)
    return per_slot * slots + 2.0 * weights * rows


def attention_pairs(
    example_ids: np.ndarray,
    branch_ids: np.ndarray,
    visual_block: np.ndarray,
    visual_attention: Literal["image_tokens", "within_image", "none"] = "image_tokens",
) -> int:
    """Number of (query, key) pairs of one pack that the mask allows, in O(S).

    Args:
        example_ids: int [S], PAD_EXAMPLE where padded (padding counts nothing).
        branch_ids: int [S], ROOT_BRANCH in the root of an example.
        visual_block: int [S], 0 for text, else the number of the picture or frame; for "image_tokens" and "none" a
            0/1 flag will do. Numbers never decrease along a pack.
    """
    total = 0
    for example in np.unique(example_ids[example_ids != PAD_EXAMPLE]):
        chosen = example_ids == example
        total += example_pairs(branch_ids[chosen], visual_block[chosen], visual_attention)
    return total


def example_pairs(branches: np.ndarray, blocks: np.ndarray, visual_attention: str) -> int:
    """`attention_pairs` of one example."""
    root = branches == ROOT_BRANCH
    _, sizes = np.unique(branches[~root], return_counts=True)
    # earlier keys: everybody sees the root so far, and a branch sees itself so far
    pairs = int(np.cumsum(root).sum()) + int((sizes * (sizes + 1) // 2).sum())
    if visual_attention == "none":
        return pairs
    # later keys: only visual ones, seen by visual queries
    block_of = blocks if visual_attention == "within_image" else np.minimum(blocks, 1)
    for block in np.unique(block_of[block_of > 0]):
        inside = block_of == block
        later_root = np.cumsum((inside & root)[::-1])[::-1] - (inside & root)
        pairs += int(later_root[inside].sum())
        _, sizes = np.unique(branches[inside & ~root], return_counts=True)
        pairs += int((sizes * (sizes - 1) // 2).sum())
    return pairs


def batch_flops(config: Molmo2Config, batch: Batch, visual_block: np.ndarray | None = None) -> Flops:
    """Forward pass of a micro-batch.

    Args:
        visual_block: int [B, S], needed where the model's visual attention is "within_image".

    Raises:
        AssertionError: it is needed and missing.
    """
    if visual_block is None:
        if config.visual_attention == "within_image":
            raise AssertionError("visual_attention 'within_image' needs visual_block (model.inputs.visual_blocks)")
        visual_block = batch.visual.astype(np.int64)
    rows = zip(batch.example_ids, batch.branch_ids, visual_block, strict=True)
    pairs = sum(attention_pairs(*row, visual_attention=config.visual_attention) for row in rows)
    return forward_flops(
        config,
        tokens=int((batch.example_ids != PAD_EXAMPLE).sum()),
        pairs=pairs,
        crops=len(batch.crops),
        pooled_rows=len(batch.pooling),
        pooled_slots=int((batch.pooling >= 0).sum()),
        scored_tokens=int((batch.loss_weights > 0).sum()),
    )
