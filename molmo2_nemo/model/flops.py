"""Floating-point operations of the vision side, and by them what an indivisible unit of it costs. No torch.

cost/flops.py counts a whole pack with these. The model itself shards crops among ranks by them.

Legend: U units (an image with its tiles, or one video frame).
"""

from __future__ import annotations

import numpy as np

from molmo2_nemo.model.config import Molmo2Config

USUAL_WINDOW = 4  # patches in the pooling window of an image's visual token; a frame's has 9


def crop_flops(model_config: Molmo2Config) -> float:
    """The vision encoder on one crop: built blocks with full attention over its patches, and the patch embedding."""
    vision = model_config.vision
    width, patches = vision.hidden_size, vision.num_patches
    weights = 4 * width * width + 2 * width * vision.ffn_size
    block = 2.0 * patches * weights + 4.0 * patches * patches * width
    return vision.num_built_layers * block + 2.0 * patches * vision.patch_dim * width


def feature_bytes(model_config: Molmo2Config, bytes_per_element: int) -> int:
    """What the vision encoder makes of one crop."""
    vision = model_config.vision
    return vision.num_patches * vision.feature_size * bytes_per_element


def connector_flops(model_config: Molmo2Config, pooled_tokens: float, window_positions: float) -> float:
    """Pooling and projector: keys and values per filled window position, query, output and projector per token."""
    connector, features = model_config.connector, model_config.vision.feature_size
    width = connector.hidden_size
    per_position = 2.0 * 2 * features * width + 4.0 * width
    projector = connector.ffn_size * (2 * width + model_config.text.hidden_size)
    return per_position * window_positions + 2.0 * (features * width + width * width + projector) * pooled_tokens


def unit_costs(model_config: Molmo2Config, unit_crops: np.ndarray, unit_pooled_tokens: np.ndarray) -> np.ndarray:
    """Cost of each vision unit, float64 [U]: operations of encoding its crops and pooling its tokens."""
    pooling = connector_flops(model_config, 1, USUAL_WINDOW)
    return unit_crops * crop_flops(model_config) + unit_pooled_tokens * pooling
