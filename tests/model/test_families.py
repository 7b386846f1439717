"""Families of language models: each is one object, and a third, made here, works in model, planner and conversion."""

from __future__ import annotations

import ast
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from molmo2_nemo.convert import export_checkpoint, import_checkpoint, init_checkpoint
from molmo2_nemo.convert.base_models import llm_rules, vit_rules
from molmo2_nemo.convert.checkpoints import read_model_file
from molmo2_nemo.convert.hf_config import HUB_REPOSITORIES, code_repository
from molmo2_nemo.convert.megatron_io import MegatronCheckpoint
from molmo2_nemo.convert.names import FORMATS, canonical_shapes, external_shapes, rule_shapes
from molmo2_nemo.cost.parameters import parameters
from molmo2_nemo.errors import ConversionError, UserError
from molmo2_nemo.model.config import PRESETS, Molmo2Config, preset
from molmo2_nemo.model.families import FAMILIES, family_of
from molmo2_nemo.model.families.base import BaseNames, Family, LayerNames, TextConfig
from molmo2_nemo.plan.memory import layer_bytes
from molmo2_nemo.settings.compose import compose, conf_dir
from molmo2_nemo.settings.run import PUBLISHED_STAGES
from tests.support.pool import start_megatron

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
TEXT = TextConfig(
    "plain",
    hidden_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    ffn_size=80,
    vocab_size=203,
    rotary_base=10_000.0,
    max_position=512,
    rmsnorm_eps=1e-5,
    initializer_range=0.1,
)
# Pre-norm without QK-norm, in the style of Llama, with weight names of its own.
PLAIN = Family(
    name="plain",
    title="Plain",
    architecture="PlainForCausalLM",
    post_norm=False,
    qk_norm="none",
    molmo2_fields={"qk_norm_type": "none", "norm_after": False},
    sizes={"plain": TEXT},
    required={"mlp_bias": False},
    base_names=BaseNames(
        embedding="tok_embeddings.weight",
        final_norm="norm.weight",
        head="output.weight",
        layer=LayerNames(
            prefix="layers.{i}",
            attention_norm="attention_norm",
            mlp_norm="ffn_norm",
            qkv=("attention.wq", "attention.wk", "attention.wv"),
            proj="attention.wo",
            gate_up=("feed_forward.w1", "feed_forward.w3"),
            down="feed_forward.w2",
        ),
    ),
)


def plain_model() -> Molmo2Config:
    return replace(preset("tiny"), name="custom", text=TEXT)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Molmo2Config:
    """A small model of the made family, which is known as long as the test runs."""
    monkeypatch.setitem(FAMILIES, PLAIN.name, PLAIN)
    return plain_model()


def test_every_family_is_one_file_and_found():
    files = {path.stem for path in (ROOT / "molmo2_nemo" / "model" / "families").glob("*.py")} - {"__init__", "base"}
    assert list(FAMILIES) == sorted(files) and files >= {"olmo3", "qwen3"}
    assert {size for family in FAMILIES.values() for size in family.sizes} >= {"4b", "8b", "o7b"}


def test_every_size_has_its_settings_and_the_place_of_its_code():
    sizes = {name for family in FAMILIES.values() for name in family.sizes}
    assert sizes == set(HUB_REPOSITORIES) == set(PRESETS) - {"tiny"}
    for name in sizes:
        assert compose([f"recipe={name}", f"model={name}"]).model.preset == name
        for stage in PUBLISHED_STAGES:
            assert (conf_dir() / "recipe" / "stages" / f"{name}_{stage}.yaml").is_file()


def test_a_size_without_a_place_of_its_code_is_refused(monkeypatch):
    assert code_repository(preset("4b")) == "allenai/Molmo2-4B"
    assert code_repository(preset("tiny")) == "allenai/Molmo2-8B"  # the code builds any size
    monkeypatch.delitem(HUB_REPOSITORIES, "4b")
    with pytest.raises(ConversionError, match="model 4b: no repository with its code"):
        code_repository(preset("4b"))


def test_no_other_file_tests_the_name_of_a_family():
    """Nothing compares `.family` with anything, or has a table by the names of families."""
    folders = [ROOT / "molmo2_nemo", ROOT / "data_prep"]
    for path in (p for folder in folders for p in folder.rglob("*.py") if "families" not in p.parts):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                assert not any(isinstance(s, ast.Attribute) and s.attr == "family" for s in sides), path
                assert not any(isinstance(s, ast.Constant) and s.value in FAMILIES for s in sides), path
            elif isinstance(node, ast.Dict):
                keys = {k.value for k in node.keys if isinstance(k, ast.Constant)}
                assert not keys or not keys <= set(FAMILIES), path


def test_an_unknown_family_is_named_with_the_nearest():
    with pytest.raises(UserError, match="unknown family of language models 'qwen'; did you mean 'qwen3'"):
        family_of(TextConfig("qwen"))


@pytest.mark.parametrize("name", ["4b", "8b", "o7b", "plain"])
def test_parameters_are_those_of_the_weights(plain, name):
    config = plain if name == "plain" else preset(name)
    assert parameters(config).total == sum(math.prod(shape) for shape in canonical_shapes(config).values())


def test_the_planner_leaves_out_norms_that_are_not_there(plain):
    """A norm of queries and keys keeps an fp32 copy and the normalised value, 6 bytes a number in bf16, and an fp32
    number a head."""
    normed = replace(plain, text=replace(TEXT, family="qwen3"))
    heads = TEXT.num_heads + TEXT.num_kv_heads
    assert layer_bytes(normed) - layer_bytes(plain) == (6 * TEXT.head_dim + 4) * heads


def trained(checkpoint: Path) -> tuple[dict[str, tuple[int, ...]], float, float, list[str]]:
    """Job: the model of a checkpoint takes one step of gradient descent.

    Returns:
        shapes of its parameters, loss before and after, parameters without a finite gradient.
    """
    from molmo2_nemo.model.inputs import PackInputs
    from tests.convert.parity import load_model

    FAMILIES[PLAIN.name] = PLAIN
    try:
        start_megatron()
        model = load_model(checkpoint)
        tokens = torch.randint(TEXT.vocab_size, (1, 24), generator=torch.Generator().manual_seed(0))
        image = model.model_config.text.vocab_size + 2
        tokens[0, 3:12] = image
        count, none = model.model_config.vision.num_patches, torch.full_like(tokens, -1)
        inputs = PackInputs(
            input_ids=tokens,
            position_ids=torch.arange(24)[None],
            example_ids=torch.zeros_like(tokens),
            branch_ids=none,
            visual=tokens == image,
            crops=torch.randint(256, (1, count, model.model_config.vision.patch_dim)).to(torch.uint8),
            pooling=torch.arange(9 * 4).view(9, 4) % count,
            pooled_positions=torch.arange(3, 12),
            unit_crops=torch.tensor([1]),
            unit_pooled_tokens=torch.tensor([9]),
            labels=tokens.roll(-1, 1).clamp(max=TEXT.vocab_size - 1),
            loss_weights=(tokens != image).float(),
        )
        before = model(inputs).loss
        before.backward()
        parameters = dict(model.named_parameters())
        wrong = [name for name, p in parameters.items() if p.grad is None or not p.grad.isfinite().all()]
        with torch.no_grad():
            for parameter in parameters.values():
                parameter -= 1e-3 * parameter.grad
        after = model(inputs).loss
        return {name: tuple(p.shape) for name, p in parameters.items()}, float(before), float(after), wrong
    finally:
        del FAMILIES[PLAIN.name]


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def base_models(folder: Path, config: Molmo2Config) -> tuple[Path, Path]:
    """A base model of the made family and a vision tower of `tiny`'s sizes, in Hugging Face format."""
    llm, vit, text, vision = folder / "llm", folder / "vit", config.text, config.vision
    said: dict[str, Any] = {"model_type": "plain", "hidden_act": "silu", "mlp_bias": False, "rope_theta": 10_000.0}
    said |= {"hidden_size": text.hidden_size, "num_hidden_layers": text.num_layers, "rms_norm_eps": text.rmsnorm_eps}
    said |= {"num_attention_heads": text.num_heads, "num_key_value_heads": text.num_kv_heads}
    said |= {"intermediate_size": text.ffn_size, "vocab_size": text.vocab_size, "max_position_embeddings": 512}
    tower: dict[str, Any] = {"model_type": "siglip_vision_model", "image_size": vision.image_size}
    tower |= {"hidden_size": vision.hidden_size, "intermediate_size": vision.ffn_size, "patch_size": vision.patch_size}
    tower |= {"num_hidden_layers": 11, "num_attention_heads": vision.num_heads}
    deep = replace(config, vision=replace(vision, num_layers=11, feature_layers=(-3, -9)))
    sources = (llm, said, list(llm_rules(text))), (vit, tower, list(vit_rules(deep, "vision_model.")))
    for path, data, chosen in sources:
        path.mkdir()
        (path / "config.json").write_text(json.dumps(data))
        safetensors.torch.save_file(random_tensors(rule_shapes(chosen, deep)), path / "model.safetensors")
    return llm, vit


def test_base_models_of_a_made_family_train_a_step(workers, plain, tmp_path):
    """Initial weights are the base model's, the model has what the counts say, and its loss goes down."""
    llm, vit = base_models(tmp_path, plain)
    start = init_checkpoint(llm, vit, tmp_path / "start")
    config = read_model_file(start)
    assert config is not None and family_of(config.text) is PLAIN and config.text.num_layers == 3
    base, stored = safetensors.torch.load_file(llm / "model.safetensors"), MegatronCheckpoint(start)
    assert torch.equal(stored.read("output_layer.weight"), base["output.weight"])
    assert torch.equal(stored.read("decoder.layers.2.mlp.linear_fc2.weight"), base["layers.2.feed_forward.w2.weight"])
    gate_up = torch.cat([base[f"layers.1.feed_forward.{name}.weight"] for name in ("w1", "w3")])
    assert torch.equal(stored.read("decoder.layers.1.mlp.linear_fc1.weight"), gate_up)

    shapes, before, after, wrong = workers.run(trained, start)[0]
    assert shapes == canonical_shapes(config)
    assert not any("layernorm" in name for name in shapes if "self_attention" in name)
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters(config).total
    assert not wrong and math.isfinite(before) and after < before


@pytest.mark.parametrize("target", FORMATS)
def test_a_made_family_is_exported_and_imported_bit_by_bit(plain, tmp_path, target):
    source = tmp_path / "hf"
    source.mkdir()
    from molmo2_nemo.convert.hf_config import config_json

    said = config_json(plain, target, "float32")
    assert said["text_config"]["qk_norm_type"] == "none"
    (source / "config.json").write_text(json.dumps(said))
    tensors = random_tensors(external_shapes(plain, target))
    safetensors.torch.save_file(tensors, source / "model.safetensors")
    imported = import_checkpoint(source, tmp_path / "megatron")
    again = export_checkpoint(imported, tmp_path / "again", format=target)
    out = safetensors.torch.load_file(again / "model.safetensors")
    assert out.keys() == tensors.keys() and all(torch.equal(out[name], tensors[name]) for name in tensors)
    assert read_model_file(import_checkpoint(again, tmp_path / "back")) == read_model_file(imported)
