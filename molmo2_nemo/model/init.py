"""Fresh parameters that do not depend on the layout.

Every parameter is drawn whole from a generator seeded with (seed, its canonical name) and then cut to this rank's
shard, so a model has the same weights on one process and under any tensor, pipeline or data parallel layout.
Weights are N(0, 0.02) (as published for the connector and the extra rows), biases 0, norm weights 1.
"""

from __future__ import annotations

import hashlib

import torch
from megatron.core import parallel_state
from torch import Tensor, nn


def initialize(model: nn.Module, seed: int, std: float) -> None:
    """Fill all parameters of this rank's part of a Molmo2Model, in place."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = canonical_name(model, name)
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name.rsplit(".", 2)[-2]:
                parameter.fill_(1.0)
            else:
                parameter.copy_(_shard_of_fresh(name, parameter, seed, std, rank, size))


def canonical_name(model: nn.Module, name: str) -> str:
    """A parameter's name with the layer's number in the whole model, not in this pipeline stage.

    A tied head that lives on the last pipeline stage is called what it is a copy of: the base embedding.
    """
    if name == "output_layer.weight" and getattr(model, "share_embeddings_and_output_weights", False):
        return "embedding.base.weight"
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        layer = model.get_submodule(".".join(parts[:3]))
        parts[2] = str(layer.layer_number - 1)
    return ".".join(parts)


def _shard_of_fresh(name: str, parameter: Tensor, seed: int, std: float, rank: int, size: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    shape = list(parameter.shape)
    sharded = getattr(parameter, "tensor_model_parallel", False) and size > 1
    if not sharded:
        return torch.randn(shape, generator=generator) * std
    dim = parameter.partition_dim  # type: ignore[attr-defined]
    full_shape = [n * size if i == dim else n for i, n in enumerate(shape)]
    full = torch.randn(full_shape, generator=generator) * std
    if "linear_fc1" in name:  # [gate; up], each cut on its own
        return full.unflatten(0, (2, -1)).chunk(size, dim=1)[rank].flatten(0, 1)
    return full.chunk(size, dim=dim)[rank]
