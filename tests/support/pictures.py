"""One picture as the model gets it."""

from __future__ import annotations

import numpy as np

from molmo2_nemo.data.config import ImageConfig
from molmo2_nemo.data.image import TileGeometry, VisualInput, image_crops, image_layout
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
