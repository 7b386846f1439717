"""The base models a Molmo2 is made from, in Hugging Face format: a language model and the vision tower of a SigLIP.

Families of language models are described in model/families. Facts of vision models (model_type, config fields, weight
names) are those of SiglipModel / SiglipVisionModel and their Siglip2 siblings. `google/siglip2-so400m-patch14-384` is
a SiglipModel: its patch embedding is a convolution, its position table has 27 x 27 rows (384 // 14 = 27).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from molmo2_nemo.convert.hf_config import head_size, square_side, text_config
from molmo2_nemo.convert.hf_fields import (
    COUNT,
    FLAG,
    LAYERS,
    SCALE,
    SIDES,
    TEXT,
    WORD,
    Field,
    Section,
    checked,
    require,
)
from molmo2_nemo.convert.hf_rotary import flattened
from molmo2_nemo.convert.json_files import read_object
from molmo2_nemo.convert.names import Rule, layer_rules, vision_rules
from molmo2_nemo.errors import ConversionError
from molmo2_nemo.model.config import PRESETS, ConnectorConfig, Molmo2Config, VisionConfig, preset
from molmo2_nemo.model.families import FAMILIES, family_of
from molmo2_nemo.model.families.base import Family, TextConfig

LLM_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
)
LAYER_TYPES = ("sliding_attention", "full_attention")
VIT_FAMILIES = ("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model")
# What transformers assumes where a SigLIP config leaves a field out.
VIT_FIELDS: dict[str, Field] = {
    "hidden_size": Field(768, COUNT),
    "intermediate_size": Field(3072, COUNT),
    "num_hidden_layers": Field(12, LAYERS),
    "num_attention_heads": Field(12, COUNT),
    "num_channels": Field(3, COUNT),
    "image_size": Field(224, SIDES),
    "patch_size": Field(16, SIDES),
    "num_patches": Field(256, COUNT),
    "hidden_act": Field("gelu_pytorch_tanh", WORD),
    "layer_norm_eps": Field(1e-6, SCALE),
}

# Not properties of the weights: chosen by the run, or fixed by Molmo2.
FREE_TEXT_FIELDS = ("max_position", "initializer_range")
FREE_VISION_FIELDS = ("feature_layers", "initializer_range", "float32_attention")


def read_llm(folder: Path) -> TextConfig:
    """The language model of `folder/config.json`.

    Raises:
        ConversionError: no config.json, another family, or a variant of it that Molmo2 cannot be made from.
    """
    path = folder / "config.json"
    data = read_object(path, "the folder of a language model in Hugging Face format")
    family = FAMILIES.get(str(data.get("model_type")))
    if family is None:
        made_from = " or ".join(known.architecture for known in FAMILIES.values())
        raise ConversionError(
            f"{path}: model_type is {data.get('model_type')!r}, expected one of {', '.join(FAMILIES)}: Molmo2 is made "
            f"from {made_from}"
        )
    missing = [name for name in LLM_FIELDS if data.get(name) is None]
    if missing:
        raise ConversionError(f"{path} lacks {', '.join(missing)}")
    try:
        part = llm_section(data, family)
        part.expect(**family.required)
        config = text_config(part, family, default_base=None)
        tied = data.get("tie_word_embeddings") or False
        require("tie_word_embeddings", tied, FLAG)
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error
    return replace(config, tie_embeddings=tied)


def llm_section(data: dict[str, Any], family: Family) -> Section:
    """The config.json of a base model as the text part of a Molmo2's.

    Raises:
        ConversionError: a field is of the wrong type.
    """
    sizes = {name: data[name] for name in LLM_FIELDS}
    checked(sizes, TEXT, "", "native")  # before anything is computed from them
    check_layer_types(data)
    data, layers = flattened(data)
    heads = sizes["num_attention_heads"]
    derived = {
        "num_key_value_heads": data.get("num_key_value_heads") or heads,
        "head_dim": data.get("head_dim") or sizes["hidden_size"] // heads,
        "rope_scaling_layers": list(family.yarn_layers(data) if layers is None else layers),
    }
    return checked(data | derived, TEXT, "", "native")


def check_layer_types(data: dict[str, Any]) -> None:
    """Raises:
    ConversionError: `layer_types` is there and does not say for each layer which of the known kinds it is."""
    kinds, count = data.get("layer_types"), data["num_hidden_layers"]
    if kinds is None:
        return
    known = " or ".join(map(repr, LAYER_TYPES))
    if not isinstance(kinds, list):
        raise ConversionError(f"layer_types is {kinds!r:.60}, expected a list of {known}")
    if len(kinds) != count:
        raise ConversionError(f"layer_types has {len(kinds)} entries, expected one for each of the {count} layers")
    for i, kind in enumerate(kinds):
        if kind not in LAYER_TYPES:
            raise ConversionError(f"layer_types[{i}] is {kind!r:.60}, expected {known}")


def read_vit(folder: Path) -> VisionConfig:
    """The vision tower of `folder/config.json`, which describes a whole SigLIP model or only its vision tower.

    Raises:
        ConversionError: no config.json, another family, or a variant of it that Molmo2 cannot be made from.
    """
    path = folder / "config.json"
    data = read_object(path, "the folder of a vision model in Hugging Face format")
    family = data.get("model_type")
    if family not in VIT_FAMILIES:
        raise ConversionError(
            f"{path}: model_type is {family!r}, expected one of {', '.join(VIT_FAMILIES)}: Molmo2 is made from the "
            "vision tower of a SigLIP 2, google/siglip2-so400m-patch14-384"
        )
    whole = data.get("vision_config")
    if whole is not None and not isinstance(whole, dict):
        raise ConversionError(f"{path}: vision_config is a {type(whole).__name__}, expected an object")
    try:
        part = checked(whole or data, VIT_FIELDS, "vision_config" if whole else "", "native")
        part.expect(hidden_act="gelu_pytorch_tanh", num_channels=3)
        head_size(part)
        patch, grid = patches(part, variable=str(family).startswith("siglip2"))
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error
    return VisionConfig(
        image_size=grid * patch,
        patch_size=patch,
        hidden_size=part["hidden_size"],
        num_heads=part["num_attention_heads"],
        ffn_size=part["intermediate_size"],
        num_layers=part["num_hidden_layers"],
        layernorm_eps=part["layer_norm_eps"],
    )


def patches(part: Section, variable: bool) -> tuple[int, int]:
    """The side of a patch in pixels, and the patches along a side of the position table.

    Args:
        variable: a tower for variable resolution, which gives the number of patches; the others give an image side, cut
            to whole patches.

    Raises:
        ConversionError: neither squares nor a square number.
    """
    patch = square_side(part, "patch_size")
    grid = math.isqrt(part["num_patches"]) if variable else square_side(part, "image_size") // patch
    if variable and grid**2 != part["num_patches"]:
        raise ConversionError(f"{part.path('num_patches')} is {part['num_patches']}, expected a square number")
    if grid == 0:
        raise ConversionError(
            f"{part.path('image_size')} is {part['image_size']}, expected at least one patch of {patch}"
        )
    return patch, grid


def combine(text: TextConfig, vision: VisionConfig, name: str | None) -> Molmo2Config:
    """The configuration of a Molmo2 made from two base models: the preset `name`, or the one that fits.

    Args:
        name: None takes the preset of these sizes; where there is none, a custom model of Molmo2's proportions: feature
            layers -3 and -9, a connector of the vision tower's width and heads and the language model's MLP width.

    Raises:
        ConversionError: the base models are not those of the preset `name`; lists what differs.
    """
    if name is not None:
        if name not in PRESETS:
            raise ConversionError(f"unknown model {name!r}; known models: {', '.join(PRESETS)}")
        wrong = differences(text, vision, preset(name))
        if wrong:
            raise ConversionError(f"these are not the base models of {name!r}: {'; '.join(wrong)}")
        return preset(name)
    for known in PRESETS:
        if not differences(text, vision, preset(known)):
            return preset(known)
    custom = Molmo2Config(
        name="custom",
        vision=vision,
        connector=ConnectorConfig(vision.hidden_size, vision.num_heads, text.ffn_size),
        text=text,
    )
    if min(vision.feature_indices) < 0:
        raise ConversionError(
            f"the vision model has {vision.num_layers} blocks, expected at least {-min(vision.feature_layers)}: the "
            "features are the outputs of the third and the ninth from its end"
        )
    return custom


def differences(text: TextConfig, vision: VisionConfig, wanted: Molmo2Config) -> list[str]:
    """The differences, in words, between two base models and those of `wanted`."""
    found = []
    pairs = (
        ("language model", text, wanted.text, FREE_TEXT_FIELDS),
        ("vision model", vision, wanted.vision, FREE_VISION_FIELDS),
    )
    for what, ours, theirs, free in pairs:
        for field in fields(ours):  # type: ignore[arg-type]
            have, want = getattr(ours, field.name), getattr(theirs, field.name)
            if field.name not in free and have != want:
                found.append(f"the {what} has {field.name} {have}, expected {want}")
    return found


def llm_rules(text: TextConfig) -> Iterator[Rule]:
    """Rules between the canonical names and those of the family's base models."""
    names = family_of(text).base_names
    table = Rule("embedding", ("embedding.base.weight",), (names.embedding,))
    yield replace(table, head=names.head) if text.tie_embeddings else table
    if not text.tie_embeddings:
        yield Rule("copy", ("output_layer.weight",), (names.head,))
    for i in range(text.num_layers):
        yield from layer_rules(text, i, names.layer)
    yield Rule("copy", ("decoder.final_layernorm.weight",), (names.final_norm,))


def vit_rules(model_config: Molmo2Config, prefix: str) -> Iterator[Rule]:
    """Rules between the canonical names and those of a SigLIP vision tower, whose names begin with `prefix`."""
    for rule in vision_rules(model_config, "native"):
        if rule.canonical[0].startswith("vision."):
            yield replace(rule, external=tuple(vit_name(name, prefix) for name in rule.external))


def vit_name(native: str, prefix: str) -> str:
    """SigLIP's name of the tensor that Molmo2's native format calls `native`."""
    name = native.removeprefix("model.vision_tower.")
    name = name.replace("positional_embedding", "position_embedding.weight")
    stem = "encoder." if name.startswith("layers.") else "embeddings."
    return prefix + stem + name.replace("o_proj", "out_proj")


def vit_prefix(names: list[str]) -> str:
    """The prefix of the vision tower's tensor names: normally "vision_model.", empty for a bare tower.

    Raises:
        ConversionError: there is no vision tower among the tensors.
    """
    mark = "embeddings.patch_embedding.weight"
    found = [name.removesuffix(mark) for name in names if name.endswith(mark)]
    if len(found) != 1 or not (found[0] == "" or found[0].endswith("vision_model.")):
        raise ConversionError(f"no vision tower of a SigLIP: expected one tensor vision_model.{mark}")
    return found[0]


def dropped_vit_tensors(names: list[str], model_config: Molmo2Config, prefix: str) -> list[str]:
    """Tensors of a SigLIP that Molmo2 does without: blocks above the deepest feature layer, the final norm, the pooling
    head, and, in a whole model, the text tower and the scale and bias of the contrastive loss."""
    whole = replace(
        model_config, vision=replace(model_config.vision, feature_layers=(model_config.vision.num_layers - 1,))
    )
    kept = {name for rule in vit_rules(model_config, prefix) for name in rule.external}
    upper = {name for rule in vit_rules(whole, prefix) for name in rule.external} - kept
    upper |= {f"{prefix}post_layernorm.weight", f"{prefix}post_layernorm.bias", f"{prefix}embeddings.position_ids"}
    other = (f"{prefix}head.", f"{prefix.removesuffix('vision_model.')}text_model.")
    scales = {f"{prefix.removesuffix('vision_model.')}{name}" for name in ("logit_scale", "logit_bias")}
    return [name for name in names if name in upper | scales or name.startswith(other)]
