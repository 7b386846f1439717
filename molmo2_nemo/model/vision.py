"""The vision encoder: a SigLIP2-style transformer over the patches of one crop.

No class token, no final norm, full attention inside a crop. The outputs of two blocks, concatenated on the channel
axis, are the features (published: block 24, then block 18, of a 27-block encoder whose last two are never built).
Replicated over the tensor-parallel group; crops are spread over the context-parallel group (see parallel/crops.py).

Shape legend: C crops, P patches per crop, D_p values per patch, W encoder width, N heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo2_nemo.model.config import VisionConfig
from molmo2_nemo.model.linear import Linear

BlockFunction = Callable[..., Tensor]


class VisionEncoder(nn.Module):
    """uint8 patches of crops -> features of two depths.

    Args:
        recompute: keep only block inputs, and recompute blocks in backward.
        block: a function of fused/vision.py that computes a block; None: its modules do.
    """

    def __init__(
        self,
        config: VisionConfig,
        dtype: torch.dtype = torch.float32,
        *,
        recompute: bool = False,
        block: BlockFunction | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.patch_embedding = Linear(config.patch_dim, config.hidden_size, dtype=dtype)
        self.position_embedding = nn.Parameter(torch.empty(config.num_patches, config.hidden_size, dtype=dtype))
        self.blocks = nn.ModuleList(VisionBlock(config, dtype, block) for _ in range(config.num_built_layers))

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

    def __init__(self, config: VisionConfig, dtype: torch.dtype, function: BlockFunction | None = None) -> None:
        super().__init__()
        self.function = function
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps, dtype=dtype)
        self.attention = Attention(
            config.hidden_size, config.hidden_size, config.num_heads, config.float32_attention, dtype
        )
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps, dtype=dtype)
        self.mlp = VisionMLP(config, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.function is not None:
            _announce(self)
            attention = self.attention
            return self.function(x, attention.num_heads, self.norm1.eps, attention.float32, *self.parameters())
        y = self.norm1(x)
        x = x + self.attention(y, y)
        return x + self.mlp(self.norm2(x))


def _announce(block: nn.Module) -> None:
    """Runs what waits for the modules inside `block` to be called, where their parameters are used without them: an
    optimizer that gathers parameters late does so there."""
    for module in block.modules():
        for hook in module._forward_pre_hooks.values() if module is not block else ():
            hook(module, ())


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.ffn_size, dtype=dtype)
        self.fc2 = Linear(config.ffn_size, config.hidden_size, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Attention(nn.Module):
    """Multi-head attention with biases; queries and keys may be different tensors.

    Used by the encoder (queries = keys = patches). The connector's pooling has its linear maps alone from here.
    """

    def __init__(self, in_size: int, out_size: int, num_heads: int, float32: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.float32 = float32
        self.q_proj = Linear(in_size, out_size, dtype=dtype)
        self.k_proj = Linear(in_size, out_size, dtype=dtype)
        self.v_proj = Linear(in_size, out_size, dtype=dtype)
        self.o_proj = Linear(out_size, out_size, dtype=dtype)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """queries [C, Q, in], keys [C, K, in] -> [C, Q, out]."""
        q = self.q_proj(queries).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k = self.k_proj(keys).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        v = self.v_proj(keys).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        dtype = q.dtype
        if self.float32:
            q, k, v = q.float(), k.float(), v.float()
        out = F.scaled_dot_product_attention(q, k, v)  # no mask: PyTorch may take any of its kernels
        return self.o_proj(out.transpose(1, 2).flatten(2).to(dtype))
