"""Attention pooling over small windows: each window's patches, their mean as the one query, attention over them.

    plain      a batch of attentions with one query each, by F.scaled_dot_product_attention. Empty positions read patch
               0, where backward adds up thousands of zero gradients, one after another on CUDA
    direct     a dot with at most 9 keys, a softmax in fp32 and a sum, written out. Empty positions read a patch of
               their own window
    compiled   direct, in few kernels

Shape legend: R patches of all crops, N windows, K positions of a window, F feature width, W attention width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from molmo2_nemo.fused.compiled import Compiled


@dataclass(frozen=True)
class Pooling:
    """gather(features [R, F], windows int64 [N, K]; -1 is empty, one at least is not) -> patches [N, K, F], query
    [N, F], valid bool [N, K]. Patches of empty positions are finite, and without a gradient.

    attend(q [N, W], k [N, K, W], v [N, K, W], valid, heads, float32) -> [N, W]; float32: computed in fp32 throughout.
    """

    gather: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, int, bool], Tensor]


def _plain_gather(features: Tensor, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    valid = windows >= 0
    patches = features[windows.clamp(min=0)] * valid[..., None]
    count = valid.sum(1, keepdim=True).clamp(min=1).to(patches.dtype)
    return patches, patches.sum(1) / count, valid


def _plain_attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, heads: int, float32: bool) -> Tensor:
    dtype = q.dtype
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q[:, None], k, v))
    if float32:
        q, k, v = q.float(), k.float(), v.float()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, :])
    return out.transpose(1, 2).flatten(2).to(dtype)[:, 0]


def _own_patches(features: Tensor, windows: Tensor) -> Tensor:
    """[N, K, F]; empty positions read a patch that the window has anyway."""
    rows = torch.where(windows >= 0, windows, windows.amax(1, keepdim=True))
    return features.index_select(0, rows.flatten()).unflatten(0, windows.shape)


def _mean(patches: Tensor, windows: Tensor) -> Tensor:
    valid = windows >= 0
    total = (patches.float() * valid[..., None]).sum(1)
    return (total / valid.sum(1, keepdim=True).clamp(min=1)).to(patches.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, heads: int, float32: bool) -> Tensor:
    q32, k32, v32 = (t.float().reshape(*t.shape[:-1], heads, t.shape[-1] // heads) for t in (q, k, v))
    scores = (q32[:, None] * k32).sum(-1) * q32.shape[-1] ** -0.5  # [N, K, heads]
    shares = scores.masked_fill(~valid[..., None], float("-inf")).softmax(1)
    return (shares[..., None] * v32).sum(1).flatten(1).to(q.dtype)


_compiled_mean, _compiled_attend = Compiled(_mean, 0, 1), Compiled(_attend, 0, 1, 2, 3)


def _direct_gather(features: Tensor, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    patches = _own_patches(features, windows)
    return patches, _mean(patches, windows), windows >= 0


def _compiled_gather(features: Tensor, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not windows.numel():
        return _direct_gather(features, windows)
    patches = _own_patches(features, windows)
    return patches, _compiled_mean(patches, windows), windows >= 0


def _attend_by_compiler(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, heads: int, float32: bool) -> Tensor:
    return (_compiled_attend if valid.numel() else _attend)(q, k, v, valid, heads, float32)


PLAIN = Pooling(_plain_gather, _plain_attend)
DIRECT = Pooling(_direct_gather, _attend)
COMPILED = Pooling(_compiled_gather, _attend_by_compiler)
