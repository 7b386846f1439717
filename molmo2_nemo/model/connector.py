"""From patch features to visual tokens: attention pooling over small windows, then a projector.

A visual token is a window of patches (2 x 2 in images, 3 x 3 in video). Its query is the mean of the window's valid
patches; keys and values are the patches themselves. A SwiGLU projects the result to the language model's width.

Shape legend: C crops, P patches per crop, F feature width, N visual tokens, K positions of a window, D width of the
language model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo2_nemo.fused.pooling import PLAIN, Pooling
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.model.linear import Linear
from molmo2_nemo.model.vision import Attention


class Connector(nn.Module):
    """features [C, P, F] and windows [N, K] -> visual tokens [N, D]. function: one of fused/pooling.py."""

    def __init__(
        self, model_config: Molmo2Config, dtype: torch.dtype = torch.float32, function: Pooling = PLAIN
    ) -> None:
        super().__init__()
        self.function = function
        c = model_config.connector
        self.pooling = Attention(
            model_config.vision.feature_size, c.hidden_size, c.num_heads, c.float32_attention, dtype
        )
        self.projector = Projector(c.hidden_size, c.ffn_size, model_config.text.hidden_size, dtype)

    def forward(self, features: Tensor, windows: Tensor) -> Tensor:
        """Pool and project.

        Args:
            features: [C, P, F].
            windows: int64 [N, K], indices into the flattened C * P axis; -1 marks an empty position. Every window has
                at least one valid one.

        Returns:
            [N, D] in the order of the windows.
        """
        patches, query, valid = self.function.gather(features.flatten(0, 1), windows)
        maps = self.pooling
        q, k, v = maps.q_proj(query), maps.k_proj(patches), maps.v_proj(patches)
        pooled = self.function.attend(q, k, v, valid, maps.num_heads, maps.float32)
        return self.projector(maps.o_proj(pooled))


class Projector(nn.Module):
    """SwiGLU without biases, [N, in] -> [N, out]."""

    def __init__(self, in_size: int, ffn_size: int, out_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = Linear(in_size, ffn_size, bias=False, dtype=dtype)
        self.up_proj = Linear(in_size, ffn_size, bias=False, dtype=dtype)
        self.down_proj = Linear(ffn_size, out_size, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
