"""`config.json` of a Molmo2 in Hugging Face format, native and remote-code, to and from `Molmo2Config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from molmo2_nemo.convert.hf_fields import Section, read_section
from molmo2_nemo.convert.hf_rotary import BASES, rotary_fields
from molmo2_nemo.convert.json_files import read_object
from molmo2_nemo.convert.names import Format
from molmo2_nemo.data.special_tokens import OFFSETS
from molmo2_nemo.errors import ConversionError
from molmo2_nemo.model.config import PRESETS, ConnectorConfig, Molmo2Config, VisionConfig, preset
from molmo2_nemo.model.families import FAMILIES, family_of
from molmo2_nemo.model.families.base import Family, TextConfig

# By size: where its code for the remote-code format is published.
OURS = ("*/checkpoints", "checkpoints", "weights/metadata.json")  # what a run, a stage, a checkpoint have
HUB_REPOSITORIES = {"4b": "allenai/Molmo2-4B", "8b": "allenai/Molmo2-8B", "o7b": "allenai/Molmo2-O-7B"}
HUB_REPOSITORIES["nano"] = HUB_REPOSITORIES["8b"]  # not published itself; the code builds any size of Qwen3

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


def read_model_config(folder: Path) -> tuple[Molmo2Config, Format]:
    """The model that `folder/config.json` describes, and the format it is written in.

    The name is that of the preset with the same sizes, else "custom". Whether the head is tied cannot be told from a
    config.json (the published 4B says untied and stores a copy): it is the preset's choice, and False for "custom".

    Raises:
        ConversionError: no config.json, another model family, or a variant of Molmo2 this package does not build.
    """
    path = folder / "config.json"
    expected = "the folder of a Molmo2 in Hugging Face format"
    if any(any(folder.glob(ours)) for ours in OURS):
        expected += f"; {folder} is a run or a checkpoint of this project, which molmo2 convert export makes one of"
    data = read_object(path, expected)
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
    adapter, text = read_section(data, "adapter", source), read_section(data, "text", source)
    vision = replace(
        vision_config(read_section(data, "vision", source)), feature_layers=tuple(adapter["vision_feature_layer"])
    )
    if not all(0 <= i < vision.num_layers for i in vision.feature_indices):
        raise ConversionError(
            f"{adapter.path('vision_feature_layer')} is {list(vision.feature_layers)}, expected layers of a vision "
            f"encoder of {vision.num_layers}"
        )
    model_config = Molmo2Config(
        name="custom",
        vision=vision,
        connector=connector_config(adapter, text),
        text=text_config(text, family_of_part(text), BASES[source]),
        extra_vocab_size=text["additional_vocab_size"],
    )
    for key, offset in (TOKEN_OFFSETS | REMOTE_TOKEN_OFFSETS).items():
        expected = model_config.text.vocab_size + offset
        if key in data and data[key] != expected:
            raise ConversionError(f"{key} is {data[key]!r:.60}, expected {expected} (base vocabulary + {offset})")
    return recognise(model_config), source


def vision_config(part: Section) -> VisionConfig:
    """The vision encoder."""
    heads, width = part["num_attention_heads"], part["hidden_size"]
    part.expect(hidden_act="gelu_pytorch_tanh", num_key_value_heads=heads, head_dim=head_size(part))
    part.expect(attention_bias=True, num_channels=3)
    config = VisionConfig(
        image_size=square_side(part, "image_size"),
        patch_size=part["patch_size"],
        hidden_size=width,
        num_heads=heads,
        ffn_size=part["intermediate_size"],
        num_layers=part["num_hidden_layers"],
        layernorm_eps=part["layer_norm_eps"],
        initializer_range=part["initializer_range"],
    )
    if config.num_patches == 0:
        raise ConversionError(
            f"{part.path('image_size')} is {config.image_size}, expected at least one patch of {config.patch_size}"
        )
    if part["num_position_embeddings"] is not None:
        part.expect(num_position_embeddings=config.num_patches)
    return config


def square_side(part: Section, name: str) -> int:
    """The side of a square that is given as one number or two.

    Raises:
        ConversionError: it is no square.
    """
    size = part[name]
    if isinstance(size, list) and size[0] != size[1]:
        raise ConversionError(f"{part.path(name)} is {size}, expected a square")
    return size[0] if isinstance(size, list) else size


def head_size(part: Section) -> int:
    """Width over heads.

    Raises:
        ConversionError: it is no whole number.
    """
    heads, width = part["num_attention_heads"], part["hidden_size"]
    if width % heads:
        raise ConversionError(f"{part.path('hidden_size')} is {width}, expected a multiple of {heads} attention heads")
    return width // heads


def connector_config(part: Section, text: Section) -> ConnectorConfig:
    """Pooling and projector."""
    heads = part["num_attention_heads"]
    part.expect(hidden_act="silu", num_key_value_heads=heads, head_dim=head_size(part))
    part.expect(attention_bias=True, mlp_bias=False, pooling_attention_mask=True)
    part.expect(text_hidden_size=text["hidden_size"])
    return ConnectorConfig(
        hidden_size=part["hidden_size"],
        num_heads=heads,
        ffn_size=part["intermediate_size"],
        initializer_range=part["initializer_range"],
    )


def family_of_part(part: Section) -> Family:
    """The family of a Molmo2's language model, from the norm settings of its `text_config`.

    Raises:
        ConversionError: no family has these settings.
    """
    for family in FAMILIES.values():
        if all(part.get(key) == value for key, value in family.molmo2_fields.items()):
            return family

    def listed(values: Mapping[str, Any]) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in values.items())

    fields = dict.fromkeys(key for family in FAMILIES.values() for key in family.molmo2_fields)
    known = " or ".join(f"{listed(family.molmo2_fields)} ({family.title})" for family in FAMILIES.values())
    raise ConversionError(f"{part.key} has {listed({key: part.get(key) for key in fields})}; expected {known}")


def text_config(part: Section, family: Family, default_base: float | None) -> TextConfig:
    """The language model of a `text_config`, or of a base model.

    Args:
        default_base: of the rotary embedding, where the file has none; None refuses such a file.
    """
    part.expect(attention_bias=False, hidden_act="silu")
    if part.get("use_qk_norm") is not None:
        part.expect(use_qk_norm=family.qk_norm != "none")
    heads, groups = part["num_attention_heads"], part["num_key_value_heads"]
    if heads % groups:
        raise ConversionError(
            f"{part.path('num_attention_heads')} is {heads}, expected a multiple of {groups} key heads"
        )
    if part["head_dim"] % 2:
        raise ConversionError(f"{part.path('head_dim')} is {part['head_dim']}, expected an even number")
    return TextConfig(
        family=family.name,
        hidden_size=part["hidden_size"],
        num_layers=part["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=part["head_dim"],
        ffn_size=part["intermediate_size"],
        vocab_size=part["vocab_size"],
        max_position=part["max_position_embeddings"],
        rmsnorm_eps=part["rms_norm_eps"],
        initializer_range=part["initializer_range"],
        **rotary_fields(part, default_base),
    )


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
            "rope_scaling_layers": list(scaled_layers(text) or range(text.num_layers)),
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
    # Without it the remote code takes "eager", whose pooling does not leave out a window's empty places.
    attention = {"attn_implementation": "sdpa"}
    return {
        "auto_map": {
            "AutoConfig": f"{hub}--configuration_molmo2.Molmo2Config",
            "AutoModelForImageTextToText": f"{hub}--modeling_molmo2.Molmo2ForConditionalGeneration",
        },
        "use_cache": True,
        "use_frame_special_tokens": False,
        "vit_config": shared_vision_json(model_config)
        | {
            **attention,
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
            **attention,
            "model_type": "molmo2",
            "vit_layers": list(vision.feature_layers),
            "pooling_attention_mask": True,
            "residual_dropout": 0.0,
            "image_feature_dropout": 0.0,
            "float32_attention": True,
        },
        "text_config": shared_text_json(model_config)
        | {
            **attention,
            "qkv_bias": False,
            "use_qk_norm": family_of(text).qk_norm != "none",
            "layer_norm_eps": text.rmsnorm_eps,
            "rope_theta": text.rotary_base,
            "rope_scaling": scaling_json(text),
            "rope_scaling_layers": scaled_layers(text),
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


def scaled_layers(text: TextConfig) -> list[int] | None:
    """The layers whose rotary is scaled; None where all are, or none."""
    layers = text.yarn.layers if text.yarn else text.rotary_scale_layers
    return None if layers is None else list(layers)


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
