"""Packs of examples -> one `Batch`: offsets, padding, and where each pooled visual token goes.

Shapes: B packs, S tokens, C crops, P patches per crop, N pooled tokens, K patches in a full pooling window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from molmo2_nemo.data.example import PAD_EXAMPLE, PAD_TOKEN, ROOT_BRANCH, Batch, Example
from molmo2_nemo.errors import DataError


def check_example(example: Example, im_patch_id: int) -> None:
    """Check what the model relies on: array lengths, one pooled token per <im_patch>, indices inside the crops.

    Raises:
        DataError: names the example and what disagrees.
    """
    tokens = example.num_tokens
    for name in ("labels", "loss_weights", "position_ids", "branch_ids", "visual"):
        if getattr(example, name).shape != (tokens,):
            raise DataError(f"example {example.key}: {name} has shape {getattr(example, name).shape}, not ({tokens},)")
    pooled = example.pooling.shape[0]
    patches = int((example.input_ids == im_patch_id).sum())
    if pooled != patches:
        raise DataError(f"example {example.key}: {patches} <im_patch> tokens but {pooled} pooled tokens")
    crops = len(example.crops) or example.num_crops  # none are there as long as they are not decoded
    if int(example.unit_pooled_tokens.sum()) != pooled or example.num_crops != crops:
        raise DataError(
            f"example {example.key}: units hold {example.num_crops} crops and "
            f"{int(example.unit_pooled_tokens.sum())} pooled tokens, the example {crops} and {pooled}"
        )
    limit = example.num_crops * example.crops.shape[1]
    if pooled and not (example.pooling.min() >= -1 and example.pooling.max() < limit):
        raise DataError(f"example {example.key}: a pooling index lies outside its {limit} patches")
    if tokens and not np.isfinite(example.loss_weights).all():
        raise DataError(f"example {example.key}: a loss weight is not finite")


def collate(
    packs: Sequence[Sequence[Example]], *, sequence_length: int, im_patch_id: int, crops: np.ndarray | None = None
) -> Batch:
    """Lay packs side by side, each padded to `sequence_length` tokens.

    Position ids are kept (every example restarts at 0), example ids count from 0 in each pack, pooling indices are
    shifted to the flattened patches of the whole batch and widened with -1 to the widest window.

    Args:
        crops: uint8 [C, P, D_p], those of all examples in order; default: the examples' own.
    Raises:
        DataError: a pack holds more tokens than `sequence_length`; nothing is ever cut here.
    """
    shape, length = (len(packs), sequence_length), sequence_length
    batch = Batch(
        input_ids=np.full(shape, PAD_TOKEN, np.int64),
        labels=np.full(shape, PAD_TOKEN, np.int64),
        loss_weights=np.zeros(shape, np.float32),
        position_ids=np.zeros(shape, np.int64),
        example_ids=np.full(shape, PAD_EXAMPLE, np.int64),
        branch_ids=np.full(shape, ROOT_BRANCH, np.int64),
        visual=np.zeros(shape, bool),
        **_join_vision([example for pack in packs for example in pack], crops),
        pooled_positions=np.zeros(0, np.int64),
        keys=[[run.key for example in pack for run in example.parts if run.key] for pack in packs],
        sources=[[run.source for example in pack for run in example.parts] for pack in packs],
        source_tokens=[[run.tokens for example in pack for run in example.parts] for pack in packs],
    )
    for b, pack in enumerate(packs):
        total = sum(example.num_tokens for example in pack)
        if total > length:
            keys = ", ".join(example.key for example in pack)
            raise DataError(f"a pack of {total} tokens does not fit into {length} ({keys}); raise sequence_length")
        start = 0
        for number, example in enumerate(pack):
            at = slice(start, start + example.num_tokens)
            batch.input_ids[b, at] = example.input_ids
            batch.labels[b, at] = example.labels
            batch.loss_weights[b, at] = example.loss_weights
            batch.position_ids[b, at] = example.position_ids
            batch.example_ids[b, at] = number
            batch.branch_ids[b, at] = example.branch_ids
            batch.visual[b, at] = example.visual
            start = at.stop
    batch.pooled_positions = np.flatnonzero(batch.input_ids.reshape(-1) == im_patch_id).astype(np.int64)
    if len(batch.pooled_positions) != len(batch.pooling):
        raise DataError(
            f"{len(batch.pooled_positions)} <im_patch> tokens but {len(batch.pooling)} pooled tokens in a batch of "
            f"{batch.keys}"
        )
    return batch


def _join_vision(examples: list[Example], crops: np.ndarray | None) -> dict[str, Any]:
    """Concatenate crops, pooling windows and units in the order of the tokens."""
    with_crops = [example for example in examples if example.num_crops]
    shapes = {example.crops.shape[1:] for example in with_crops}
    if len(shapes) > 1:
        raise DataError(f"examples of one batch have crops of different shapes: {sorted(shapes)}")
    empty = examples[0].crops[:0] if examples else np.zeros((0, 0, 0), np.uint8)
    width = max((example.pooling.shape[1] for example in with_crops), default=1)
    pooling, offset = [np.zeros((0, width), np.int64)], 0
    for example in with_crops:
        windows = np.full((example.pooling.shape[0], width), -1, np.int64)
        source = example.pooling
        windows[:, : source.shape[1]] = np.where(source >= 0, source + offset, -1)
        pooling.append(windows)
        offset += example.num_crops * example.crops.shape[1]
    none = np.zeros(0, np.int64)
    if crops is None:
        crops = np.concatenate([example.crops for example in with_crops]) if with_crops else empty
    assert len(crops) == sum(example.num_crops for example in with_crops)
    return {
        "crops": crops,
        "pooling": np.concatenate(pooling),
        "unit_crops": np.concatenate([none, *(example.unit_crops for example in with_crops)]),
        "unit_pooled_tokens": np.concatenate([none, *(example.unit_pooled_tokens for example in with_crops)]),
    }
