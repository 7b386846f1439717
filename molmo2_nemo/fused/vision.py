"""One block of the vision encoder as a function of its input and parameters: pre-norm attention, then a gelu MLP.

Shape legend: C crops, P patches per crop, W encoder width, N heads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from molmo2_nemo.fused.compiled import Compiled


def plain(x: Tensor, heads: int, eps: float, float32: bool, *parameters: Tensor) -> Tensor:
    """[C, P, W] -> [C, P, W].

    Attention has neither mask nor dropout, so that PyTorch may take any of its kernels for it.

    Args:
        float32: attention is computed in fp32 whatever x's dtype.
        parameters: weight and bias of norm1, q, k, v, o, norm2, fc1 and fc2, as a VisionBlock has them.
    """
    norm1, q, k, v, o, norm2, fc1, fc2 = zip(parameters[::2], parameters[1::2], strict=True)
    y = F.layer_norm(x, x.shape[-1:], *norm1, eps)
    shape = *y.shape[:-1], heads, y.shape[-1] // heads
    query, key, value = (F.linear(y, *map_).reshape(shape).transpose(1, 2) for map_ in (q, k, v))
    if float32:
        query, key, value = query.float(), key.float(), value.float()
    out = F.scaled_dot_product_attention(query, key, value)
    x = x + F.linear(out.transpose(1, 2).flatten(2).to(y.dtype), *o)
    y = F.layer_norm(x, x.shape[-1:], *norm2, eps)
    return x + F.linear(F.gelu(F.linear(y, *fc1), approximate="tanh"), *fc2)


_compiled = Compiled(plain, 0)


def by_compiler(x: Tensor, heads: int, eps: float, float32: bool, *parameters: Tensor) -> Tensor:
    """`plain`, compiled: everything between two products in one kernel."""
    return (_compiled if x.numel() else plain)(x, heads, eps, float32, *parameters)
