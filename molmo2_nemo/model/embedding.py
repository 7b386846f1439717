"""Token embedding of base and extra rows, and the output head of base columns only.

The base table (V rows) is Megatron's vocabulary-parallel embedding, padded to a multiple of the tensor-parallel size.
The 128 extra rows, which hold the visual special tokens, are a small replicated table: they train with the connector
while the base rows stay frozen, and they can never be predicted.

Shape legend: B packs, T tokens of this rank, D width, V base vocabulary.
"""

from __future__ import annotations

import copy

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from molmo2_nemo.model.config import Molmo2Config


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the base table once it divides evenly over the tensor-parallel group."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    return (vocab_size + size - 1) // size * size


class Embedding(MegatronModule):
    """ids -> vectors, [B, T] -> [T, B, D]; negative ids (padding) read row 0."""

    def __init__(self, config: TransformerConfig, model_config: Molmo2Config) -> None:
        super().__init__(config=config)
        self.vocab_size = model_config.text.vocab_size
        self.base = tensor_parallel.VocabParallelEmbedding(
            padded_vocab_size(model_config.text.vocab_size),
            model_config.text.hidden_size,
            init_method=config.init_method,
            config=config,
        )
        self.extra = ExtraRows(model_config.extra_vocab_size, model_config.text.hidden_size, config.params_dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        ids = input_ids.clamp(min=0)
        is_extra = ids >= self.vocab_size
        base = self.base(ids.masked_fill(is_extra, 0))
        extra = self.extra((ids - self.vocab_size).clamp(min=0))
        return torch.where(is_extra[..., None], extra, base).transpose(0, 1).contiguous()


class ExtraRows(nn.Module):
    """The rows after the base vocabulary, replicated over the tensor-parallel group."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight)


class Head(tensor_parallel.ColumnParallelLinear):
    """The untied output weight, [V_padded / TP, D] on this rank. The product itself is taken in model/loss.py, only
    for scored positions, so all that this class has of Megatron's layer is the weight and its checkpoints, with the
    padding rule. It is called for the weight: who must know before a parameter is used (training/overlap.py) has a hook
    on that."""

    def __init__(self, config: TransformerConfig, model_config: Molmo2Config) -> None:
        # Megatron's layer refuses fused gradient accumulation without Apex, and its product is never taken
        unfused = copy.copy(config)
        unfused.gradient_accumulation_fusion = False
        super().__init__(
            model_config.text.hidden_size,
            padded_vocab_size(model_config.text.vocab_size),
            config=unfused,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
        )

    def forward(self) -> Tensor:  # type: ignore[override]
        """The weight."""
        return self.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state[f"{prefix}weight"].allow_shape_mismatch = True  # padding depends on the layout
        # A tied head exists under some layouts only: no checkpoint is asked for the (empty) extra state of one.
        state.pop(f"{prefix}_extra_state", None)
        return state
