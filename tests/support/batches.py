"""The packs of packs.py as whole micro-batches for a model: token ids, crops and pooling windows, by the collator.

Tokens, crops, windows and their units are as many, and lie as, the data pipeline would make them; what they say is
noise. Of a conversation the last quarter is scored, which is twice what the published mixture has of mixed packs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from molmo2_nemo.cost.flops import Flops, pack_flops
from molmo2_nemo.data.collate import collate
from molmo2_nemo.data.config import ImageConfig, VideoConfig
from molmo2_nemo.data.counts import PackCounts
from molmo2_nemo.data.example import Batch, Example
from molmo2_nemo.data.image import TileGeometry, pool_windows, tile_patch_ids
from molmo2_nemo.data.special_tokens import SpecialIds
from molmo2_nemo.model.config import Molmo2Config
from tests.support.trees import FRAME, TIMESTAMP, Tree, long_video_pack, sft_example

TILINGS = ((1, 1), (2, 2), (2, 4))


@dataclass(frozen=True)
class Picture:
    """What one picture or frame adds to an example."""

    crops: int
    ids: np.ndarray  # int64 [tokens]
    pooling: np.ndarray  # int64 [N, K]


class Shapes:
    """The pictures and frames of a model's vision encoder, found by their number of tokens."""

    def __init__(self, model: Molmo2Config) -> None:
        side, patch = model.vision.image_size, model.vision.patch_size
        margin = ImageConfig.margin if model.vision.grid > 2 * ImageConfig.margin + 1 else 2
        self.geometry = TileGeometry(side, patch, margin, ImageConfig.pool)
        self.crop_shape = (model.vision.num_patches, model.vision.patch_dim)
        view = np.arange(self.geometry.grid**2).reshape(self.geometry.grid, -1)
        frame = pool_windows(view, VideoConfig.pool)
        special = SpecialIds.at(model.text.vocab_size)
        rows = frame.reshape(-1, frame.shape[-1])
        ids = [special.im_start, *[special.im_patch] * len(rows), special.im_end]
        self.frame = len(ids)
        self.pictures = {self.frame: Picture(1, np.array(ids), rows)}
        for tiling in TILINGS:
            stitched = tile_patch_ids(tiling, self.geometry, 1)
            low, high = (pool_windows(patches, ImageConfig.pool) for patches in (view, stitched))
            views = [windows.reshape(-1, windows.shape[-1]) for windows in (low, high)]
            one_row = [special.im_patch] * high.shape[1] + [special.im_col]
            tokens = [special.low_res_im_start, *[special.im_patch] * len(views[0]), special.im_end]
            tokens += [special.im_start, *one_row * high.shape[0], special.im_end]
            crops = 1 + tiling[0] * tiling[1]
            self.pictures[len(tokens)] = Picture(crops, np.array(tokens), np.concatenate(views))
        self.stills = tuple(size for size in self.pictures if size != self.frame)

    def mixed(self, rng: np.random.Generator, size: int, max_crops: int) -> list[Tree]:
        """A pack of the shape of stage 2: examples until none of 40 more fits both budgets."""
        trees: list[Tree] = []
        for _ in range(40):
            tree = sft_example(rng, self.frame, self.stills)
            length = len(tree.arrays(0, 1)[0])
            if length <= size and self.crops(tree) <= max_crops:
                trees.append(tree)
                size, max_crops = size - length, max_crops - self.crops(tree)
        return trees

    def crops(self, tree: Tree) -> int:
        return sum(self.pictures[size].crops for size in tree.pictures)

    def videos(self, size: int, each: int) -> list[Tree]:
        """Videos of `each` tokens, with as large a share of frames as 384 have in 36,864 tokens, that fill a pack."""
        frames = each * 384 * (FRAME + TIMESTAMP) // (36864 * (self.frame + TIMESTAMP))
        return long_video_pack(each, frames, self.frame) * (size // each)


def batch(packs: list[list[Tree]], size: int, model: Molmo2Config, seed: int = 0) -> Batch:
    """A micro-batch of `size` token slots a pack."""
    shapes, rng = Shapes(model), np.random.default_rng(seed)
    rows = [[_example(tree, model, shapes, rng) for tree in trees] for trees in packs]
    return collate(rows, sequence_length=size, im_patch_id=SpecialIds.at(model.text.vocab_size).im_patch)


def _example(tree: Tree, model: Molmo2Config, shapes: Shapes, rng: np.random.Generator) -> Example:
    _, branches, blocks = tree.arrays(0, 1)
    tokens, root = len(blocks), int((branches < 0).sum())
    ids = rng.integers(0, model.text.vocab_size, tokens)
    labels = np.roll(ids, -1)
    patches, crops = model.vision.num_patches, 0
    pooling, unit_crops = [np.zeros((0, 1), np.int64)], []
    for number in range(1, len(tree.pictures) + 1):
        at = np.flatnonzero(blocks == number)
        picture = shapes.pictures[len(at)]
        ids[at] = picture.ids
        pooling.append(np.where(picture.pooling >= 0, picture.pooling + crops * patches, -1))
        unit_crops.append(picture.crops)
        crops += picture.crops
    width = max(rows.shape[1] for rows in pooling)
    pooling = [np.pad(rows, [(0, 0), (0, width - rows.shape[1])], constant_values=-1) for rows in pooling]
    positions = np.arange(tokens)
    weights = np.zeros(tokens, np.float32)
    ends = [*np.flatnonzero(np.diff(branches, append=-2) != 0) + 1]
    begins = [0, *ends[:-1]]
    for begin, end in zip(begins, ends, strict=True):
        if branches[begin] >= 0:
            positions[begin:end] -= begin - root
        elif tree.branches:
            continue
        else:
            begin = end - tree.text[-1]
        weights[end - (end - begin) // 4 : end] = 1.0
    return Example(
        input_ids=ids,
        labels=np.where(labels < model.text.vocab_size, labels, 0),
        loss_weights=weights,
        position_ids=positions,
        branch_ids=branches,
        visual=blocks > 0,
        crops=rng.integers(0, 256, (crops, *shapes.crop_shape), np.uint8),
        pooling=np.concatenate(pooling),
        unit_crops=np.array(unit_crops, np.int64),
        unit_pooled_tokens=np.array([len(rows) for rows in pooling[1:]], np.int64),
        key="noise",
        source="noise",
    )


def batch_flops(model_config: Molmo2Config, batch: Batch) -> Flops:
    """Operations of a micro-batch's forward pass, from its arrays."""
    return pack_flops(model_config, PackCounts.of(batch, model_config.visual_attention, model_config.text.vocab_size))
