"""config.json in both formats against the presets, and refusal of what is not a supported Molmo2."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from molmo2_nemo.convert.hf_config import config_json, parse_config, read_model_config
from molmo2_nemo.convert.names import FORMATS, Format
from molmo2_nemo.errors import ConversionError
from molmo2_nemo.model.config import PRESETS, preset, with_options

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"

# Values of the published 4B's config.json, as the hub has them.
PUBLISHED_4B: dict[str, Any] = {
    "model_type": "molmo2",
    "image_start_token_id": 151936,
    "image_end_token_id": 151937,
    "image_patch_id": 151938,
    "image_high_res_id": 151938,
    "image_col_id": 151939,
    "low_res_image_start_token_id": 151940,
    "image_low_res_id": 151942,
    "frame_start_token_id": 151943,
    "frame_end_token_id": 151944,
    "use_frame_special_tokens": False,
    "tie_word_embeddings": False,
    "vit_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 72,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-06,
        "image_default_input_size": [378, 378],
        "image_patch_size": 14,
        "image_num_pos": 729,
        "float32_attention": True,
    },
    "adapter_config": {
        "vit_layers": [-3, -9],
        "pooling_attention_mask": True,
        "hidden_size": 1152,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 72,
        "hidden_act": "silu",
        "intermediate_size": 9728,
        "text_hidden_size": 2560,
    },
    "text_config": {
        "model_type": "molmo2_text",
        "hidden_size": 2560,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "additional_vocab_size": 128,
        "qkv_bias": False,
        "num_hidden_layers": 36,
        "intermediate_size": 9728,
        "hidden_act": "silu",
        "max_position_embeddings": 36864,
        "rope_theta": 5000000.0,
        "rope_scaling": None,
        "rope_scaling_layers": None,
        "use_qk_norm": True,
        "qk_norm_type": "qwen3",
        "layer_norm_eps": 1e-06,
        "norm_after": False,
        "initializer_range": 0.02,
    },
}


def altered(section: str, **values: Any) -> dict[str, Any]:
    """The published 4B's config with some values of one section replaced."""
    data = copy.deepcopy(PUBLISHED_4B)
    return data | {section: data[section] | values}


def test_published_4b_is_recognised_as_the_preset() -> None:
    assert parse_config(PUBLISHED_4B) == (preset("4b"), "remote")


def test_remote_export_writes_what_the_hub_has() -> None:
    ours = config_json(preset("4b"), "remote", "float32")
    for key, value in PUBLISHED_4B.items():
        if isinstance(value, dict):
            assert {k: ours[key][k] for k in value if k != "model_type"} == {
                k: v for k, v in value.items() if k != "model_type"
            }
        else:
            assert ours[key] == value, key


def test_remote_export_leaves_out_empty_places() -> None:
    """Without sdpa the remote code pools a window's empty places too (tests/convert/test_remote_code.py runs it)."""
    ours = config_json(preset("4b"), "remote", "float32")
    assert {ours[part]["attn_implementation"] for part in ("vit_config", "adapter_config", "text_config")} == {"sdpa"}


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_survive_a_round_trip(name: str, target: Format) -> None:
    data = json.loads(json.dumps(config_json(preset(name), target, "bfloat16")))
    assert parse_config(data) == (preset(name), target)


def test_a_longer_context_keeps_the_preset() -> None:
    config, _ = parse_config(altered("text_config", max_position_embeddings=65536))
    assert config.name == "4b"
    assert config.text.max_position == 65536


def test_fixtures_of_transformers() -> None:
    assert read_model_config(FIXTURES / "tiny") == (preset("tiny"), "native")
    olmo, _ = read_model_config(FIXTURES / "olmo3")
    assert olmo.name == "custom"
    assert (olmo.text.family, olmo.text.num_kv_heads, olmo.text.head_dim) == ("olmo3", 4, 16)
    assert olmo.text.yarn is not None
    assert (olmo.text.yarn.layers, olmo.text.yarn.original_max_position) == ((1, 3), 512)
    assert olmo.vision.feature_indices == (2, 0)


def test_native_defaults_are_filled_in() -> None:
    """transformers leaves fields out that equal its defaults: an 8B may be almost empty."""
    text = {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}}
    adapter = {"intermediate_size": 12288, "text_hidden_size": 4096}
    assert parse_config({"model_type": "molmo2", "text_config": text, "adapter_config": adapter}) == (
        preset("8b"),
        "native",
    )


def test_yarn_attention_factor_has_the_formulas_default() -> None:
    data = config_json(preset("o7b"), "native", "float32")
    del data["text_config"]["rope_parameters"]["attention_factor"]
    config, _ = parse_config(data)
    assert config.text.yarn is not None
    assert config.text.yarn.attention_factor == pytest.approx(1.2079441541679836, abs=1e-12)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"model_type": "llava"}, "model_type is 'llava', expected 'molmo2'"),
        ({}, "model_type is None"),
        (altered("text_config", norm_after=True), "qk_norm_type='qwen3', norm_after=True"),
        (altered("text_config", qkv_bias=True), "text_config.qkv_bias is True, expected False"),
        (
            altered("text_config", rope_scaling={"rope_type": "longrope", "factor": 2}),
            "rope_scaling.rope_type is 'longrope'",
        ),
        (altered("text_config", rope_scaling={"rope_type": "linear"}), "lacks factor"),
        (altered("text_config", rope_scaling={"rope_type": "yarn"}), "text_config.rope_scaling lacks factor"),
        (altered("text_config", rope_theta=None), "text_config.rope_theta is null, expected a number above 0"),
        (altered("vit_config", hidden_act="gelu"), "vit_config.hidden_act is 'gelu'"),
        (altered("vit_config", image_num_pos=577), "vit_config.image_num_pos is 577, expected 729"),
        (altered("adapter_config", text_hidden_size=4096), "text_hidden_size is 4096, expected 2560"),
        (
            altered("adapter_config", vit_layers=[30]),
            r"vit_layers is \[30\], expected layers of",
        ),
        (PUBLISHED_4B | {"image_patch_id": 7}, r"image_patch_id is 7, expected 151938 \(base vocabulary \+ 2\)"),
        (PUBLISHED_4B | {"text_config": []}, "text_config is a list, expected an object"),
        (
            altered("text_config", num_hidden_layers=10**9),
            "is 1000000000, expected an integer from 1 to",
        ),
        (
            altered("text_config", hidden_size=None),
            "text_config.hidden_size is null, expected an integer of",
        ),
        (altered("text_config", layer_norm_eps="1e-6"), "layer_norm_eps is '1e-6', expected a number of at least 0"),
        (altered("text_config", layer_norm_eps=float("nan")), "layer_norm_eps is nan, expected a number"),
        (altered("text_config", num_key_value_heads=5), "num_attention_heads is 32, expected a multiple of 5"),
        (altered("text_config", head_dim=127), "head_dim is 127, expected an even number"),
        (altered("text_config", norm_after=0), "norm_after is 0, expected true or false"),
        (altered("vit_config", num_attention_heads=7), "hidden_size is 1152, expected a multiple of 7"),
        (altered("vit_config", image_default_input_size=[378, 392]), r"image_default_input_size is \[378, 392\]"),
        (altered("adapter_config", vit_layers=[]), r"vit_layers is \[\], expected a list of at least one integer"),
        (altered("adapter_config", pooling_attention_mask=False), "pooling_attention_mask is False, expected True"),
    ],
)
def test_refusals(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        parse_config(data)


VALUES = (None, True, -1, 0, 1, 2.5, 10**9, 10**400, float("nan"), "x", "", [], [1, 1], ["x"], {}, {"x": 1})


@pytest.mark.parametrize("target", FORMATS)
def test_any_value_is_read_or_refused_in_one_line(target: Format) -> None:
    """Every field of every part of a config.json, with values of all types, and left out."""
    for name in ("4b", "o7b"):
        whole = config_json(preset(name), target, "float32")
        places = [(whole, key) for key in whole if key != "model_type"]
        places += [(whole[part], key) for part in whole if isinstance(whole[part], dict) for key in whole[part]]
        rope = whole["text_config"].get("rope_parameters") or whole["text_config"]["rope_scaling"]
        places += [(rope, key) for key in rope or ()]
        refused = 0
        for place, key in places:
            kept = place.pop(key)
            for value in (*VALUES, "left out"):
                if value != "left out":
                    place[key] = value
                try:
                    parse_config(whole)
                except ConversionError as error:
                    assert "\n" not in str(error) and len(str(error)) < 400
                    refused += 1
            place[key] = kept
        assert refused > 5 * len(places)
        assert parse_config(whole) == (preset(name), target)


def test_null_means_left_out_where_transformers_says_so() -> None:
    data = config_json(preset("8b"), "native", "float32")
    for part, key in (
        ("adapter_config", "vision_feature_layer"),
        ("vision_config", "image_size"),
        ("vision_config", "num_position_embeddings"),
        ("text_config", "rope_scaling_layers"),
    ):
        data[part][key] = None
    assert parse_config(data) == (preset("8b"), "native")


def test_of_two_names_of_a_field_the_remote_codes_counts() -> None:
    """As in transformers, in whatever order they are written."""
    for order in (1, -1):
        data = config_json(preset("8b"), "native", "float32")
        both = {"vision_feature_layer": [1], "vit_layers": [24, 18]}
        data["adapter_config"] |= dict(list(both.items())[::order])
        assert parse_config(data) == (preset("8b"), "native")


def test_each_format_has_its_own_defaults() -> None:
    """The remote code leaves out other values than transformers does."""
    data = altered("adapter_config")
    del data["adapter_config"]["vit_layers"], data["vit_config"]["num_hidden_layers"]
    assert parse_config(data) == (preset("4b"), "remote")
    del data["adapter_config"]["pooling_attention_mask"]
    with pytest.raises(ConversionError, match="pooling_attention_mask is False, expected True"):
        parse_config(data)


def test_missing_or_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="config.json does not exist"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"config.json is not valid JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ConversionError, match=r"config.json: model_type is 'qwen3'"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("kind", "size", "factor", "longest"),
    [("linear", "8b", 2.0, 73728), ("yarn", "4b", 2.0, 73728), ("yarn", "o7b", 13.0, 106496)],
)
def test_chosen_rotary_scaling_survives(kind: str, size: str, factor: float, longest: int) -> None:
    config = with_options(preset(size), rope_scaling=kind, rope_factor=factor)
    assert config.text.max_position == longest
    for target in FORMATS:
        back, _ = parse_config(config_json(config, target, "float32"))
        assert replace(back.text, tie_embeddings=config.text.tie_embeddings) == config.text


def test_yarn_survives_for_custom_sizes() -> None:
    config = replace(preset("o7b"), name="custom", text=replace(preset("o7b").text, num_layers=8, num_kv_heads=8))
    assert config.text.yarn is not None
    config = replace(config, text=replace(config.text, yarn=replace(config.text.yarn, layers=(3, 7), factor=4.0)))
    for target in FORMATS:
        back, _ = parse_config(config_json(config, target, "float32"))
        assert back.text == config.text


@pytest.mark.parametrize("made", ["sft/checkpoints/step=2", "checkpoints", "weights"])
def test_a_run_in_place_of_a_model_is_named(tmp_path: Path, made: str) -> None:
    (tmp_path / made).mkdir(parents=True)
    if made == "weights":
        (tmp_path / made / "metadata.json").write_text("{}")
    with pytest.raises(ConversionError, match="is a run or a checkpoint of this project, which molmo2 convert export"):
        read_model_config(tmp_path)
    with pytest.raises(ConversionError, match="in Hugging Face format$"):
        read_model_config(tmp_path / "absent")
