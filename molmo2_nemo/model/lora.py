"""LoRA on the decoder's linear layers (arXiv 2106.09685): W x + alpha / rank * B A x, with W frozen.

A and B follow Megatron's cut of W, so that nothing wide is ever gathered for them:

    column-parallel (linear_qkv, linear_fc1)   A [rank, in] on every rank,        B [out / TP, rank] sharded
    row-parallel    (linear_proj, linear_fc2)  A [rank, in / TP] sharded,         B [out, rank] on every rank

What crosses the tensor-parallel group is A x, `rank` numbers per token. B starts at zero, so a fresh adapter changes
nothing. Adapters are parameters `lora_a` and `lora_b` beside `weight`; export adds them up.

Shape legend: T tokens of this rank, B packs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from molmo2_nemo.model.config import LoraConfig
from molmo2_nemo.model.sharded import sharded_tensors


@functools.cache
def with_lora(linear: type, rank: int, scale: float, column: bool) -> type:
    """Megatron's column- or row-parallel `linear` with an adapter beside its weight."""
    sharded = {"lora_b": 0} if column else {"lora_a": 1}  # the dimension that tensor parallelism cuts

    class LoraLinear(linear):  # type: ignore[misc, valid-type]
        def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.gated = kwargs.get("tp_comm_buffer_name") == "fc1"  # its rows are [gate; up], cut each on its own
            self.spread_tokens = config.sequence_parallel
            size = parallel_state.get_tensor_model_parallel_world_size()
            shapes = {"lora_a": [rank, input_size], "lora_b": [output_size, rank]}
            for name, dim in sharded.items():
                shapes[name][dim] //= size
            for name, shape in shapes.items():
                parameter = nn.Parameter(torch.zeros(shape, dtype=config.params_dtype, device=self.weight.device))
                if name in sharded:
                    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
                    parameter.partition_dim = sharded[name]  # type: ignore[attr-defined]
                    parameter.partition_stride = 2 if self.gated else 1  # type: ignore[attr-defined]
                else:  # on a shard of the tokens its gradient is partial: Megatron adds those up
                    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
                self.register_parameter(name, parameter)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            """[T, B, in] -> [T, B, out], cut as Megatron cuts them."""
            out, bias = super().forward(x)
            low = F.linear(x, self.lora_a) * scale  # [T, B, rank]
            if column and self.spread_tokens:
                low = gather_from_sequence_parallel_region(low)
            elif column:
                low = copy_to_tensor_model_parallel_region(low)
            elif self.spread_tokens:
                low = reduce_scatter_to_sequence_parallel_region(low)
            else:
                low = reduce_from_tensor_model_parallel_region(low)
            return out + F.linear(low, self.lora_b), bias

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
        ) -> ShardedStateDict:
            state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            own = {"lora_a": self.lora_a, "lora_b": self.lora_b}
            state |= sharded_tensors(own, sharded, prefix, sharded_offsets, metadata)
            if self.gated:
                key, single = f"{prefix}lora_b", (metadata or {}).get("singleton_local_shards", False)
                state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets, single)
            return state

    LoraLinear.__name__ = f"Lora{linear.__name__}"
    return LoraLinear


def adapted(linear: type, name: str, lora: LoraConfig | None, *, column: bool) -> type:
    """`linear`, with an adapter where `lora` wants one for the layers called `name`."""
    if lora is None or name not in lora.targets:
        return linear
    return with_lora(linear, lora.rank, lora.scale, column)
