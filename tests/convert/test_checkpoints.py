"""Whole folders: Hugging Face -> Megatron -> Hugging Face, and everything that must be refused."""

from __future__ import annotations

import enum
import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.distributed import checkpoint as dcp

from molmo2_nemo.convert import export_checkpoint, import_checkpoint
from molmo2_nemo.convert.hf_config import config_json, read_model_config
from molmo2_nemo.convert.megatron_io import MegatronCheckpoint
from molmo2_nemo.convert.names import FORMATS, Format, canonical_shapes, external_shapes
from molmo2_nemo.convert.safetensors_io import SafetensorsFolder
from molmo2_nemo.errors import ConversionError
from molmo2_nemo.model.config import Molmo2Config, preset
from tests.convert.test_names import FAMILIES, family

torch.set_num_threads(1)
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
SMALL = ("qwen3_tied", "qwen3_tied_odd", "qwen3_untied", "olmo3", "olmo3_gqa")


def make_source(folder: Path, config: Molmo2Config, written_as: Format, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A Hugging Face folder with random weights, written by the safetensors library in two shards."""
    generator = torch.Generator().manual_seed(0)
    shapes = external_shapes(config, written_as)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    if config.text.tie_embeddings:
        table = (
            "model.language_model.embed_tokens.weight" if written_as == "native" else "model.transformer.wte.embedding"
        )
        tensors["lm_head.weight"] = tensors[table][: config.text.vocab_size].clone()
    folder.mkdir()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        safetensors.torch.save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config_json(config, written_as, "float32")))
    return tensors


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= safetensors.torch.load_file(file)
    return tensors


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("written_as", FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_export_of_import_is_bit_identical(tmp_path: Path, name: str, written_as: Format, dtype: torch.dtype) -> None:
    config = family(name)
    source = make_source(tmp_path / "hf", config, written_as, dtype)
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", format=written_as, tokenizer="tiny")
    assert_same(load(tmp_path / "back"), source)
    # and through the other format
    other: Format = "remote" if written_as == "native" else "native"
    export_checkpoint(tmp_path / "megatron", tmp_path / "other", format=other, max_shard_bytes=1_000_000)
    assert SafetensorsFolder(tmp_path / "other").tensors.keys() == external_shapes(config, other).keys()
    import_checkpoint(tmp_path / "other", tmp_path / "megatron2")
    first, second = MegatronCheckpoint(tmp_path / "megatron"), MegatronCheckpoint(tmp_path / "megatron2")
    for key in canonical_shapes(config):
        assert first.dtype(key) == second.dtype(key) == dtype, key
        assert torch.equal(first.read(key), second.read(key)), key


@pytest.mark.parametrize("fixture", SMALL)
def test_transformers_weights_survive(tmp_path: Path, fixture: str) -> None:
    import_checkpoint(FIXTURES / fixture, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same(load(tmp_path / "back"), load(FIXTURES / fixture))
    assert read_model_config(tmp_path / "back") == read_model_config(FIXTURES / fixture)
    tied = json.loads((FIXTURES / fixture / "fixture.json").read_text())["tied"]
    assert ("output_layer.weight" in canonical_shapes(read_imported(tmp_path / "megatron"))) != tied


def notes(folder: Path) -> list[str]:
    """What an import had to say."""
    return json.loads((folder / "molmo2.json").read_text())["notes"]


def read_imported(folder: Path) -> Molmo2Config:
    from molmo2_nemo.convert.checkpoints import read_model_file

    config = read_model_file(folder)
    assert config is not None
    return config


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_itself_reads_what_we_write(tmp_path: Path) -> None:
    """The distributed checkpoint is torch's own format: its public reader finds the same values."""
    import_checkpoint(FIXTURES / "olmo3", tmp_path / "megatron", dtype=torch.float32)
    ours = MegatronCheckpoint(tmp_path / "megatron")
    state = {key: torch.zeros(tuple(entry.size)) for key, entry in ours.tensors.items()}
    dcp.load(state, checkpoint_id=tmp_path / "megatron" / "weights", no_dist=True)
    for name in canonical_shapes(read_imported(tmp_path / "megatron")):
        key, layer = ours.locate(name)
        assert torch.equal(state[key] if layer is None else state[key][layer], ours.read(name)), name


@pytest.mark.parametrize("written_as", FORMATS)
def test_the_folder_has_what_transformers_expects(tmp_path: Path, written_as: Format) -> None:
    make_source(tmp_path / "hf", preset("tiny"), written_as, torch.float32)
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    out = export_checkpoint(tmp_path / "megatron", tmp_path / "out", format=written_as, dtype=torch.bfloat16)
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "SHA256SUMS",
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "processor_config.json",
        "generation_config.json",
        "README.md",
        "chat_template.jinja",
    }
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    image = json.loads((out / "preprocessor_config.json").read_text())
    assert (image["size"]["height"], image["overlap_margins"], image["pooling_size"]) == (126, [2, 2], [2, 2])
    assert ("auto_map" in image) == (written_as == "remote")


@pytest.mark.parametrize("written_as", FORMATS)
def test_an_untied_fine_tune_of_a_tied_model(tmp_path: Path, written_as: Format) -> None:
    source = make_source(tmp_path / "hf", preset("tiny"), written_as, torch.float32)
    head = source["lm_head.weight"] + 1
    for file in (tmp_path / "hf").glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        if "lm_head.weight" in tensors:
            safetensors.torch.save_file(tensors | {"lm_head.weight": head}, file)
    with pytest.raises(ConversionError, match=r"lm_head.weight is not a copy"):
        import_checkpoint(tmp_path / "hf", tmp_path / "megatron", tie_embeddings=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    assert torch.equal(MegatronCheckpoint(tmp_path / "megatron").read("output_layer.weight"), head)
    assert read_imported(tmp_path / "megatron").name == "custom"
    [note] = notes(tmp_path / "megatron")
    assert "lm_head.weight is not a copy" in note and "not the 'tiny' that recipes train" in note
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", format=written_as)
    assert_same(load(tmp_path / "back"), source | {"lm_head.weight": head})


def test_bad_sources_write_nothing(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    shutil.copytree(FIXTURES / "qwen3_untied", source)
    tensors = {name: tensor.clone() for name, tensor in load(source).items()}

    def refuse(changed: dict[str, torch.Tensor] | None, message: str) -> None:
        if changed is not None:
            safetensors.torch.save_file(changed, source / "model.safetensors")
        with pytest.raises(ConversionError, match=message):
            import_checkpoint(source, tmp_path / "out")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]

    name = "model.language_model.layers.1.mlp.up_proj.weight"
    refuse({k: v for k, v in tensors.items() if k != name}, f"lacks tensor {name}")
    refuse(tensors | {"model.extra": torch.zeros(1)}, "has tensor model.extra")
    refuse(tensors | {name: tensors[name].T.contiguous()}, rf"{name} in \S+ has shape \[40, 64\], expected \[64, 40\]")
    file, text = source / "model.safetensors", (source / "config.json").read_text()
    safetensors.torch.save_file(tensors, file)
    whole = file.read_bytes()
    for family_of_config in ("llama", "molmo"):
        (source / "config.json").write_text(json.dumps(json.loads(text) | {"model_type": family_of_config}))
        refuse(tensors, f"config.json: model_type is '{family_of_config}', expected 'molmo2'")
    (source / "config.json").write_text(text)

    file.write_bytes(whole[:-1000])
    refuse(None, r"model.safetensors is truncated: model\.\S+ should end at byte")
    file.write_bytes(whole[:1000])
    refuse(None, "its header is cut off")
    file.unlink()
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")})
    )
    refuse(None, "names model-00001-of-00001.safetensors, which does not exist")
    (source / "model.safetensors.index.json").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    refuse(None, "pickled weights only")


def test_existing_targets_are_kept_unless_asked(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("x")
    with pytest.raises(ConversionError, match="already exists"):
        import_checkpoint(FIXTURES / "olmo3", target)
    assert (target / "precious").is_file()
    import_checkpoint(FIXTURES / "olmo3", target, overwrite=True)
    assert sorted(p.name for p in target.iterdir()) == ["molmo2.json", "weights"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


class Evil:
    """A pickle that would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class OldPickler(pickle.Pickler):
    """Pickles as Python 3.11.0 to 3.11.3 did."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_checkpoints_of_other_pythons(tmp_path: Path) -> None:
    checkpoint = tmp_path / "megatron"
    import_checkpoint(FIXTURES / "olmo3", checkpoint)
    export_checkpoint(checkpoint, tmp_path / "one")
    path, old = checkpoint / "weights" / ".metadata", io.BytesIO()
    OldPickler(old).dump(pickle.loads(path.read_bytes()))
    assert b"getattr" in old.getvalue() and old.getvalue() != path.read_bytes()
    path.write_bytes(old.getvalue())
    export_checkpoint(checkpoint, tmp_path / "other")
    for file in (tmp_path / "one").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()
    for kind, name in ((Path, "touch"), (str, "format")):
        path.write_bytes(pickle.dumps(Attribute(kind, name)))
        with pytest.raises(ConversionError, match="refused to load"):
            export_checkpoint(checkpoint, tmp_path / "never")


class Attribute:
    """Pickles as getattr(kind, name)."""

    def __init__(self, kind: type, name: str) -> None:
        self.parts = (kind, name)

    def __reduce__(self):
        return getattr, self.parts


def test_bad_checkpoints(tmp_path: Path) -> None:
    checkpoint = tmp_path / "megatron"
    import_checkpoint(FIXTURES / "olmo3", checkpoint)
    weights, out = checkpoint / "weights", tmp_path / "out"

    def refuse(message: str) -> None:
        with pytest.raises(ConversionError, match=message):
            export_checkpoint(checkpoint, out)
        assert sorted(p.name for p in tmp_path.iterdir() if p.name != "trap") == ["megatron"]

    data = weights / "__0_0.distcp"
    kept = data.read_bytes()
    data.write_bytes(kept[:-60_000])
    refuse(r"__0_0.distcp is truncated: module\.\S+ should end at byte")
    data.write_bytes(kept[:500] + bytes(500) + kept[1000:])
    refuse("__0_0.distcp is damaged where it should hold module.vision")
    data.unlink()
    refuse("__0_0.distcp is missing")
    data.write_bytes(kept)

    pickled = (weights / ".metadata").read_bytes()
    (weights / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "trap")))
    refuse("refused to load")
    assert not (tmp_path / "trap").exists()
    (weights / ".metadata").write_bytes(pickled[:-100])
    refuse(r".metadata is damaged")
    (weights / ".metadata").unlink()
    refuse(r".metadata is missing")
    (weights / "metadata.json").unlink()
    refuse("metadata.json is missing or damaged")


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    import_checkpoint(FIXTURES / "olmo3", tmp_path / "megatron")
    (tmp_path / "megatron" / "molmo2.json").unlink()
    with pytest.raises(ConversionError, match=r"not a checkpoint of any known Molmo2(.|\n)*tiny: (.|\n)*8b: "):
        export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    with pytest.raises(ConversionError, match=r"does not exist; expected a Megatron checkpoint"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "out")


def test_the_wrong_tokenizer(tmp_path: Path) -> None:
    import_checkpoint(FIXTURES / "olmo3", tmp_path / "megatron")
    with pytest.raises(ValueError, match="base embedding rows|base rows"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "out", tokenizer="tiny")
