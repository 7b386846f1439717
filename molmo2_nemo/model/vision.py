"""The vision encoder: a SigLIP2-style transformer over the patches of one crop.

No class token, no final norm, full attention inside a crop. The outputs of two blocks, concatenated on the channel
axis, are the features (published: block 24, then block 18, of a 27-block encoder whose last two are never built).
Replicated over the tensor-parallel group; crops are spread over the context-parallel group (see parallel/crops.py).

Shape legend: C crops, P patches per crop, D_p values per patch, W encoder width, N heads, H head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo2_nemo.model.config import VisionConfig
from molmo2_nemo.model.linear import Linear


class VisionEncoder(nn.Module):
    """uint8 patches of crops -> features of two depths.

    Args:
        recompute: keep only block inputs, and recompute blocks in backward.
    """

    def __init__(self, config: VisionConfig, dtype: torch.dtype = torch.float32, *, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.patch_embedding = Linear(config.patch_dim, config.hidden_size, dtype=dtype)
        self.position_embedding = nn.Parameter(torch.empty(config.num_patches, config.hidden_size, dtype=dtype))
        self.blocks = nn.ModuleList(VisionBlock(config, dtype) for _ in range(config.num_built_layers))

    def forward(self, crops: Tensor) -> Tensor:
        """uint8 [C, P, D_p] -> [C, P, W * number of feature layers]."""
        dtype = self.position_embedding.dtype
        x = (crops.float() / 255 * 2 - 1).to(dtype)
        x = self.patch_embedding(x) + self.position_embedding
        outputs = {}
        for index, block in enumerate(self.blocks):
            if self.recompute and self.training and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if index in self.config.feature_indices:
                outputs[index] = x
        return torch.cat([outputs[i] for i in self.config.feature_indices], dim=-1)


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP, [C, P, W] -> [C, P, W]."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps, dtype=dtype)
        self.attention = Attention(
            config.hidden_size, config.hidden_size, config.num_heads, config.float32_attention, dtype
        )
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps, dtype=dtype)
        self.mlp = VisionMLP(config, dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y)
        return x + self.mlp(self.norm2(x))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.ffn_size, dtype=dtype)
        self.fc2 = Linear(config.ffn_size, config.hidden_size, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Attention(nn.Module):
    """Multi-head attention with biases; queries and keys may be different tensors, and keys may be masked.

    Used by the encoder (queries = keys = patches) and by the connector's pooling (one query per window).
    """

    def __init__(self, in_size: int, out_size: int, num_heads: int, float32: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.float32 = float32
        self.q_proj = Linear(in_size, out_size, dtype=dtype)
        self.k_proj = Linear(in_size, out_size, dtype=dtype)
        self.v_proj = Linear(in_size, out_size, dtype=dtype)
        self.o_proj = Linear(out_size, out_size, dtype=dtype)

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries [C, Q, in], keys [C, K, in], mask bool [C, K] (True = may be seen) -> [C, Q, out]."""
        q = self.q_proj(queries).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k = self.k_proj(keys).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        v = self.v_proj(keys).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        dtype = q.dtype
        if self.float32:
            q, k, v = q.float(), k.float(), v.float()
        seen = None if mask is None else mask[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.o_proj(out.transpose(1, 2).flatten(2).to(dtype))
