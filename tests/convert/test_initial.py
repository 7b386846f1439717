"""The start of stage 1 from base models: transformers' own Qwen3, OLMo 3 and SigLIP say what it must compute."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from molmo2_nemo.convert import export_checkpoint, import_checkpoint, init_checkpoint
from molmo2_nemo.convert.base_models import combine, read_llm, read_vit
from molmo2_nemo.convert.checkpoints import read_model_file
from molmo2_nemo.convert.megatron_io import MegatronCheckpoint
from molmo2_nemo.convert.names import canonical_shapes
from molmo2_nemo.convert.safetensors_io import SafetensorsFolder
from molmo2_nemo.errors import ConversionError
from molmo2_nemo.model.config import preset
from tests.convert.parity import load_model
from tests.convert.test_hf_config import VALUES
from tests.fixtures import base_models
from tests.fixtures.base_models import GRID, LENGTH, LLMS, SMALL, VOCABULARY, YARN, to_patches
from tests.support.pool import start_megatron

torch.set_num_threads(1)
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
VITS = ("whole", "tower", "bare", "naflex")


@functools.cache
def language_model(name: str) -> Any:
    import transformers

    torch.manual_seed(1)
    return base_models.language_model(transformers, name)


@functools.cache
def vision_tower(kind: str) -> Any:
    import transformers

    torch.manual_seed(2)
    return base_models.vision_model(transformers, torch, kind)


def save_llm(folder: Path, name: str) -> Path:
    language_model(name).save_pretrained(folder, max_shard_size="60KB")
    return folder


def save_vit(folder: Path, kind: str = "tower") -> Path:
    vision_tower(kind).save_pretrained(folder)
    if kind == "bare":  # names without "vision_model."
        file = folder / "model.safetensors"
        tensors = loaded(file)
        safetensors.torch.save_file({n.removeprefix("vision_model."): t for n, t in tensors.items()}, file)
    return folder


def loaded(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of their own: the library's are windows on the file, which the tests overwrite."""
    return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(file).items()}


def text_logits(checkpoint: Path, ids: list[int]) -> torch.Tensor:
    """Job: logits [S, V] of text without pictures."""
    start_megatron()
    model = load_model(checkpoint)
    with torch.no_grad():
        return model(text_inputs(model, ids))[0]


def text_inputs(model: Any, ids: list[int]) -> Any:
    """One text without pictures as a pack of its own."""
    from molmo2_nemo.model.inputs import PackInputs

    tokens, none = torch.tensor([ids]), torch.zeros(0, dtype=torch.int64)
    patches, values = model.model_config.vision.num_patches, model.model_config.vision.patch_dim
    return PackInputs(
        input_ids=tokens,
        position_ids=torch.arange(len(ids))[None],
        example_ids=torch.zeros_like(tokens),
        branch_ids=torch.full_like(tokens, -1),
        visual=torch.zeros_like(tokens).bool(),
        crops=torch.zeros(0, patches, values, dtype=torch.uint8),
        pooling=torch.zeros(0, 4, dtype=torch.int64),
        pooled_positions=none,
        unit_crops=none,
        unit_pooled_tokens=none,
        labels=None,
        loss_weights=None,
    )


def vision_features(checkpoint: Path, crops: torch.Tensor) -> torch.Tensor:
    """Job: features [C, P, 2 W] of uint8 patches."""
    start_megatron()
    with torch.no_grad():
        return load_model(checkpoint).vision(crops)


@pytest.mark.parametrize("name", LLMS)
def test_text_logits_are_the_base_models(workers: Any, tmp_path: Path, name: str) -> None:
    """24 tokens fit into OLMo 3's window of 32, which Molmo2 does without."""
    out = init_checkpoint(save_llm(tmp_path / "llm", name), save_vit(tmp_path / "vit"), tmp_path / "out")
    config = read_model_file(out)
    assert config is not None and config.text.tie_embeddings == (name == "qwen3_tied")
    assert (config.text.yarn.layers if config.text.yarn else None) == ((3,) if "olmo3" in name else None)
    ids = torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(3)).tolist()
    logits = workers.run(text_logits, out, ids)[0]
    with torch.no_grad():
        expected = language_model(name)(torch.tensor([ids])).logits[0]
    assert expected.abs().max() > 1
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < 2e-5


@pytest.mark.parametrize("kind", VITS)
def test_features_are_siglips_hidden_states(workers: Any, tmp_path: Path, kind: str) -> None:
    out = init_checkpoint(save_llm(tmp_path / "llm", "qwen3_tied"), save_vit(tmp_path / "vit", kind), tmp_path / "out")
    generator = torch.Generator().manual_seed(4)
    image = torch.randint(256, (2, GRID * 14, GRID * 14, 3), generator=generator, dtype=torch.uint8)
    features = workers.run(vision_features, out, to_patches(image))[0]
    expected = base_models.vision_outputs(torch, vision_tower(kind), kind, image)
    assert features.shape == expected.shape
    assert (features - expected).abs().max() < 2e-5 * float(expected.abs().max())


def test_new_parts_and_what_is_left_out(tmp_path: Path) -> None:
    llm, vit = save_llm(tmp_path / "llm", "qwen3_tied"), save_vit(tmp_path / "vit", "whole")
    first = init_checkpoint(llm, vit, tmp_path / "first", seed=5)
    config = read_model_file(first)
    assert config is not None
    one = MegatronCheckpoint(first)
    two = MegatronCheckpoint(init_checkpoint(llm, vit, tmp_path / "second", seed=6))
    for name in canonical_shapes(config):
        same, new = torch.equal(one.read(name), two.read(name)), name.startswith(("connector.", "embedding.extra"))
        assert same == (not new or name.endswith("bias")), name
    for name in ("connector.projector.up_proj.weight", "connector.pooling.q_proj.weight"):
        assert float(one.read(name).std()) == pytest.approx(0.02, rel=0.05)
    assert not one.read("connector.pooling.o_proj.bias").any()
    assert one.shape("embedding.extra.weight") == (128, 48)
    origin = json.loads((first / "origin.json").read_text())
    assert origin["seed"] == 5
    whole, dropped = SafetensorsFolder(vit).tensors, origin["dropped"]
    # 11 blocks: the features are blocks 8 and 2, so 9 and 10 (16 tensors each) go; final norm 2, head 11, two scales
    vision = [n for n in dropped if n.startswith("vision_model.")]
    assert len([n for n in vision if ".layers.9." in n or ".layers.10." in n]) == 32
    assert len([n for n in vision if n.startswith("vision_model.head.")]) == 11
    assert len(vision) == 32 + 11 + 2
    assert {n for n in dropped if n not in vision} == {n for n in whole if not n.startswith("vision_model.")}
    # it is a checkpoint like any other
    export_checkpoint(first, tmp_path / "hf", format="remote")
    again = MegatronCheckpoint(import_checkpoint(tmp_path / "hf", tmp_path / "again"))
    for name in canonical_shapes(config):
        assert torch.equal(one.read(name), again.read(name)), name


def test_types(tmp_path: Path) -> None:
    """bf16 language model, fp32 vision: nothing is lost by default, and one type throughout either way."""
    llm, vit = tmp_path / "llm", save_vit(tmp_path / "vit")
    save_llm(llm, "qwen3_untied")
    for file in llm.glob("*.safetensors"):
        tensors = loaded(file)
        safetensors.torch.save_file({name: value.bfloat16() for name, value in tensors.items()}, file)
    wide = MegatronCheckpoint(init_checkpoint(llm, vit, tmp_path / "wide"))
    narrow = MegatronCheckpoint(init_checkpoint(llm, vit, tmp_path / "narrow", dtype=torch.bfloat16))
    config = read_model_file(tmp_path / "wide")
    assert config is not None
    for name in canonical_shapes(config):
        assert (wide.dtype(name), narrow.dtype(name)) == (torch.float32, torch.bfloat16)
        assert torch.equal(wide.read(name).bfloat16(), narrow.read(name)), name
    table = language_model("qwen3_untied").model.embed_tokens.weight.detach()
    assert torch.equal(wide.read("embedding.base.weight"), table.bfloat16().float())


@pytest.mark.parametrize("made", sorted((FIXTURES / "base_models").glob("*.json")), ids=lambda path: path.stem)
def test_base_models_saved_by_transformers_5(tmp_path: Path, made: Path) -> None:
    """config.json and tensor names that transformers 5.24 wrote; the weights are those of the transformers here."""
    saved = json.loads(made.read_text())
    name = made.stem
    llm, vit = tmp_path / "llm", save_vit(tmp_path / "vit", name if name in VITS else "tower")
    language_model(name if name in LLMS else "qwen3_tied").save_pretrained(llm)
    before = init_checkpoint(llm, vit, tmp_path / "before")
    folder = llm if name in LLMS else vit
    tensors = loaded(folder / "model.safetensors")
    renamed = {key: tensors[key if key in tensors else f"vision_model.{key}"] for key in saved["tensors"]}
    assert {key: list(tensor.shape) for key, tensor in renamed.items()} == saved["tensors"]
    assert len(renamed) == len(tensors)
    safetensors.torch.save_file(renamed, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(saved["config"]))
    after = init_checkpoint(llm, vit, tmp_path / "after")
    config = read_model_file(before)
    assert config is not None and config == read_model_file(after)
    one, other = MegatronCheckpoint(before), MegatronCheckpoint(after)
    for key in canonical_shapes(config):
        assert torch.equal(one.read(key), other.read(key)), key


@pytest.mark.parametrize("made", sorted((FIXTURES / "base_models").glob("*.json")), ids=lambda path: path.stem)
def test_any_value_in_a_base_model_is_read_or_refused_in_one_line(tmp_path: Path, made: Path) -> None:
    whole = json.loads(made.read_text())["config"]
    read = read_llm if made.stem in LLMS else read_vit
    parts = [whole, *(part for part in whole.values() if isinstance(part, dict))]
    parts += [part for nested in parts[1:] for part in nested.values() if isinstance(part, dict)]
    refused = 0
    for part in parts:
        for key in list(part):
            kept = part.pop(key)
            for value in (*VALUES, "left out"):
                if value != "left out":
                    part[key] = value
                (tmp_path / "config.json").write_text(json.dumps(whole))
                try:
                    read(tmp_path)
                except ConversionError as error:
                    assert "\n" not in str(error) and len(str(error)) < 800
                    refused += 1
            part[key] = kept
    assert refused > 50


@pytest.mark.parametrize("name", ["olmo3", "qwen3_tied"])
def test_kinds_of_layers(tmp_path: Path, name: str) -> None:
    """One known word for each layer, with rotary settings by kind of layer or without."""
    config = language_model(name).config.to_dict()
    count = config["num_hidden_layers"]
    some = ["sliding_attention"] * (count - 1)
    nested = {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e4}}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_types": [*some, "full_attention"]}))
    read_llm(tmp_path)
    for kinds, message in (
        (some, f"layer_types has {count - 1} entries, expected one for each of the {count} layers"),
        ([], "layer_types has 0 entries"),
        (
            [*some, "chunked_attention"],
            rf"layer_types.{count - 1}. is 'chunked_attention', expected 'sliding_attention' or",
        ),
        ([["x"], *some], r"layer_types.0. is \['x'\], expected"),
        ([*some, None], "is None, expected"),
        ("full_attention", "layer_types is 'full_attention', expected a list"),
    ):
        for rotary in ({}, nested):
            (tmp_path / "config.json").write_text(json.dumps(config | rotary | {"layer_types": kinds}))
            with pytest.raises(ConversionError, match=f"config.json: .*{message}"):
                read_llm(tmp_path)


def test_a_damaged_tokenizer_is_found_before_the_work(tmp_path: Path) -> None:
    llm, vit = save_llm(tmp_path / "llm", "qwen3_tied"), save_vit(tmp_path / "vit")
    (llm / "tokenizer.json").write_text("{}")
    with pytest.raises(ConversionError, match="llm has a tokenizer that cannot be used.* is not a tokenizer file"):
        init_checkpoint(llm, vit, tmp_path / "out")
    (llm / "tokenizer.json").unlink()
    (llm / "tokenizer.json").mkdir()
    with pytest.raises(ConversionError, match="tokenizer.json is a folder, expected a file"):
        init_checkpoint(llm, vit, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llm", "vit"]


OLMO3_LAYERS = (["sliding_attention"] * 3 + ["full_attention"]) * 8
PUBLISHED = {  # config.json of the published base models, the fields that matter
    "4b": {"model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
    | {"num_hidden_layers": 36, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_theta": 5000000}
    | {"max_position_embeddings": 262144, "rope_scaling": None, "use_sliding_window": False, "sliding_window": None},
    "8b": {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
    | {"num_hidden_layers": 36, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_theta": 1000000}
    | {"max_position_embeddings": 40960, "rope_scaling": None, "use_sliding_window": False},
    "o7b": {"model_type": "olmo3", "hidden_size": 4096, "intermediate_size": 11008, "tie_word_embeddings": False}
    | {"num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 100278, "rope_theta": 500000}
    | {"max_position_embeddings": 65536, "sliding_window": 4096, "layer_types": OLMO3_LAYERS}
    | {"rope_scaling": {**YARN, "original_max_position_embeddings": 8192}},
}  # fmt: skip
SIGLIP2 = {"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model"}
SIGLIP2 |= {"num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14}


def write_configs(folder: Path, llm: dict[str, Any], vit: dict[str, Any]) -> tuple[Path, Path]:
    for name, data in (("llm", llm), ("vit", vit)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(data))
    return folder / "llm", folder / "vit"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_base_models_make_the_presets(tmp_path: Path, name: str) -> None:
    common = {"num_attention_heads": 32, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False}
    whole = {"model_type": "siglip", "vision_config": SIGLIP2, "text_config": {"vocab_size": 256000}}
    for vit_config in (SIGLIP2, whole):
        llm, vit = write_configs(tmp_path, common | PUBLISHED[name], vit_config)
        assert combine(read_llm(llm), read_vit(vit), None) == preset(name)
        assert combine(read_llm(llm), read_vit(vit), name) == preset(name)
    other = "8b" if name == "4b" else "4b"
    with pytest.raises(ConversionError, match=rf"not the base models of '{other}': the language model has \w+ "):
        combine(read_llm(llm), read_vit(vit), other)
    llm, vit = write_configs(tmp_path, common | PUBLISHED[name], SIGLIP2 | {"patch_size": 16})
    with pytest.raises(ConversionError, match=r"the vision model has image_size 384, expected 378.*patch_size 16"):
        combine(read_llm(llm), read_vit(vit), name)


def test_bad_sources_write_nothing(tmp_path: Path) -> None:
    llm, vit, out = save_llm(tmp_path / "llm", "olmo3"), save_vit(tmp_path / "vit"), tmp_path / "out"

    def refuse(message: str, model: str | None = None) -> None:
        with pytest.raises(ConversionError, match=message):
            init_checkpoint(llm, vit, out, model=model)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["llm", "vit"]

    refuse("not the base models of '8b': the language model has family olmo3, expected qwen3", "8b")
    for folder, change, message in (
        (llm, {"model_type": "llama"}, "llm/config.json: model_type is 'llama', expected one of olmo3, qwen3"),
        (llm, {"attention_bias": True}, "llm/config.json: attention_bias is True, expected False"),
        (llm, {"vocab_size": None}, "llm/config.json lacks vocab_size"),
        (vit, {"model_type": "clip"}, "vit/config.json: model_type is 'clip', expected one of siglip"),
        (vit, {"num_hidden_layers": 8}, "the vision model has 8 blocks, expected at least 9"),
        (vit, {"num_hidden_layers": 10}, r"has tensors vision_model.encoder.layers.10\S+ .* that the model"),
        (llm, {"vocab_size": 200}, r"\w+.weight in \S+ has shape \[203, 48\], expected \[200, 48\]"),
    ):
        path = folder / "config.json"
        kept = path.read_text()
        path.write_text(json.dumps(json.loads(kept) | change))
        refuse(message)
        path.write_text(kept)
    file = vit / "model.safetensors"
    kept_bytes, tensors = file.read_bytes(), loaded(file)
    file.write_bytes(kept_bytes[:-50_000])
    refuse("vit/model.safetensors is truncated")
    name = "vision_model.encoder.layers.4.mlp.fc1.bias"
    safetensors.torch.save_file({k: v for k, v in tensors.items() if k != name}, file)
    refuse(f"vit lacks tensor {name}")
    safetensors.torch.save_file(tensors | {"vision_model.surprise": torch.zeros(1)}, file)
    refuse("vit has tensor vision_model.surprise")
    patches = "vision_model.embeddings.patch_embedding.weight"
    safetensors.torch.save_file(tensors | {patches: tensors[patches][:, :1].clone()}, file)
    refuse(rf"{patches} in \S+ has shape \[32, 1, 14, 14\], expected \[32, 3, 14, 14\]")
    safetensors.torch.save_file({"x": torch.zeros(1)}, file)
    refuse("vit: no vision tower of a SigLIP")
    file.unlink()
    torch.save(tensors, vit / "pytorch_model.bin")
    refuse("pickled weights only")
    file.write_bytes(kept_bytes)
    (vit / "pytorch_model.bin").unlink()
    next(llm.glob("model-00002-*.safetensors")).unlink()
    refuse("model.safetensors.index.json names model-00002-of-.* which does not exist")


def test_a_head_that_is_not_the_tied_table(tmp_path: Path) -> None:
    llm, vit = tmp_path / "llm", save_vit(tmp_path / "vit")
    language_model("qwen3_tied").save_pretrained(llm)
    tensors = loaded(llm / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    safetensors.torch.save_file(tensors | {"lm_head.weight": table.clone()}, llm / "model.safetensors")
    init_checkpoint(llm, vit, tmp_path / "copy")
    safetensors.torch.save_file(tensors | {"lm_head.weight": table + 1}, llm / "model.safetensors")
    with pytest.raises(ConversionError, match="lm_head.weight is not a copy"):
        init_checkpoint(llm, vit, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_comes_along_with_the_extra_tokens(tmp_path: Path) -> None:
    from molmo2_nemo.data.tokenizer import Molmo2Tokenizer

    source = Molmo2Tokenizer.load("tiny")
    llm, vit = tmp_path / "llm", save_vit(tmp_path / "vit")
    import transformers

    config = transformers.Qwen3Config(**(SMALL | {"vocab_size": 1030}), **LLMS["qwen3_tied"])
    transformers.Qwen3ForCausalLM(config).save_pretrained(llm)
    plain = Path(str(Molmo2Tokenizer.load.__globals__["SHIPPED"]["tiny"]))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llm / name).write_text((plain / name).read_text())
    out = init_checkpoint(llm, vit, tmp_path / "out")
    made = Molmo2Tokenizer.load(out / "tokenizer")
    assert (made.vocab_size, made.special.im_start) == (1030, 1030)  # filled up to the table, extra tokens behind
    assert made.encode("two cats") == source.encode("two cats")
