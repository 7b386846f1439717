"""Rotary settings of config.json files against transformers' own tables. tests/convert/test_transformers5.py compares
logits under transformers 5."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from molmo2_nemo.convert.hf_config import config_json, parse_config
from molmo2_nemo.convert.hf_rotary import flattened
from molmo2_nemo.convert.names import FORMATS
from molmo2_nemo.errors import ConversionError
from molmo2_nemo.model.config import preset, with_options
from molmo2_nemo.model.families.base import TextConfig
from molmo2_nemo.model.rotary import inverse_frequencies, rotary_tables, table_of_layer, yarn_inverse_frequencies

torch.set_num_threads(1)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 9216}


def text_of(**settings: Any) -> TextConfig:
    """The language model of an 8B with these fields in its text_config."""
    data = config_json(preset("8b"), "native", "float32")
    del data["text_config"]["rope_parameters"]
    data["text_config"] |= settings
    return parse_config(data)[0].text


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"mscale": 1.0, "mscale_all_dim": 0.5},
        {"mscale": 0.707},
        {"mscale": 0.8, "mscale_all_dim": 0.0},
        {"mscale": 0.8, "mscale_all_dim": 0.8, "attention_factor": 1.5},
        {"attention_factor": 0.0},
        {"factor": 0.5},
        {"factor": 0.5, "mscale": 2.0, "mscale_all_dim": 1.0},
        {"beta_fast": None, "beta_slow": 0},
        {"beta_fast": 1.0, "beta_slow": 32.0},
        {"beta_fast": 16, "beta_slow": 2},
        {"original_max_position_embeddings": 64},
    ],
)
def test_yarn_is_transformers_own(extra: dict[str, Any]) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = YARN | extra
    theirs = types.SimpleNamespace(rope_theta=5e5, head_dim=128, hidden_size=4096, num_attention_heads=32)
    theirs.rope_scaling, theirs.max_position_embeddings = scaling, 36864
    inverse, attention = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    ours = text_of(rope_scaling=scaling, rope_theta=5e5)
    assert ours.yarn is not None
    assert ours.yarn.attention_factor == pytest.approx(attention, rel=1e-12)
    torch.testing.assert_close(yarn_inverse_frequencies(ours, ours.yarn), inverse, rtol=1e-6, atol=0)


def test_what_transformers_fills_in() -> None:
    """A null factor is the ratio of the lengths; a missing length is the longest position; numbers of no layer mean
    nothing."""
    yarn = text_of(rope_parameters=YARN | {"factor": None, "rope_theta": 5e5}).yarn
    assert yarn is not None and (yarn.factor, len(yarn.layers)) == (4.0, 36)
    yarn = text_of(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 5e5}).yarn
    assert yarn is not None and yarn.original_max_position == 36864
    yarn = text_of(rope_parameters=YARN, rope_scaling_layers=[7, 2, 7, 99, -1], rope_theta=5e5).yarn
    assert yarn is not None and yarn.layers == (2, 7)
    assert text_of(rope_parameters=YARN, rope_scaling_layers=[99], rope_theta=5e5).yarn is None


def test_where_the_settings_are() -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    both = text_of(
        rope_scaling=YARN | {"rope_theta": 3e4}, rope_parameters=linear | {"rope_theta": 2e4}, rope_theta=1e4
    )
    assert (both.rotary_base, both.rotary_scale) == (3e4, 1.0) and both.yarn is not None
    for empty in (None, {}):
        other = text_of(rope_scaling=empty, rope_parameters=linear, rope_theta=2e4)
        assert (other.rotary_base, other.rotary_scale, other.yarn) == (2e4, 2.0, None)
    assert text_of(rope_scaling={"type": "linear", "factor": 3}, rope_theta=2e4).rotary_scale == 3.0
    assert text_of().rotary_base == 10_000.0  # transformers' default


def test_linear_scaling_on_some_layers() -> None:
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
    every = text_of(rope_parameters=linear, rope_scaling_layers=list(range(36)))
    assert every.rotary_scale_layers is None and table_of_layer(every) == {}
    some = text_of(rope_parameters=linear, rope_scaling_layers=[1, 1])
    assert table_of_layer(some) == {1: "linear"}
    positions = torch.tensor([[0, 5, 4000]])
    tables = rotary_tables(some, positions)
    torch.testing.assert_close(tables["plain"], rotary_tables(preset("8b").text, positions)["plain"], rtol=0, atol=0)
    torch.testing.assert_close(inverse_frequencies(every) * 4, inverse_frequencies(some), rtol=1e-6, atol=0)
    torch.testing.assert_close(tables["linear"], rotary_tables(every, positions)["plain"], rtol=0, atol=0)
    config = parse_config(config_json(preset("8b"), "native", "float32"))[0]
    for target in FORMATS:
        data = config_json(config.__class__(**{**vars(config), "name": "custom", "text": some}), target, "float32")
        assert parse_config(data)[0].text == some
    with pytest.raises(ValueError, match="interpolated on some layers already"):
        with_options(config.__class__(**{**vars(config), "text": some}), rope_scaling="yarn", rope_factor=2.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_parameters": []}, "text_config.rope_parameters is a list, expected an object"),
        ({"rope_parameters": YARN | {"factor": 0}}, "rope_parameters.factor is 0, expected a number above 0"),
        ({"rope_parameters": YARN | {"mscale": "x", "mscale_all_dim": 1}}, "rope_parameters.mscale is 'x'"),
        ({"rope_parameters": YARN | {"truncate": False}}, "rope_parameters.truncate is False, expected True"),
        ({"rope_parameters": YARN | {"rope_theta": None}}, "rope_parameters.rope_theta is null"),
        ({"rope_parameters": YARN, "rope_theta": 1}, "the rotary base is 1, expected above 1"),
        ({"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, expected 1"),
        ({"rope_parameters": {"rope_type": None}}, "rope_parameters.rope_type is null, expected a string"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling.rope_type is 'dynamic', expected 'default'"),
        ({"rope_scaling_layers": [0.5]}, "rope_scaling_layers is .0.5., expected a list of integers"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        text_of(**settings)


def test_settings_by_kind_of_layer() -> None:
    """How transformers 5 writes OLMo 3."""
    kinds = ["sliding_attention", "full_attention"]
    plain = {"rope_type": "default", "rope_theta": 5e5}
    data = {"layer_types": kinds, "rope_parameters": dict(zip(kinds, (plain, YARN | {"rope_theta": 5e5}), strict=True))}
    found, layers = flattened(data)
    assert layers == (1,) and found["rope_parameters"]["rope_type"] == "yarn"
    data["rope_parameters"] = dict.fromkeys(kinds, plain)
    assert flattened(data)[1] == ()
    for wrong, message in (
        ({kinds[1]: plain}, "rope_parameters lacks 'sliding_attention'"),
        ({kinds[0]: plain, kinds[1]: plain | {"rope_theta": 1e6}}, "expected one base, and one scaling"),
        ({kinds[0]: YARN, kinds[1]: YARN | {"factor": 2.0}}, "expected one base, and one scaling"),
    ):
        with pytest.raises(ConversionError, match=message):
            flattened(data | {"rope_parameters": wrong})
