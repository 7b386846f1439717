"""Pictures as the model gets them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from molmo2_nemo.data.config import ImageConfig
from molmo2_nemo.data.image import TileGeometry, VisualInput, image_crops, image_layout, images_layout
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer


def encode_image(
    pixels: np.ndarray, config: ImageConfig, tokenizer: Molmo2Tokenizer, *, max_crops: int, first_crop: int = 0
) -> VisualInput:
    """The crops and tokens of uint8 [H, W, 3], as those of an example with `first_crop` crops before it."""
    size, geometry = (pixels.shape[1], pixels.shape[0]), TileGeometry.of(config)
    visual = image_layout(size, config, tokenizer, max_crops=max_crops, first_crop=first_crop)
    visual.crops = geometry.new_crops(sum(visual.unit_crops))
    image_crops(pixels, visual.info["tiling"], geometry, visual.crops)
    return visual


def encode_images(
    images: Sequence[np.ndarray], config: ImageConfig, tokenizer: Molmo2Tokenizer, *, high_res: bool = False
) -> VisualInput:
    """All images of an example, uint8 [H, W, 3] each, as crops and tokens; see `images_layout`."""
    sizes = [(pixels.shape[1], pixels.shape[0]) for pixels in images]
    visual = images_layout(sizes, config, tokenizer, high_res=high_res)
    geometry, end = TileGeometry.of(config), 0
    visual.crops = geometry.new_crops(sum(visual.unit_crops))
    for pixels, info, count in zip(images, visual.info["images"], visual.unit_crops, strict=False):
        start, end = end, end + count
        image_crops(pixels, info["tiling"], geometry, visual.crops[start:end])
    return visual
