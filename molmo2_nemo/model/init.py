"""Parameters from whole tensors: fresh ones, and those of a checkpoint or of another implementation.

Tensors come whole, under canonical names (layers numbered over the whole model; the names of one process's model), and
are cut to this rank's shard here. So a model has the same weights on one process and under any tensor, pipeline or data
parallel layout. Fresh parameters are drawn from a generator seeded with (seed, canonical name): weights are
N(0, initializer_range) (0.02 as published for the connector and the extra rows), biases 0, norm weights 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from molmo2_nemo.errors import UserError
from molmo2_nemo.model.config import Molmo2Config

VOCABULARY = ("embedding.base.weight", "output_layer.weight")  # rows are padded to a multiple of the TP size


Names = Callable[[str], bool]  # which parameters, by name


def undrawn(tensor: Tensor) -> Tensor:
    """Megatron's init_method: leaves a weight as it lies in memory. `initialize` or a checkpoint fills it."""
    return tensor


def every(name: str) -> bool:
    """All parameters."""
    return True


def initialize(model: Any, seed: int, chosen: Names = every) -> None:
    """Fill parameters of this rank's part of a Molmo2Model with fresh values, in place. What one gets does not depend
    on which others are chosen."""
    shapes = {canonical_name(model, n): full_shape(model, n, p) for n, p in model.named_parameters()}
    load_canonical(
        model, lambda name: fresh(name, shapes[name], seed, init_std(model.model_config, name, shapes[name])), chosen
    )


def leave_to_checkpoint(model: Any, chosen: Names = every) -> None:
    """Fill parameters that a checkpoint will bring with NaN, so that one it does not bring cannot be taken for a
    weight: training refuses to start from numbers that are not finite. Padding rows, which no checkpoint has, are
    zeros."""
    rank, vocabulary = parallel_state.get_tensor_model_parallel_rank(), model.model_config.text.vocab_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not chosen(name):
                continue
            parameter.fill_(torch.nan)
            if canonical_name(model, name) in VOCABULARY:
                parameter[max(0, vocabulary - rank * parameter.shape[0]) :] = 0


def init_std(model_config: Molmo2Config, name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a fresh weight: each part of the model has its own `initializer_range`. An adapter's A is
    spread as PEFT's is (uniform up to 1 / sqrt(in)), its B is zero."""
    if name.endswith("lora_a"):
        return (3 * shape[1]) ** -0.5
    if name.endswith("lora_b"):
        return 0.0
    if name.startswith("vision."):
        return model_config.vision.initializer_range
    if name.startswith("connector."):
        return model_config.connector.initializer_range
    return model_config.text.initializer_range


def load_canonical(model: Any, read: Callable[[str], Tensor], chosen: Names = every) -> None:
    """Fill parameters of this rank's part of a Molmo2Model, in place, one tensor at a time.

    Args:
        read: canonical name -> the whole tensor. Vocabulary tables may bring padding rows; they are ignored.
        chosen: by the name in this rank's part.

    Raises:
        UserError: a tensor whose shape is not that of the model's parameter on one process.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not chosen(name):
                continue
            whole, shape = read(canonical_name(model, name)), full_shape(model, name, parameter)
            if canonical_name(model, name) in VOCABULARY:
                whole = whole[: shape[0]]
            if tuple(whole.shape) != shape:
                raise UserError(
                    f"{canonical_name(model, name)} has shape {list(whole.shape)}, but model "
                    f"{model.model_config.name!r} has {list(shape)} there; choose the model whose weights these are"
                )
            parameter.copy_(shard(model, name, parameter, whole))


def canonical_name(model: Any, name: str) -> str:
    """A parameter's name with the layer's number in the whole model, not in this pipeline stage.

    A tied head on the last pipeline stage gets the name of the base embedding, of which it is a copy.
    """
    if name == "output_layer.weight" and getattr(model, "share_embeddings_and_output_weights", False):
        return "embedding.base.weight"
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        layer = model.get_submodule(".".join(parts[:3]))
        parts[2] = str(layer.layer_number - 1)
    return ".".join(parts)


def full_shape(model: Any, name: str, parameter: Tensor) -> tuple[int, ...]:
    """Shape of a parameter on one process, without vocabulary padding."""
    shape = list(parameter.shape)
    if canonical_name(model, name) in VOCABULARY:
        shape[0] = model.model_config.text.vocab_size
    elif (dim := shard_dim(parameter)) is not None:
        shape[dim] *= parallel_state.get_tensor_model_parallel_world_size()
    return tuple(shape)


def shard_dim(parameter: Tensor) -> int | None:
    """The dimension that tensor parallelism cuts, None for a replicated parameter."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return int(parameter.partition_dim)  # type: ignore[attr-defined]


def shard(model: Any, name: str, parameter: Tensor, whole: Tensor) -> Tensor:
    """This tensor-parallel rank's part of a whole tensor; padding rows of the vocabulary are zeros."""
    dim = shard_dim(parameter)
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    if dim is None or size == 1:
        return whole
    if canonical_name(model, name) in VOCABULARY:
        whole = F.pad(whole, (0, 0, 0, parameter.shape[0] * size - whole.shape[0]))
    if "linear_fc1" in name:  # [gate; up], each cut on its own
        return whole.unflatten(0, (2, -1)).chunk(size, dim=1)[rank].flatten(0, 1)
    return whole.chunk(size, dim=dim)[rank]


def fresh(name: str, shape: tuple[int, ...], seed: int, std: float) -> Tensor:
    """A whole fresh parameter, fp32: zeros, ones or normal with deviation `std`, by its name."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if "norm" in name.rsplit(".", 2)[-2]:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * std
