"""The language model as Megatron layer specs.

Layers are Megatron-core `TransformerLayer`s. How those of a family differ (model/families) is turned into specs here:

    post_norm   x + norm(attention(x)), x + norm(mlp(x)) in place of x + attention(norm(x)), x + mlp(norm(x))
    qk_norm     no norm of queries and keys, one per head, or one over the whole projection

With Transformer Engine installed (GPU) the linear layers are its own; otherwise Megatron's. Norms are ours in both
cases: an RMSNorm whose weight takes part in sequence parallelism.

Shape legend: T tokens of this rank, B packs, D width, N heads, H head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from molmo2_nemo.attention.core import PackDescription, TreeAttention
from molmo2_nemo.fused import norm
from molmo2_nemo.fused.choice import Choice
from molmo2_nemo.model.chunks import in_chunks
from molmo2_nemo.model.config import LoraConfig, MemoryConfig, Molmo2Config, TrainingOptions
from molmo2_nemo.model.families import family_of
from molmo2_nemo.model.init import undrawn
from molmo2_nemo.model.lora import adapted
from molmo2_nemo.model.memory import FusedMLP, TiledMLP, recompute_settings
from molmo2_nemo.model.rotary import table_of_layer
from molmo2_nemo.model.sharded import sharded_tensors

RMSNormFunction = Callable[[Tensor, Tensor, float], Tensor]
FullWidthFunction = Callable[[Tensor, Tensor, int, float, Callable[[Tensor], Tensor]], Tensor]


def transformer_config(
    model_config: Molmo2Config, memory: MemoryConfig | None = None, **overrides: Any
) -> TransformerConfig:
    """Megatron's settings for the decoder; `overrides` carries dtype and parallel sizes.

    Raises:
        UserError: options of `memory` that do not go together.
    """
    text = model_config.text
    settings: dict[str, Any] = dict(
        num_layers=text.num_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_heads,
        num_query_groups=text.num_kv_heads,
        kv_channels=text.head_dim,
        ffn_hidden_size=text.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=text.rmsnorm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        # For per-head norms (one weight, many heads) Megatron sums their gradients over the tensor-parallel group; the
        # full-width norm's weight is sharded and must not be summed.
        qk_layernorm=family_of(text).qk_norm == "head",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=text.initializer_range,
        # not perform_initialization=False, with which Megatron leaves out the marks of tensor parallelism too
        init_method=undrawn,
        output_layer_init_method=undrawn,
        calculate_per_token_loss=True,
        # Megatron's own fusions are off: these layers have theirs (KernelConfig). training/model.py switches fused
        # gradient accumulation on where a library provides it.
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        moe_token_dispatcher_type="alltoall",  # no experts here, but packs of varying length are refused with another
    )
    if memory is not None:
        settings.update(recompute_settings(memory))
    settings.update(overrides)
    return TransformerConfig(**settings)


def decoder_spec(
    model_config: Molmo2Config,
    num_layers: int,
    training: TrainingOptions,
    memory: MemoryConfig,
    choices: Mapping[str, Choice],
) -> TransformerBlockSubmodules:
    """Specs of `num_layers` layers (those of this pipeline stage) and the final norm."""
    layer = layer_spec(model_config, training, memory, choices)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=_norm(choices))


def _norm(choices: Mapping[str, Choice]) -> ModuleSpec:
    return ModuleSpec(module=RMSNorm, params={"function": choices["norm"].function})


def layer_spec(
    model_config: Molmo2Config, training: TrainingOptions, memory: MemoryConfig, choices: Mapping[str, Choice]
) -> ModuleSpec:
    """The spec of one decoder layer of the model's family."""
    text = model_config.text
    family = family_of(text)
    post_norm = choices["norm"].function if family.post_norm else None
    linear = functools.partial(_linear, model_config.lora, post_norm)
    qk_norm = _norm(choices) if family.qk_norm == "head" else None
    block_norm = IdentityOp if family.post_norm else _norm(choices)
    return ModuleSpec(
        module=Molmo2Layer,
        params={
            "hidden_dropout": training.residual_dropout,
            "response_residual_dropout": training.response_residual_dropout,
            "dropped_and_added": choices["residual"].function,
            "sequence_chunk": memory.sequence_chunk,
            "keeps_attention": memory.keeps_attention,
        },
        submodules=TransformerLayerSubmodules(
            input_layernorm=block_norm,
            self_attention=ModuleSpec(
                module=_attention_class(family.qk_norm, choices["rotary"]),
                params={"function": norm.FULL_WIDTH.get(choices["norm"].name, norm.full_width)}
                if family.qk_norm == "full"
                else {},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linear("linear_qkv"),
                    core_attention=functools.partial(
                        TreeAttention,
                        rotary_by_layer=table_of_layer(text),
                        kernel=model_config.attention,
                        library=choices["flash"].function,
                        merging=choices["merge"].function,
                        rotate=choices["rotary"].function,
                    ),
                    linear_proj=linear("linear_proj"),
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,  # Molmo2Layer puts its own in its place
            pre_mlp_layernorm=block_norm,
            mlp=_mlp_spec(
                MLPSubmodules(linear_fc1=linear("linear_fc1"), linear_fc2=linear("linear_fc2")),
                memory.mlp_tiles,
                choices["swiglu"],
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _attention_class(qk_norm: str, rotary: Choice) -> type:
    if qk_norm == "full":
        return FullWidthNormAttention
    return SelfAttention if qk_norm == "none" or rotary.name == "plain" else RotaryNormAttention


def _mlp_spec(submodules: MLPSubmodules, tiles: int, swiglu: Choice) -> ModuleSpec:
    own = {} if swiglu.name == "plain" else {"swiglu": swiglu.function}
    if tiles > 1:
        return ModuleSpec(module=TiledMLP, params={"tiles": tiles, **own}, submodules=submodules)
    return ModuleSpec(module=FusedMLP if own else MLP, params=own, submodules=submodules)


def _linear(lora: LoraConfig | None, post_norm: RMSNormFunction | None, name: str) -> type:
    """The class of a layer's linear map: Megatron's, with an adapter beside it and the post-norm behind it."""
    column, row = _linear_classes()
    if name in ("linear_qkv", "linear_fc1"):
        return adapted(column, name, lora, column=True)
    row = adapted(row, name, lora, column=False)
    return row if post_norm is None else _with_post_norm(row, post_norm)


def _linear_classes() -> tuple[type, type]:
    if HAVE_TE and torch.cuda.is_available():
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        return TEColumnParallelLinear, TERowParallelLinear
    local = LocalSpecProvider()
    return local.column_parallel_linear(), local.row_parallel_linear()


class Molmo2Layer(TransformerLayer):
    """Megatron's layer with Molmo2's residual dropout (TrainingOptions; `hidden_dropout` is Megatron's name for it),
    on all tokens at once, or `sequence_chunk` at a time (model/chunks.py).

    Stage 1 drops residuals of response tokens only, stages 2 and 3 of all tokens; both act on the attention output and
    on the MLP output, behind the norm of a post-norm family.
    """

    def __init__(
        self,
        *args: Any,
        response_residual_dropout: float,
        dropped_and_added: Callable[..., Tensor],
        sequence_chunk: int | None,
        keeps_attention: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sequence_chunk, self.keeps_attention = sequence_chunk, keeps_attention
        self.response_residual_dropout, self.dropped_and_added = response_residual_dropout, dropped_and_added
        self.self_attn_bda = self._bias_dropout_add
        self.mlp_bda = self._bias_dropout_add
        self._response: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        pack = kwargs.get("packed_seq_params")
        if self.sequence_chunk is not None and isinstance(pack, PackDescription) and pack.chunk is pack.cache is None:
            return in_chunks(self, kwargs["hidden_states"], pack, self.sequence_chunk, self.keeps_attention), None
        self._response = pack.response if isinstance(pack, PackDescription) else None
        return super().forward(*args, **kwargs)

    def _bias_dropout_add(self, training: bool, fused: bool) -> Any:
        response, response_rate = self._response, self.response_residual_dropout

        def bias_dropout_add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            x = x_with_bias[0] if x_with_bias[1] is None else x_with_bias[0] + x_with_bias[1]
            if not training:
                return residual + x
            return self.dropped_and_added(x, residual, dropout, response_rate, response)

        return bias_dropout_add


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, back to x's dtype, times the weight. Last dimension; any leading shape.

    Signature as Megatron's norm builders expect (`config`, `hidden_size`, `eps`). function: one of fused/norm.py.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        function: RMSNormFunction = norm.plain,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.eps, self.function = eps, function
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # its gradient on a sequence shard is partial: Megatron sums it over the tensor-parallel group
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.eps)


class RotaryNormAttention(SelfAttention):
    """Megatron's attention whose QK-norms per head are computed together with rotary (fused/rotary.py): the norms of
    this layer hold the weights and hand on what they get."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for layer_norm in (self.q_layernorm, self.k_layernorm):
            layer_norm.function = _unchanged
        self.core_attention.qk_norms = self.q_layernorm, self.k_layernorm


def _unchanged(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x


class FullWidthRMSNorm(nn.Module):
    """QK-norm of kind "full": one RMS over all heads of the projection, [T, B, N / TP, H] on this rank.

    The sum of squares is added up over the tensor-parallel group, forward and backward; the weight [N * H / TP] is
    sharded with the heads.
    """

    def __init__(
        self, function: FullWidthFunction, config: TransformerConfig, hidden_size: int, eps: float, heads: int
    ) -> None:
        super().__init__()
        self.function, self.eps = function, eps
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.width = heads * hidden_size
        self.weight = nn.Parameter(torch.ones(self.width // self.group.size(), dtype=config.params_dtype))
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = 0  # type: ignore[attr-defined]
        self.weight.partition_stride = 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.width, self.eps, self._total)

    def _total(self, squares: Tensor) -> Tensor:
        return _SumOverGroup.apply(squares, self.group) if self.group.size() > 1 else squares

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        return sharded_tensors({"weight": self.weight}, {"weight": 0}, prefix, sharded_offsets, metadata)


class FullWidthNormAttention(SelfAttention):
    """Megatron's attention with QK-norms of kind "full". Megatron knows of norms per head only: told of these, it would
    sum their weights' gradients over the tensor-parallel group, though the weights are sharded."""

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        function: FullWidthFunction = norm.full_width,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, *args, **kwargs)
        qk_norm = functools.partial(FullWidthRMSNorm, function, config, config.kv_channels, config.layernorm_epsilon)
        self.q_layernorm, self.k_layernorm = qk_norm(config.num_attention_heads), qk_norm(config.num_query_groups)


class _SumOverGroup(torch.autograd.Function):
    """All-reduce in both directions: every rank's loss depends on every rank's squares."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.clone()
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


@functools.cache
def _with_post_norm(row_linear: type, norm_function: RMSNormFunction) -> type:
    """The row-parallel linear layer followed by an RMSNorm of its (reduced) output: a post-norm family's."""

    class PostNormRowParallelLinear(row_linear):  # type: ignore[misc, valid-type]
        def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.post_norm = RMSNorm(config, output_size, config.layernorm_epsilon, function=norm_function)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            out, bias = super().forward(x)
            return self.post_norm(out), bias

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
        ) -> ShardedStateDict:
            state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            norm_key = f"{prefix}post_norm.weight"
            state.pop(norm_key, None)
            own = {"post_norm.weight": self.post_norm.weight}
            return state | sharded_tensors(own, {}, prefix, sharded_offsets, metadata)

    PostNormRowParallelLinear.__name__ = f"PostNorm{row_linear.__name__}"
    return PostNormRowParallelLinear
