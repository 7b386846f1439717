"""Still images: RGB -> tiles and a global view -> patches, pooling windows, visual tokens.

An image is stretched to a canvas of rows x cols overlapping tiles and, separately, to one global view. The patches of
the canvas form one grid (each from the tile that owns it), which is pooled in pool x pool windows; each window is one
`<im_patch>` token. Facts: Molmo2's released image preprocessor; transformers' Molmo2 image processor agrees with it.

Shape legend: C crops, P patches per crop, D_p values per patch, N pooled tokens, K patches of a full pooling window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from molmo2_nemo.data.config import ImageConfig
from molmo2_nemo.data.resize import patchify, resizes
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.errors import DataError, UserError


@dataclass(slots=True)
class VisualInput:
    """The visual input of an example: its crops, and the tokens that represent them in the sequence."""

    token_ids: list[int]
    crops: np.ndarray  # uint8 [C, P, D_p]
    pooling: np.ndarray  # int64 [N, K], patch index crop * P + patch or -1
    unit_crops: list[int]  # crops per indivisible unit: one image with its tiles, or one video frame
    unit_pooled_tokens: list[int]  # pooled tokens per unit
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TileGeometry:
    """Sizes that follow from an `ImageConfig`."""

    crop: int  # pixels
    patch: int  # pixels
    margin: int  # patches
    pool: int  # patches

    @classmethod
    def of(cls, config: ImageConfig) -> TileGeometry:
        geometry = cls(config.crop_size, config.patch_size, config.margin, config.pool)
        if geometry.crop % geometry.patch or geometry.window_patches <= 0:
            raise UserError(
                f"image.crop_size {config.crop_size}, patch_size {config.patch_size} and margin {config.margin} do not "
                "fit: crop_size must be a multiple of patch_size and hold more than two margins"
            )
        return geometry

    @property
    def grid(self) -> int:
        """Patches per side of a crop."""
        return self.crop // self.patch

    @property
    def window_patches(self) -> int:
        return self.grid - 2 * self.margin

    @property
    def window(self) -> int:
        """Step between tiles, pixels."""
        return self.window_patches * self.patch

    @property
    def overlap(self) -> int:
        """Both margins together, pixels."""
        return 2 * self.margin * self.patch

    def canvas(self, tiling: tuple[int, int]) -> tuple[int, int]:
        """Height and width in pixels of the stretched image."""
        return tiling[0] * self.window + self.overlap, tiling[1] * self.window + self.overlap

    def new_crops(self, count: int) -> np.ndarray:
        """Room for crops, not filled: uint8 [count, P, D_p]."""
        return np.empty((count, self.grid**2, self.patch**2 * 3), np.uint8)


def select_tiling(height: int, width: int, window: int, max_crops: int) -> tuple[int, int]:
    """Rows and columns of tiles for an image of height x width pixels, not counting the overlap margins.

    The smallest enlargement wins; if every canvas is smaller than the image, the one that shrinks it least.
    """
    candidates = [(i, j) for i in range(1, max_crops + 1) for j in range(1, max_crops // i + 1)]
    candidates.sort(key=lambda tiling: (tiling[0] * tiling[1], tiling[0]))
    canvas = np.array(candidates, dtype=np.float32) * np.float32(window)
    scale = np.min(canvas / np.array([height, width], dtype=np.float32), axis=1)
    if np.all(scale < 1):
        return candidates[int(np.argmax(scale))]
    return candidates[int(np.argmin(np.where(scale < 1, np.float32(np.inf), scale)))]


def pool_windows(ids: np.ndarray, pool: int) -> np.ndarray:
    """Group a grid of patch ids [rows, cols] into windows: int64 [ceil(rows/pool), ceil(cols/pool), pool * pool].

    A grid that does not divide is padded with -1, the odd one at the bottom and right.
    """
    pads = [(-size) % pool for size in ids.shape]
    padded = np.pad(ids, [(pad // 2, pad - pad // 2) for pad in pads], constant_values=-1)
    rows, cols = padded.shape[0] // pool, padded.shape[1] // pool
    return padded.reshape(rows, pool, cols, pool).transpose(0, 2, 1, 3).reshape(rows, cols, pool * pool)


def tile_patch_ids(tiling: tuple[int, int], geometry: TileGeometry, first_crop: int) -> np.ndarray:
    """Flat patch ids of the stitched image: int64 [rows * window + overlap, cols * window + overlap] in patches.

    Where tiles overlap, each keeps its inside: `margin` patches are cut from every edge it shares with a neighbour.
    """
    window, margin, grid = geometry.window_patches, geometry.margin, geometry.grid
    y, x = (np.arange(count * window + 2 * margin) for count in tiling)
    row, col = (np.clip((v - margin) // window, 0, n - 1) for v, n in zip((y, x), tiling, strict=True))
    crop = first_crop + row[:, None] * tiling[1] + col[None, :]
    inside = (y - row * window)[:, None] * grid + (x - col * window)[None, :]
    return crop * grid * grid + inside


def image_layout(
    size: tuple[int, int], config: ImageConfig, tokenizer: Molmo2Tokenizer, *, max_crops: int, first_crop: int = 0
) -> VisualInput:
    """The tokens and pooling windows of an image of width x height pixels; its crops, not made, are [0, P, D_p].

    `first_crop` is the number of crops before this image; pooling ids count from the example's first crop.
    """
    geometry, special = TileGeometry.of(config), tokenizer.special
    width, height = size
    tiling = select_tiling(
        max(height - geometry.overlap, 1), max(width - geometry.overlap, 1), geometry.window, max_crops
    )
    patches = geometry.grid**2
    overview = np.arange(patches).reshape(geometry.grid, geometry.grid) + first_crop * patches
    low = pool_windows(overview, geometry.pool)
    high = pool_windows(tile_patch_ids(tiling, geometry, first_crop + 1), geometry.pool)
    low_tokens = low.shape[0] * low.shape[1]
    one_row = [special.im_patch] * high.shape[1] + [special.im_col]
    tokens = [special.low_res_im_start, *[special.im_patch] * low_tokens, special.im_end]
    tokens += [special.im_start, *one_row * high.shape[0], special.im_end]
    pooling = np.concatenate([low.reshape(low_tokens, -1), high.reshape(-1, high.shape[-1])]).astype(np.int64)
    return VisualInput(
        token_ids=tokens,
        crops=geometry.new_crops(0),
        pooling=pooling,
        unit_crops=[math.prod(tiling) + 1],
        unit_pooled_tokens=[len(pooling)],
        info={"size": [width, height], "tiling": list(tiling), "token_grid": list(high.shape[:2])},
    )


def images_layout(
    sizes: Sequence[tuple[int, int]], config: ImageConfig, tokenizer: Molmo2Tokenizer, *, high_res: bool = False
) -> VisualInput:
    """The layout of all images of an example, in order. If there are several, the text `Image N` precedes each.

    Images beyond `config.max_images` are ignored (as in the training of the released model); `info["ignored"]` counts
    them. `high_res` allows a single image up to `high_res_max_crops` tiles.

    Args:
        sizes: width and height of each upright image, pixels.
    """
    if not sizes:
        raise DataError("no images given")
    used = sizes[: config.max_images]
    max_crops = config.max_crops if len(used) == 1 else config.max_multi_image_crops
    if high_res and len(used) == 1:
        max_crops = config.high_res_max_crops
    parts: list[VisualInput] = []
    tokens: list[int] = []
    crops = 0
    for number, size in enumerate(used, start=1):
        part = image_layout(size, config, tokenizer, max_crops=max_crops, first_crop=crops)
        if len(used) > 1:
            tokens += tokenizer.encode(f"Image {number}")
        tokens += part.token_ids
        crops += sum(part.unit_crops)
        parts.append(part)
    return VisualInput(
        token_ids=tokens,
        crops=parts[0].crops,
        pooling=np.concatenate([part.pooling for part in parts]),
        unit_crops=[count for part in parts for count in part.unit_crops],
        unit_pooled_tokens=[len(part.pooling) for part in parts],
        info={"images": [part.info for part in parts], "ignored": len(sizes) - len(used)},
    )


def image_crops(pixels: np.ndarray, tiling: Sequence[int], geometry: TileGeometry, out: np.ndarray) -> None:
    """Write an image, uint8 [H, W, 3], as its global view and then its tiles, row by row, to `out` [C, P, D_p]."""
    rows, cols = tiling
    side, step, patch = geometry.crop, geometry.window, geometry.patch
    view, canvas = resizes(pixels, [(side, side), geometry.canvas((rows, cols))])
    patchify(view[None], patch, out[:1])
    for tile in range(rows * cols):
        y, x = tile // cols * step, tile % cols * step
        patchify(canvas[None, y : y + side, x : x + side], patch, out[tile + 1 : tile + 2])


def no_visual(config: ImageConfig) -> VisualInput:
    """The visual input of a text-only example: no crops, no tokens."""
    geometry = TileGeometry.of(config)
    return VisualInput(
        token_ids=[],
        crops=geometry.new_crops(0),
        pooling=np.zeros((0, geometry.pool**2), np.int64),
        unit_crops=[],
        unit_pooled_tokens=[],
    )
