"""Weight names and layouts: bijections, agreement with transformers' fixtures, and hand-made small cases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from molmo2_nemo.convert.hf_config import read_model_config
from molmo2_nemo.convert.names import (
    FORMATS,
    Format,
    Rule,
    canonical_shapes,
    external_shapes,
    join_qkv,
    rules,
    split_qkv,
    to_canonical,
    to_external,
)
from molmo2_nemo.convert.safetensors_io import SafetensorsFolder
from molmo2_nemo.errors import ConversionError
from molmo2_nemo.model.config import Molmo2Config, TextConfig, YarnConfig, preset

torch.set_num_threads(1)
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
SMALL = ("qwen3_tied", "qwen3_tied_odd", "qwen3_untied", "olmo3", "olmo3_gqa")


def family(name: str) -> Molmo2Config:
    """A small model of each of the three published shapes."""
    config = replace(preset("tiny"), name="custom")
    if name == "qwen3_untied":
        # not tiny's own sizes: those mean a tied head
        return replace(config, text=replace(config.text, tie_embeddings=False, ffn_size=448))
    if name == "olmo3":
        text = replace(config.text, family="olmo3", tie_embeddings=False, num_kv_heads=4, yarn=YarnConfig((1, 3)))
        return replace(config, text=text)
    return config


FAMILIES = ("qwen3_tied", "qwen3_untied", "olmo3")


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_name_appears_exactly_once(name: str, target: Format) -> None:
    config = family(name)
    ours = [c for rule in rules(config, target) for c in rule.canonical]
    theirs = [e for rule in rules(config, target) for e in (*rule.external, *([rule.head] if rule.head else []))]
    assert sorted(ours) == sorted(canonical_shapes(config))
    assert len(set(theirs)) == len(theirs)
    assert sorted(theirs) == sorted(external_shapes(config, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_is_bit_identical(name: str, target: Format, dtype: torch.dtype) -> None:
    config = family(name)
    generator = torch.Generator().manual_seed(0)
    shapes = canonical_shapes(config)
    for rule in rules(config, target):
        tensors = [torch.randn(shapes[c], generator=generator).to(dtype) for c in rule.canonical]
        external = to_external(rule, tensors, config)
        for key, tensor in external.items():
            assert tuple(tensor.shape) == external_shapes_cached(config, target)[key]
        back = to_canonical(rule, external, config)
        for key, tensor in zip(rule.canonical, tensors, strict=True):
            assert back[key].dtype == dtype
            assert torch.equal(back[key], tensor), key


_cache: dict[tuple[Molmo2Config, Format], dict[str, tuple[int, ...]]] = {}


def external_shapes_cached(config: Molmo2Config, target: Format) -> dict[str, tuple[int, ...]]:
    if (config, target) not in _cache:
        _cache[config, target] = external_shapes(config, target)
    return _cache[config, target]


@pytest.mark.parametrize("fixture", SMALL)
def test_native_names_and_shapes_are_transformers_own(fixture: str) -> None:
    folder = SafetensorsFolder(FIXTURES / fixture)
    config, source = read_model_config(FIXTURES / fixture)
    assert source == "native"
    assert {name: info.shape for name, info in folder.tensors.items()} == external_shapes(config, "native")


def test_published_totals() -> None:
    """Tensor count and parameter counts of the published checkpoints (reference tables)."""
    four, eight, olmo = preset("4b"), preset("8b"), preset("o7b")
    count = {c.name: sum(torch.Size(s).numel() for s in canonical_shapes(c).values()) for c in (four, eight, olmo)}
    assert count == {"4b": 4_461_913_040, "8b": 8_661_703_120, "o7b": 7_760_786_896}
    remote = external_shapes(four, "remote")
    assert len(remote) == 706
    assert sum(torch.Size(s).numel() for s in remote.values()) == 4_850_869_200  # total_parameters of the hub's index
    assert remote["model.transformer.blocks.35.self_attn.att_proj.weight"] == (6144, 2560)
    assert remote["model.transformer.blocks.0.mlp.ff_proj.weight"] == (19456, 2560)
    assert external_shapes(olmo, "remote")["model.transformer.blocks.0.self_attn.q_norm.weight"] == (4096,)


def test_qkv_interleaving_by_hand() -> None:
    """4 query heads in 2 groups of head dim 1: Megatron's rows are q0 q1 k0 v0 q2 q3 k1 v1."""
    text = TextConfig(num_heads=4, num_kv_heads=2, head_dim=1)
    q, k, v = torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[10.0], [11]]), torch.tensor([[20.0], [21]])
    joined = join_qkv(q, k, v, text)
    assert joined.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    for part, expected in zip(split_qkv(joined, text), (q, k, v), strict=True):
        assert torch.equal(part, expected)


def test_gate_and_up_order() -> None:
    config = preset("tiny")
    fc1 = torch.cat([torch.full((2, 1), 1.0), torch.full((2, 1), 2.0)])  # gate rows 1, up rows 2
    native = next(r for r in rules(config, "native") if r.kind == "gate_up_split")
    parts = to_external(native, [fc1], config)
    assert {key.split(".")[-2]: float(part[0]) for key, part in parts.items()} == {"gate_proj": 1.0, "up_proj": 2.0}
    remote = next(r for r in rules(config, "remote") if r.kind == "up_gate_rows")
    assert to_external(remote, [fc1], config)[remote.external[0]].flatten().tolist() == [2, 2, 1, 1]


def test_a_tied_head_must_be_a_copy() -> None:
    config = preset("4b")
    rule = Rule("embedding", ("embedding.base.weight",), ("model.transformer.wte.embedding",), head="lm_head.weight")
    table = torch.randn(4, 3)
    tensors = {"model.transformer.wte.embedding": table, "lm_head.weight": table.clone()}
    assert torch.equal(to_canonical(rule, tensors, config)["embedding.base.weight"], table)
    tensors["lm_head.weight"][1, 1] += 1
    with pytest.raises(ConversionError, match="lm_head.weight is not a copy"):
        to_canonical(rule, tensors, config)
    del tensors["lm_head.weight"]
    assert torch.equal(to_canonical(rule, tensors, config)["embedding.base.weight"], table)


def test_unknown_format() -> None:
    with pytest.raises(ConversionError, match="unknown format 'gguf'; known formats: native, remote"):
        next(rules(preset("tiny"), "gguf"))  # type: ignore[arg-type]
