"""Rotary settings of a config.json, read as transformers 5 reads them (its modeling_rope_utils), or refused.

Two places may hold them: `rope_parameters` with the base inside (transformers 5), and `rope_scaling` beside a
`rope_theta` (transformers 4, the remote code). Where a file has both, `rope_scaling` counts, unless it is empty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from molmo2_nemo.convert.hf_fields import COUNT, POSITIVE, SCALE, WORD, Section, is_number, require
from molmo2_nemo.errors import ConversionError
from molmo2_nemo.model.families.base import YarnConfig

BASES = {"native": 10_000.0, "remote": 1_000_000.0}  # by format: the base where a Molmo2's config.json has none


def rotary_fields(text: Section, default_base: float | None) -> dict[str, Any]:
    """The fields of a `TextConfig` that say how positions turn queries and keys.

    Args:
        text: with `num_hidden_layers`, `max_position_embeddings` and `rope_scaling_layers`.
        default_base: where the file has none; None refuses such a file.

    Raises:
        ConversionError: a kind of scaling that this package does not have, or values that make no sense.
    """
    where, rope = settings(text)
    base = rotary_base(text, where, rope, default_base)
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(f"{where}.rope_type", kind, WORD)
    if kind not in ("default", "linear", "yarn"):
        raise ConversionError(f"{where}.rope_type is {kind!r}, expected 'default', 'linear' or 'yarn'")
    layers = scaled_layers(text)
    if kind == "default" or not layers:
        return {"rotary_base": base}
    part = rope.get("partial_rotary_factor", text.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise ConversionError(f"{where}.partial_rotary_factor is {part!r}, expected 1: not a Molmo2 that is supported")
    if kind == "yarn":
        return {"rotary_base": base, "yarn": yarn(where, rope, base, layers, text["max_position_embeddings"])}
    if "factor" not in rope:
        raise ConversionError(f"{where} lacks factor")
    require(f"{where}.factor", rope["factor"], POSITIVE)
    some = layers if len(layers) < text["num_hidden_layers"] else None
    return {"rotary_base": base, "rotary_scale": float(rope["factor"]), "rotary_scale_layers": some}


def settings(text: Section) -> tuple[str, Mapping[str, Any]]:
    """The object with the rotary settings that count, and its name for messages."""
    for name in ("rope_scaling", "rope_parameters"):
        found = text.get(name)
        if found is not None and not isinstance(found, dict):
            raise ConversionError(f"{text.path(name)} is a {type(found).__name__}, expected an object")
        if found or name == "rope_parameters":
            return text.path(name), found or {}
    raise AssertionError


def rotary_base(text: Section, where: str, rope: Mapping[str, Any], default: float | None) -> float:
    """The base of the angles' geometric series."""
    if "rope_theta" in rope:
        name, base = f"{where}.rope_theta", rope["rope_theta"]
    else:
        name, base = text.path("rope_theta"), text.get("rope_theta", default)
        if base is None and "rope_theta" not in text.values:
            raise ConversionError(f"neither {name} nor {where}.rope_theta is there; expected a number above 0")
    require(name, base, POSITIVE)
    return float(base)


def scaled_layers(text: Section) -> tuple[int, ...]:
    """The layers whose rotary is scaled: all where `rope_scaling_layers` is null; numbers of no layer mean nothing."""
    named = text.get("rope_scaling_layers")
    return tuple(i for i in range(text["num_hidden_layers"]) if named is None or i in named)


def yarn(where: str, rope: Mapping[str, Any], base: float, layers: tuple[int, ...], max_position: int) -> YarnConfig:
    """YaRN's settings; what is null or left out is computed as transformers does."""
    if "factor" not in rope:
        raise ConversionError(f"{where} lacks factor")
    if rope.get("truncate", True) is not True:
        raise ConversionError(
            f"{where}.truncate is {rope['truncate']!r}, expected True: not a Molmo2 that is supported"
        )
    original = rope.get("original_max_position_embeddings", max_position)
    require(f"{where}.original_max_position_embeddings", original, COUNT)
    factor = max_position / original if rope["factor"] is None else rope["factor"]
    require(f"{where}.factor", factor, POSITIVE)
    turns = {"beta_fast": 32.0, "beta_slow": 1.0}
    for name, default in turns.items():
        require(f"{where}.{name}", rope.get(name) or default, POSITIVE)
        turns[name] = float(rope.get(name) or default)
    if base <= 1:
        raise ConversionError(f"the rotary base is {base:g}, expected above 1: YaRN divides by its logarithm")
    return YarnConfig(
        layers=layers,
        factor=float(factor),
        attention_factor=attention_factor(where, rope, float(factor)),
        original_max_position=original,
        **turns,
    )


def attention_factor(where: str, rope: Mapping[str, Any], factor: float) -> float:
    """What multiplies cos and sin: as given, else from `mscale` and `mscale_all_dim` where both are, else from the
    factor alone (arXiv 2309.00071, section 3.4)."""
    given = rope.get("attention_factor")
    if given is not None:
        require(f"{where}.attention_factor", given, SCALE)
        return float(given)

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    pair = [rope.get(name) for name in ("mscale", "mscale_all_dim")]
    if not all(pair):
        return scale(1.0)
    for name, value in zip(("mscale", "mscale_all_dim"), pair, strict=True):
        if not is_number(value):
            raise ConversionError(f"{where}.{name} is {value!r}, expected a number")
    numerator, denominator = (scale(float(value)) for value in pair if value is not None)
    if denominator == 0:
        raise ConversionError(f"{where}.mscale_all_dim is {pair[1]!r}: the attention factor would be divided by 0")
    return numerator / denominator


def flattened(data: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[int, ...] | None]:
    """A base model's config.json with one object of rotary settings, and the layers that they are for.

    transformers 5 writes the settings of OLMo 3 once per kind of layer, under the names in `layer_types`.

    Returns:
        `data` as it is, and None: all one. Else `data` with the scaled settings alone, and their layers.

    Raises:
        ConversionError: kinds of layers with different bases, or with different scaling.
    """
    rope, kinds = data.get("rope_parameters"), data.get("layer_types")
    if not isinstance(rope, dict) or not isinstance(kinds, Sequence) or isinstance(kinds, str):
        return dict(data), None
    nested = {kind: rope[kind] for kind in rope if kind in kinds and isinstance(rope[kind], dict)}
    if not nested:
        return dict(data), None
    missing = [kind for kind in kinds if kind not in nested]
    if missing:
        raise ConversionError(f"rope_parameters lacks {missing[0]!r}, a kind of layer that layer_types names")
    plain = ("default", None)
    scaled = {kind: part for kind, part in nested.items() if part.get("rope_type", part.get("type")) not in plain}
    chosen = next(iter((scaled or nested).values()))
    same_base = all(part.get("rope_theta") == chosen.get("rope_theta") for part in nested.values())
    if not same_base or any(part != chosen for part in scaled.values()):
        raise ConversionError(
            f"rope_parameters differs for {', '.join(nested)}; expected one base, and one scaling where there is any"
        )
    layers = tuple(i for i, kind in enumerate(kinds) if kind in scaled)
    return {**data, "rope_parameters": chosen, "rope_scaling": None}, layers
