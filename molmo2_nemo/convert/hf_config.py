"""`config.json` of a Molmo2 in Hugging Face format, native and remote-code, to and from `Molmo2Config`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from molmo2_nemo.convert.names import Format
from molmo2_nemo.data.special_tokens import OFFSETS
from molmo2_nemo.errors import ConversionError
from molmo2_nemo.model.config import PRESETS, ConnectorConfig, Molmo2Config, VisionConfig, preset
from molmo2_nemo.model.families import FAMILIES, family_of
from molmo2_nemo.model.families.base import Family, TextConfig, YarnConfig

# By size: where its code for the remote-code format is published.
HUB_REPOSITORIES = {"4b": "allenai/Molmo2-4B", "8b": "allenai/Molmo2-8B", "o7b": "allenai/Molmo2-O-7B"}

# Fields of config.json that name a visual special token, and its offset after the base vocabulary.
TOKEN_OFFSETS = {
    "image_start_token_id": OFFSETS.im_start,
    "image_end_token_id": OFFSETS.im_end,
    "image_patch_id": OFFSETS.im_patch,
    "low_res_image_start_token_id": OFFSETS.low_res_im_start,
    "frame_start_token_id": OFFSETS.frame_start,
    "frame_end_token_id": OFFSETS.frame_end,
}
REMOTE_TOKEN_OFFSETS = {
    "image_high_res_id": OFFSETS.im_patch,
    "image_col_id": OFFSETS.im_col,
    "image_low_res_id": OFFSETS.im_low,
}

# What transformers assumes where a native config.json leaves a field out.
VISION_DEFAULTS: dict[str, Any] = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 25}
VISION_DEFAULTS |= {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72, "patch_size": 14}
VISION_DEFAULTS |= {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "image_size": [378, 378]}
VISION_DEFAULTS |= {"attention_bias": True, "num_channels": 3, "num_position_embeddings": None}
VISION_DEFAULTS |= {"initializer_range": 0.02}
ADAPTER_DEFAULTS: dict[str, Any] = {"vision_feature_layer": [24, 18], "hidden_size": 1152, "num_attention_heads": 16}
ADAPTER_DEFAULTS |= {"num_key_value_heads": 16, "head_dim": 72, "intermediate_size": 18944, "text_hidden_size": 3584}
ADAPTER_DEFAULTS |= {"hidden_act": "silu", "attention_bias": True, "mlp_bias": False, "initializer_range": 0.02}
TEXT_DEFAULTS: dict[str, Any] = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
TEXT_DEFAULTS |= {"head_dim": 128, "vocab_size": 151936, "additional_vocab_size": 128, "attention_bias": False}
TEXT_DEFAULTS |= {"qk_norm_type": "qwen3", "num_hidden_layers": 36, "intermediate_size": 12288, "hidden_act": "silu"}
TEXT_DEFAULTS |= {"max_position_embeddings": 36864, "rms_norm_eps": 1e-6, "norm_after": False}
TEXT_DEFAULTS |= {"rope_scaling_layers": None, "initializer_range": 0.02}

# The remote code's names of the native fields.
REMOTE_NAMES = {
    "image_default_input_size": "image_size",
    "image_patch_size": "patch_size",
    "image_num_pos": "num_position_embeddings",
    "vit_layers": "vision_feature_layer",
    "qkv_bias": "attention_bias",
    "layer_norm_eps": "rms_norm_eps",
}


def read_model_config(folder: Path) -> tuple[Molmo2Config, Format]:
    """The model that `folder/config.json` describes, and the format it is written in.

    The name is that of the preset with the same sizes, else "custom". Whether the head is tied cannot be told from a
    config.json (the published 4B says untied and stores a copy): it is the preset's choice, and False for "custom".

    Raises:
        ConversionError: no config.json, another model family, or a variant of Molmo2 this package does not build.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConversionError(f"{path} does not exist; expected the folder of a Molmo2 in Hugging Face format")
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ConversionError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConversionError(f"{path} holds a {type(data).__name__}, expected an object")
    try:
        return parse_config(data)
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error


def parse_config(data: dict[str, Any]) -> tuple[Molmo2Config, Format]:
    """`read_model_config` of an already parsed config.json."""
    family = data.get("model_type")
    if family != "molmo2":
        raise ConversionError(
            f"model_type is {family!r}, expected 'molmo2'; models of other families are not converted"
        )
    source: Format = "remote" if "vit_config" in data else "native"
    vision = vision_config(section(data, "vit_config" if source == "remote" else "vision_config", VISION_DEFAULTS))
    adapter = section(data, "adapter_config", ADAPTER_DEFAULTS)
    text = section(data, "text_config", TEXT_DEFAULTS)
    vision = replace(vision, feature_layers=tuple(int(i) for i in adapter["vision_feature_layer"]))
    model_config = Molmo2Config(
        name="custom",
        vision=vision,
        connector=connector_config(adapter, text),
        text=text_config(text, family_of_part(text)),
        extra_vocab_size=int(text["additional_vocab_size"]),
    )
    if not all(0 <= i < vision.num_layers for i in vision.feature_indices):
        raise ConversionError(f"feature layers {vision.feature_layers} do not lie in {vision.num_layers} vision layers")
    for key, offset in (TOKEN_OFFSETS | REMOTE_TOKEN_OFFSETS).items():
        expected = model_config.text.vocab_size + offset
        if key in data and data[key] != expected:
            raise ConversionError(f"{key} is {data[key]}, expected {expected} (base vocabulary + {offset})")
    return recognise(model_config), source


def section(data: dict[str, Any], key: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """One section of config.json under native field names, with transformers' defaults filled in."""
    part = data.get(key)
    if part is None:
        part = {}
    if not isinstance(part, dict):
        raise ConversionError(f"{key} is a {type(part).__name__}, expected an object")
    renames = {old: new for old, new in REMOTE_NAMES.items() if new in defaults and old not in defaults}
    return {**defaults, **{renames.get(name, name): value for name, value in part.items()}}


def expect(where: str, part: dict[str, Any], **wanted: Any) -> None:
    """Refuse a variant that would silently compute something else."""
    for key, value in wanted.items():
        if part.get(key, value) != value:
            raise ConversionError(f"{where}.{key} is {part[key]!r}, expected {value!r}: not a Molmo2 that is supported")


def vision_config(part: dict[str, Any]) -> VisionConfig:
    """The vision encoder."""
    heads, width, size = part["num_attention_heads"], part["hidden_size"], part["image_size"]
    size = size if isinstance(size, list) else [size, size]
    expect("vision", part, hidden_act="gelu_pytorch_tanh", num_key_value_heads=heads, head_dim=width // heads)
    expect("vision", part, attention_bias=True, num_channels=3, image_size=[size[0], size[0]])
    config = VisionConfig(
        image_size=size[0],
        patch_size=part["patch_size"],
        hidden_size=width,
        num_heads=heads,
        ffn_size=part["intermediate_size"],
        num_layers=part["num_hidden_layers"],
        layernorm_eps=part["layer_norm_eps"],
        initializer_range=part["initializer_range"],
    )
    if part["num_position_embeddings"] is not None:
        expect("vision", part, num_position_embeddings=config.num_patches)
    return config


def connector_config(part: dict[str, Any], text: dict[str, Any]) -> ConnectorConfig:
    """Pooling and projector."""
    heads, width = part["num_attention_heads"], part["hidden_size"]
    expect("adapter_config", part, hidden_act="silu", num_key_value_heads=heads, head_dim=width // heads)
    expect("adapter_config", part, attention_bias=True, mlp_bias=False, pooling_attention_mask=True)
    expect("adapter_config", part, text_hidden_size=text["hidden_size"])
    return ConnectorConfig(
        hidden_size=width,
        num_heads=heads,
        ffn_size=part["intermediate_size"],
        initializer_range=part["initializer_range"],
    )


def family_of_part(part: dict[str, Any]) -> Family:
    """The family of a Molmo2's language model, from the norm settings of its `text_config`.

    Raises:
        ConversionError: no family has these settings.
    """
    said = part | {"norm_after": bool(part["norm_after"])}
    for family in FAMILIES.values():
        if all(said.get(key) == value for key, value in family.molmo2_fields.items()):
            return family

    def listed(values: Mapping[str, Any]) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in values.items())

    fields = dict.fromkeys(key for family in FAMILIES.values() for key in family.molmo2_fields)
    known = " or ".join(f"{listed(family.molmo2_fields)} ({family.title})" for family in FAMILIES.values())
    raise ConversionError(f"text_config has {listed({key: part.get(key) for key in fields})}; expected {known}")


def text_config(part: dict[str, Any], family: Family) -> TextConfig:
    """The language model of a `text_config`."""
    expect("text_config", part, attention_bias=False, hidden_act="silu", use_qk_norm=family.qk_norm != "none")
    base, scale, yarn = rotary(part)
    return TextConfig(
        family=family.name,
        hidden_size=part["hidden_size"],
        num_layers=part["num_hidden_layers"],
        num_heads=part["num_attention_heads"],
        num_kv_heads=part["num_key_value_heads"],
        head_dim=part["head_dim"],
        ffn_size=part["intermediate_size"],
        vocab_size=part["vocab_size"],
        rotary_base=base,
        rotary_scale=scale,
        yarn=yarn,
        max_position=part["max_position_embeddings"],
        rmsnorm_eps=part["rms_norm_eps"],
        initializer_range=part["initializer_range"],
    )


def rotary(part: dict[str, Any]) -> tuple[float, float, YarnConfig | None]:
    """Rotary base, linear scale and YaRN settings, from `rope_parameters` (native) or `rope_theta` + `rope_scaling`
    (remote code)."""
    rope = dict(part.get("rope_parameters") or part.get("rope_scaling") or {})
    base = rope.get("rope_theta", part.get("rope_theta"))
    if base is None:
        raise ConversionError("text_config has no rope_theta (nor rope_parameters.rope_theta)")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(base), 1.0, None
    if kind == "linear":
        if "factor" not in rope:
            raise ConversionError("text_config's linear rotary scaling lacks factor")
        layers = part["rope_scaling_layers"]
        if layers is not None and len(layers) != part["num_hidden_layers"]:
            raise ConversionError(f"text_config scales rotary linearly on layers {layers} only; expected all layers")
        return float(base), float(rope["factor"]), None
    if kind != "yarn":
        raise ConversionError(f"text_config has rope_type {kind!r}, expected 'default', 'linear' or 'yarn'")
    missing = {"factor", "original_max_position_embeddings"} - rope.keys()
    if missing:
        raise ConversionError(f"text_config's YaRN settings lack {', '.join(sorted(missing))}")
    expect("rope_parameters", rope, truncate=True)
    layers = part["rope_scaling_layers"]
    factor = float(rope["factor"])
    yarn = YarnConfig(
        layers=tuple(range(part["num_hidden_layers"]) if layers is None else layers),
        factor=factor,
        attention_factor=float(rope.get("attention_factor") or 0.1 * math.log(factor) + 1),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        original_max_position=int(rope["original_max_position_embeddings"]),
    )
    return float(base), 1.0, yarn


def recognise(model_config: Molmo2Config) -> Molmo2Config:
    """`model_config`, or the preset of the same sizes with `model_config`'s longest position."""
    for name in PRESETS:
        known = preset(name)
        text = replace(
            known.text, max_position=model_config.text.max_position, tie_embeddings=model_config.text.tie_embeddings
        )
        if sizes(replace(known, name=model_config.name, text=text)) == sizes(model_config):
            return replace(known, text=replace(known.text, max_position=model_config.text.max_position))
    return model_config


def sizes(model_config: Molmo2Config) -> Molmo2Config:
    """`model_config` in a normal form, in which models with the same parameters and the same function compare equal:
    feature layers counted from the bottom, no blocks above them, and default initialisation."""
    vision = model_config.vision
    return replace(
        model_config,
        vision=replace(
            vision, num_layers=vision.num_built_layers, feature_layers=vision.feature_indices, initializer_range=0.0
        ),
        connector=replace(model_config.connector, initializer_range=0.0),
        text=replace(model_config.text, initializer_range=0.0),
    )


def config_json(model_config: Molmo2Config, target: Format, dtype: str) -> dict[str, Any]:
    """The content of config.json. `dtype` as torch names it without the prefix, e.g. "bfloat16"."""
    part = native_json(model_config) if target == "native" else remote_json(model_config)
    ids = TOKEN_OFFSETS if target == "native" else TOKEN_OFFSETS | REMOTE_TOKEN_OFFSETS
    return {
        "architectures": ["Molmo2ForConditionalGeneration"],
        "model_type": "molmo2",
        "dtype": dtype,
        "initializer_range": model_config.text.initializer_range,
        # Both formats store the head as a tensor of its own, a copy where it is tied.
        "tie_word_embeddings": False,
        **{key: model_config.text.vocab_size + offset for key, offset in ids.items()},
        **part,
    }


def native_json(model_config: Molmo2Config) -> dict[str, Any]:
    """The parts of a native config.json."""
    vision, text = model_config.vision, model_config.text
    rope = (scaling_json(text) or {"rope_type": "default"}) | {"rope_theta": text.rotary_base}
    layers = text.yarn.layers if text.yarn else range(text.num_layers)
    return {
        "vision_config": shared_vision_json(model_config)
        | {
            "model_type": "molmo2_vision",
            "num_hidden_layers": vision.num_built_layers,
            "image_size": [vision.image_size] * 2,
            "patch_size": vision.patch_size,
            "num_position_embeddings": vision.num_patches,
            "num_channels": 3,
            "attention_bias": True,
        },
        "adapter_config": shared_adapter_json(model_config)
        | {
            "model_type": "molmo2_adapter",
            "vision_feature_layer": list(vision.feature_indices),
            "attention_bias": True,
            "mlp_bias": False,
        },
        "text_config": shared_text_json(model_config)
        | {
            "attention_bias": False,
            "rms_norm_eps": text.rmsnorm_eps,
            "rope_parameters": rope,
            "rope_scaling_layers": list(layers),
            "tie_word_embeddings": False,
        },
    }


def code_repository(model_config: Molmo2Config) -> str:
    """The published repository whose code a remote-code export names: that of its size. The code builds a model of any
    size from config.json, so models of no published size name the 8B's.

    Raises:
        ConversionError: a family's size that has no entry in HUB_REPOSITORIES.
    """
    name = model_config.name
    if name not in HUB_REPOSITORIES and any(name in family.sizes for family in FAMILIES.values()):
        raise ConversionError(f"model {name}: no repository with its code is known (convert/hf_config.py)")
    return HUB_REPOSITORIES.get(name, HUB_REPOSITORIES["8b"])


def remote_json(model_config: Molmo2Config) -> dict[str, Any]:
    """The parts of a remote-code config.json; the code itself stays in the published repository."""
    vision, text = model_config.vision, model_config.text
    hub = code_repository(model_config)
    return {
        "auto_map": {
            "AutoConfig": f"{hub}--configuration_molmo2.Molmo2Config",
            "AutoModelForImageTextToText": f"{hub}--modeling_molmo2.Molmo2ForConditionalGeneration",
        },
        "use_cache": True,
        "use_frame_special_tokens": False,
        "vit_config": shared_vision_json(model_config)
        | {
            "model_type": "molmo2",
            "num_hidden_layers": vision.num_layers,
            "image_default_input_size": [vision.image_size] * 2,
            "image_patch_size": vision.patch_size,
            "image_num_pos": vision.num_patches,
            "residual_dropout": 0.0,
            "float32_attention": True,
        },
        "adapter_config": shared_adapter_json(model_config)
        | {
            "model_type": "molmo2",
            "vit_layers": list(vision.feature_layers),
            "pooling_attention_mask": True,
            "residual_dropout": 0.0,
            "image_feature_dropout": 0.0,
            "float32_attention": True,
        },
        "text_config": shared_text_json(model_config)
        | {
            "qkv_bias": False,
            "use_qk_norm": family_of(text).qk_norm != "none",
            "layer_norm_eps": text.rmsnorm_eps,
            "rope_theta": text.rotary_base,
            "rope_scaling": scaling_json(text),
            "rope_scaling_layers": list(text.yarn.layers) if text.yarn else None,
            "embedding_dropout": 0.0,
            "residual_dropout": 0.0,
        },
    }


def shared_vision_json(model_config: Molmo2Config) -> dict[str, Any]:
    """Vision fields with the same name in both formats."""
    vision = model_config.vision
    return {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_size,
        "num_attention_heads": vision.num_heads,
        "num_key_value_heads": vision.num_heads,
        "head_dim": vision.head_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": vision.layernorm_eps,
        "attention_dropout": 0.0,
        "initializer_range": vision.initializer_range,
    }


def shared_adapter_json(model_config: Molmo2Config) -> dict[str, Any]:
    """Connector fields with the same name in both formats."""
    connector = model_config.connector
    return {
        "hidden_size": connector.hidden_size,
        "intermediate_size": connector.ffn_size,
        "text_hidden_size": model_config.text.hidden_size,
        "num_attention_heads": connector.num_heads,
        "num_key_value_heads": connector.num_heads,
        "head_dim": connector.head_dim,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": connector.initializer_range,
    }


def shared_text_json(model_config: Molmo2Config) -> dict[str, Any]:
    """Language-model fields with the same name in both formats."""
    text = model_config.text
    return {
        "model_type": "molmo2_text",
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "intermediate_size": text.ffn_size,
        "vocab_size": text.vocab_size,
        "additional_vocab_size": model_config.extra_vocab_size,
        "hidden_act": "silu",
        **family_of(text).molmo2_fields,
        "max_position_embeddings": text.max_position,
        "attention_dropout": 0.0,
        "initializer_range": text.initializer_range,
        "use_cache": True,
    }


def scaling_json(text: TextConfig) -> dict[str, Any] | None:
    """Rotary scaling under the names both formats use; None where there is none."""
    if text.yarn is None:
        return None if text.rotary_scale == 1 else {"rope_type": "linear", "factor": text.rotary_scale}
    yarn = text.yarn
    return {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "attention_factor": yarn.attention_factor,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "original_max_position_embeddings": yarn.original_max_position,
    }
