"""Parameters by component, and which of them a rank holds. Norms and biases are counted: the sums are exact."""

from __future__ import annotations

import math
from dataclasses import dataclass

from molmo2_nemo.cost.flops import layer_weights
from molmo2_nemo.model.config import LoraConfig, Molmo2Config
from molmo2_nemo.model.families import family_of
from molmo2_nemo.settings.run import StageConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of a whole model."""

    layer: int  # one decoder layer
    layers: int
    final_norm: int
    embedding: int  # base rows
    extra: int  # rows of the special tokens
    head: int  # 0 where it is the embedding
    vision: int
    connector: int

    @property
    def total(self) -> int:
        return (
            self.layer * self.layers
            + self.final_norm
            + self.embedding
            + self.extra
            + self.head
            + self.vision
            + self.connector
        )


def parameters(model_config: Molmo2Config) -> Parameters:
    """Exact numbers for a model, without padding of the vocabulary."""
    text, vision, connector = model_config.text, model_config.vision, model_config.connector
    width, ffn = vision.hidden_size, vision.ffn_size
    block = 4 * (width * width + width) + 2 * width * ffn + ffn + width + 4 * width
    pooling = 3 * (vision.feature_size + 1) * connector.hidden_size + connector.hidden_size**2 + connector.hidden_size
    projector = connector.ffn_size * (2 * connector.hidden_size + text.hidden_size)
    return Parameters(
        layer=layer_weights(model_config) + family_of(text).layer_norm_parameters(text),
        layers=text.num_layers,
        final_norm=text.hidden_size,
        embedding=text.vocab_size * text.hidden_size,
        extra=model_config.extra_vocab_size * text.hidden_size,
        head=0 if text.tie_embeddings else text.vocab_size * text.hidden_size,
        vision=vision.num_built_layers * block + (vision.patch_dim + 1 + vision.num_patches) * width,
        connector=pooling + projector,
    )


@dataclass(frozen=True)
class Held:
    """Parameters of one rank of the heaviest pipeline stage."""

    all: float
    trained: float  # those of them with gradients and optimizer state


def held(model_config: Molmo2Config, stage: StageConfig, tensor: int, pipeline: int) -> Held:
    """Parameters of a rank of the heaviest pipeline stage: vision and embedding are on the first, the head on the
    last."""
    p = parameters(model_config)
    rows = math.ceil(model_config.text.vocab_size / tensor) * model_config.text.hidden_size
    adapters = (
        adapter_parameters(model_config, stage.lora) / pipeline / tensor
    )  # A or B of each is cut, the other small
    layers = p.layer * p.layers / pipeline / tensor
    trains = stage.trainable(model_config)
    decoder = layers * trains.llm + adapters * trains.adapters
    if trains.norms and not trains.llm:  # beside adapters; no rank's part of a norm is cut
        decoder += family_of(model_config.text).layer_norm_parameters(model_config.text) * p.layers / pipeline
    connector = p.connector + p.extra
    first = Held(
        layers + adapters + rows + p.vision + connector,
        decoder + rows * trains.base_embedding + p.vision * trains.vit + connector * trains.connector,
    )
    final = p.final_norm * trains.norms
    if pipeline == 1:
        own = 0.0 if model_config.text.tie_embeddings else rows
        return Held(first.all + own + p.final_norm, first.trained + own * trains.head + final)
    last = Held(layers + adapters + rows + p.final_norm, decoder + rows * trains.head + final)
    return max(first, last, key=lambda h: h.all)


def adapter_parameters(model_config: Molmo2Config, lora: LoraConfig) -> int:
    """Parameters of all LoRA adapters; 0 without."""
    text = model_config.text
    queries, keys = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    d, ffn = text.hidden_size, text.ffn_size
    ends = {
        "linear_qkv": d + queries + 2 * keys,
        "linear_proj": queries + d,
        "linear_fc1": d + 2 * ffn,
        "linear_fc2": ffn + d,
    }
    return lora.rank * sum(ends[name] for name in lora.targets) * text.num_layers
