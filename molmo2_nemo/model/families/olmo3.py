"""OLMo 3 (https://allenai.org/olmo), as transformers' Olmo3ForCausalLM computes it without its sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from molmo2_nemo.model.families.base import BaseNames, Family, LayerNames, TextConfig, YarnConfig


def full_attention_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers without a sliding window, the ones with YaRN; by default every fourth.

    Molmo2 attends to everything in every layer: of `layer_types` only the rotary scaling remains.
    """
    count = config["num_hidden_layers"]
    kinds = config.get("layer_types") or ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(count)]
    return tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")


FAMILY = Family(
    name="olmo3",
    title="OLMo 3",
    architecture="Olmo3ForCausalLM",
    post_norm=True,
    qk_norm="full",
    molmo2_fields={"qk_norm_type": "olmo", "norm_after": True},
    base_names=BaseNames(
        layer=LayerNames(attention_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm")
    ),
    yarn_layers=full_attention_layers,
    sizes={
        "o7b": TextConfig(
            "olmo3",
            num_layers=32,
            num_kv_heads=32,
            ffn_size=11008,
            vocab_size=100278,
            rotary_base=500_000.0,
            max_position=65536,  # 8 * 8,192
            yarn=YarnConfig(layers=tuple(range(3, 32, 4))),
        ),
    },
)
