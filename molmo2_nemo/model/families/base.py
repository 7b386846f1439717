"""Sizes of a language model, and what a family of language models is: facts alone, which other modules act on.

No torch here: the planner, the command line and the converters read families before any model exists.

Legend: d width, N query heads, G key/value heads, H head size, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class YarnConfig:
    """YaRN rotary scaling on `layers`, plain rotary on all others. The defaults are those of the published Molmo2-O."""

    layers: tuple[int, ...]
    factor: float = 8.0
    attention_factor: float = 1.2079441541679836
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class TextConfig:
    """The language model: its family and its sizes."""

    family: str = "qwen3"  # a key of families.FAMILIES
    hidden_size: int = 4096
    num_layers: int = 36
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    ffn_size: int = 12288
    vocab_size: int = 151936  # base rows; logits have exactly this many columns
    tie_embeddings: bool = False
    rotary_base: float = 1_000_000.0
    rotary_scale: float = 1.0  # plain rotary turns by position / rotary_scale (position interpolation)
    rotary_scale_layers: tuple[int, ...] | None = None  # only these are interpolated; None: all
    yarn: YarnConfig | None = None
    max_position: int = 36864  # as the published Molmo2 states it: its longest packs, see docs/memory.md
    rmsnorm_eps: float = 1e-6
    initializer_range: float = 0.02


@dataclass(frozen=True)
class LayerNames:
    """What a safetensors format calls the weights of decoder layer `i`, each without `.weight`."""

    prefix: str = "model.layers.{i}"  # stands before all others; {i} is the layer
    attention_norm: str = "input_layernorm"  # of the attention branch, before or behind it
    mlp_norm: str = "post_attention_layernorm"  # of the MLP branch, before or behind it
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # or one: rows q, k, v
    q_norm: str = "self_attn.q_norm"  # q_norm and k_norm: where the family has QK-norm
    k_norm: str = "self_attn.k_norm"
    proj: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")  # or one: rows up, gate
    down: str = "mlp.down_proj"

    def of_layer(self, i: int, name: str) -> str:
        """The full name of one weight of layer `i`."""
        return f"{self.prefix.format(i=i)}.{name}.weight"


@dataclass(frozen=True)
class BaseNames:
    """What the safetensors of a family's base models call their weights. Defaults: most families of transformers."""

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layer: LayerNames = field(default_factory=LayerNames)


def all_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Every layer of a base model's config.json."""
    return tuple(range(config["num_hidden_layers"]))


@dataclass(frozen=True)
class Family:
    """Language models that differ in nothing but their sizes.

    All have RMSNorm, grouped-query attention, rotary embedding, SwiGLU and no biases.
    """

    name: str  # in TextConfig.family; `model_type` of a base model's config.json
    title: str  # for people
    architecture: str  # transformers' class of base models
    post_norm: bool  # x + norm(branch(x)) if true, else x + branch(norm(x))
    qk_norm: Literal["none", "head", "full"]  # RMSNorm of queries and keys: no, each head, the whole projection
    molmo2_fields: Mapping[str, Any]  # how `text_config` of a Molmo2's config.json says that it is this family
    sizes: Mapping[str, TextConfig] = field(default_factory=dict)  # name of a preset -> its language model
    base_names: BaseNames = field(default_factory=BaseNames)
    required: Mapping[str, Any] = field(default_factory=dict)  # values that a base model's config.json must have
    yarn_layers: Callable[[Mapping[str, Any]], tuple[int, ...]] = all_layers  # of config.json: where its YaRN applies

    def qk_norm_widths(self, text: TextConfig) -> tuple[int, int]:
        """Parameters of one layer's query norm and key norm, zeros without."""
        if self.qk_norm == "none":
            return 0, 0
        heads = (1, 1) if self.qk_norm == "head" else (text.num_heads, text.num_kv_heads)
        return heads[0] * text.head_dim, heads[1] * text.head_dim

    def layer_norm_parameters(self, text: TextConfig) -> int:
        """Parameters of all norms of one layer."""
        return 2 * text.hidden_size + sum(self.qk_norm_widths(text))
