"""Qwen 3 (arXiv 2505.09388), as transformers' Qwen3ForCausalLM computes it, and the Molmo2 sizes made of it."""

from __future__ import annotations

from molmo2_nemo.model.families.base import Family, TextConfig

FAMILY = Family(
    name="qwen3",
    title="Qwen3",
    architecture="Qwen3ForCausalLM",
    post_norm=False,
    qk_norm="head",
    molmo2_fields={"qk_norm_type": "qwen3", "norm_after": False},
    required={"use_sliding_window": False},
    sizes={
        "4b": TextConfig("qwen3", hidden_size=2560, ffn_size=9728, tie_embeddings=True, rotary_base=5_000_000.0),
        "8b": TextConfig("qwen3"),
        # Qwen3-0.6B
        "nano": TextConfig("qwen3", hidden_size=1024, ffn_size=3072, num_layers=28, num_heads=16, tie_embeddings=True),
    },
)
