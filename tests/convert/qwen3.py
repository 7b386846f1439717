"""transformers' own Qwen 3 in the sizes of the tiny preset."""

from __future__ import annotations

from typing import Any

from molmo2_nemo.model.config import preset


def tiny_qwen3_config() -> Any:
    """A transformers.Qwen3Config, whose head is the embedding."""
    import transformers

    text = preset("tiny").text
    return transformers.Qwen3Config(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.ffn_size,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
        num_key_value_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        rope_theta=text.rotary_base,
        tie_word_embeddings=True,
    )
