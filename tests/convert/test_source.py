"""Folders as people have them: saved by transformers' `save_pretrained`, fine-tuned, saved twice, of mixed types."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from molmo2_nemo.cli.main import main
from molmo2_nemo.convert import export_checkpoint, import_checkpoint, init_checkpoint
from molmo2_nemo.convert.hf_config import config_json
from molmo2_nemo.convert.megatron_io import MegatronCheckpoint
from molmo2_nemo.convert.names import FORMATS, Format, canonical_shapes, external_shapes
from molmo2_nemo.data.tokenizer import SHIPPED
from molmo2_nemo.errors import ConversionError
from molmo2_nemo.model.config import Molmo2Config, preset
from tests.convert.test_checkpoints import FIXTURES, assert_same, load, make_source, notes, read_imported
from tests.convert.test_names import family

torch.set_num_threads(1)
HEAD = "lm_head.weight"
TABLES = ("model.transformer.wte.embedding", "model.transformer.wte.new_embedding")


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """A Hugging Face folder with one file of weights."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def random_tensors(config: Molmo2Config, written_as: Format) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = external_shapes(config, written_as)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def same_checkpoints(one: Path, other: Path) -> None:
    first, second = MegatronCheckpoint(one), MegatronCheckpoint(other)
    for name in canonical_shapes(read_imported(one)):
        assert torch.equal(first.read(name), second.read(name)), name


@pytest.mark.parametrize("fixture", ["qwen3_tied_odd", "olmo3"])
def test_plain_save_pretrained(tmp_path: Path, fixture: str) -> None:
    """transformers 5 wrote both: native names when asked, else the remote code's beside a native config.json."""
    plain = FIXTURES / fixture / "original"
    tables = [safetensors.torch.load_file(plain / "model.safetensors")[name] for name in TABLES]
    assert abs(len(tables[0]) - len(tables[1])) <= 1 and "vision_config" in (plain / "config.json").read_text()
    native = import_checkpoint(FIXTURES / fixture, tmp_path / "native")
    original = import_checkpoint(plain, tmp_path / "original")
    assert read_imported(native) == read_imported(original)
    same_checkpoints(native, original)
    assert notes(native) == notes(original) == []


@pytest.mark.parametrize("rows", [1, 57, 96, 200, 223])
def test_tables_cut_anywhere(tmp_path: Path, rows: int) -> None:
    """223 + 1 rows: 96 base rows and 128 extra ones."""
    config = replace(family("qwen3_untied"), text=replace(family("qwen3_untied").text, vocab_size=96))
    tensors = random_tensors(config, "remote")
    written = config_json(config, "remote", "float32")
    right = import_checkpoint(write(tmp_path / "hf", written, tensors), tmp_path / "right")
    joined = torch.cat([tensors[name] for name in TABLES])
    cut = dict(zip(TABLES, joined.split([rows, 224 - rows]), strict=True))
    same_checkpoints(right, import_checkpoint(write(tmp_path / "hf", written, tensors | cut), tmp_path / "cut"))
    short = dict(zip(TABLES, joined[:-1].split([rows, 223 - rows]), strict=True)) if rows < 223 else {}
    if short:
        with pytest.raises(ConversionError, match=r"wte\.\w+ in \S+ has shape \[\d+, 192\], expected"):
            import_checkpoint(write(tmp_path / "hf", written, tensors | short), tmp_path / "short")


@pytest.mark.parametrize("names", FORMATS)
@pytest.mark.parametrize("described", FORMATS)
def test_the_tensors_tell_the_format(tmp_path: Path, names: Format, described: Format) -> None:
    config = family("olmo3")
    tensors = random_tensors(config, names)
    folder = write(tmp_path / "hf", config_json(config, described, "float32"), tensors)
    export_checkpoint(import_checkpoint(folder, tmp_path / "megatron"), tmp_path / "back", format=names)
    assert_same(load(tmp_path / "back"), tensors)


def test_two_formats_at_once(tmp_path: Path) -> None:
    config = family("olmo3")
    tensors = random_tensors(config, "native") | random_tensors(config, "remote")
    folder = write(tmp_path / "hf", config_json(config, "native", "float32"), tensors)
    with pytest.raises(ConversionError, match=r"hf has tensors of more than one format: model\.\S+ and model\.\S+"):
        import_checkpoint(folder, tmp_path / "out")


@pytest.mark.parametrize("names", FORMATS)
def test_blocks_above_the_feature_layers(tmp_path: Path, names: Format) -> None:
    """A native config may have them, and then transformers builds and saves them; nothing reads their outputs."""
    config = family("qwen3_untied")  # 4 of 5 blocks are built
    deep = replace(config, vision=replace(config.vision, feature_layers=(*config.vision.feature_layers, -1)))
    wide = {name: shape for name, shape in external_shapes(deep, names).items() if "pooling" not in name}
    used = random_tensors(config, names)
    upper = {name: torch.ones(shape) for name, shape in wide.items() if name not in used}
    assert len(upper) == 16
    written = config_json(config, "native", "float32")
    written["vision_config"]["num_hidden_layers"] = 5
    done = import_checkpoint(write(tmp_path / "hf", written, used | upper), tmp_path / "megatron")
    export_checkpoint(done, tmp_path / "back", format=names)
    assert_same(load(tmp_path / "back"), used)
    [note] = notes(done)
    assert note.startswith("left out tensors ") and "13 more: blocks above the deepest feature layer" in note


@pytest.mark.parametrize("change", ["bits", "type", "values"])
def test_heads_that_are_almost_the_table(tmp_path: Path, change: str) -> None:
    """Equal in value: tied, and said. Bit by bit equal: tied, and nothing to say."""
    source = make_source(tmp_path / "made", preset("tiny"), "native", torch.bfloat16)
    table = "model.language_model.embed_tokens.weight"
    source[table][3, 5] = 0.0
    head = source[table][:1024].clone()
    if change == "bits":
        head[3, 5] = -0.0
    elif change == "type":
        head = head.float()
    else:
        head[3, 5] = 1e-30
    folder = write(tmp_path / "hf", config_json(preset("tiny"), "native", "bfloat16"), source | {HEAD: head})
    done = import_checkpoint(folder, tmp_path / "megatron")
    assert read_imported(done).text.tie_embeddings == (change != "values")
    [note] = notes(done)
    said = {"bits": "other signs of zeros", "type": "type torch.float32 and not", "values": "is not a copy"}
    assert said[change] in note


def test_mixed_types_lose_no_bit(tmp_path: Path) -> None:
    config = family("olmo3")
    tensors = random_tensors(config, "native")
    layer = "model.language_model.layers.{}.{}.weight"
    for i in (0, 1, 2):  # of four layers, which are stored as one tensor
        name = layer.format(i, "mlp.down_proj")
        tensors[name] = tensors[name].bfloat16()
    for name in (layer.format(1, "self_attn.q_proj"), "model.vision_tower.patch_embedding.bias"):
        tensors[name] = tensors[name].bfloat16()
    folder = write(tmp_path / "hf", config_json(config, "native", "float32"), tensors)
    done = import_checkpoint(folder, tmp_path / "megatron")
    back = load(export_checkpoint(done, tmp_path / "back"))
    for name, tensor in tensors.items():
        assert torch.equal(back[name].double(), tensor.double()), name
    assert back["model.vision_tower.patch_embedding.bias"].dtype == torch.bfloat16
    [note] = notes(done)
    assert note.startswith("stored in a wider type than torch.bfloat16") and "and 1 more" in note
    import_checkpoint(folder, tmp_path / "narrow", dtype=torch.bfloat16)
    assert notes(tmp_path / "narrow") == []


def test_left_over_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`save_pretrained` into a used folder leaves an index behind, or a single file. transformers reads the latter."""
    folder = tmp_path / "hf"
    shutil.copytree(FIXTURES / "qwen3_untied", folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.x": "model-00001-of-00002.safetensors"}}))
    assert main(["convert", "import", str(folder), str(tmp_path / "one")]) == 0
    assert "note: model.safetensors.index.json names files that are gone" in capsys.readouterr().out
    same_checkpoints(tmp_path / "one", import_checkpoint(FIXTURES / "qwen3_untied", tmp_path / "two"))
    stale = {name: tensor + 1 for name, tensor in load(folder).items()}
    index.write_text('{"weight_map": {}}')
    assert "model.safetensors.index.json names no tensors" in notes(import_checkpoint(folder, tmp_path / "four"))[0]
    (folder / "model.safetensors").rename(folder / "away")
    with pytest.raises(ConversionError, match="model.safetensors.index.json names no tensors"):
        import_checkpoint(folder, tmp_path / "five")
    (folder / "away").rename(folder / "model.safetensors")
    index.write_text(json.dumps({"weight_map": {"model.x": "model-00001-of-00002.safetensors"}}))
    safetensors.torch.save_file(stale, folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ConversionError, match="holds two sets of weights, model.safetensors and the 1 file that"):
        import_checkpoint(folder, tmp_path / "three")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(stale, "model.safetensors")}))
    same_checkpoints(tmp_path / "one", import_checkpoint(folder, tmp_path / "three"))


def test_settings_beside_the_weights_come_along(tmp_path: Path) -> None:
    """Settings of generation as they are; of preprocessing, what differs from the published ones."""
    folder = tmp_path / "hf"
    make_source(folder, preset("tiny"), "native", torch.float32)
    generation = {"eos_token_id": [3, 5], "temperature": 0.7, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    image = {"max_crops": 24, "overlap_margins": [1, 1], "pooling_size": [2, 2], "patch_size": 14}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"num_frames": 64, "max_fps": 2}))
    out = export_checkpoint(import_checkpoint(folder, tmp_path / "megatron"), tmp_path / "out")
    assert json.loads((out / "generation_config.json").read_text()) == generation
    written = {name: json.loads((out / f"{name}preprocessor_config.json").read_text()) for name in ("", "video_")}
    assert (written[""]["max_crops"], written[""]["overlap_margins"]) == (24, [1, 1])
    assert (written["video_"]["num_frames"], written["video_"]["max_fps"]) == (64, 2)
    # transformers 5 writes both processors into one file
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).unlink()
    both = {"image_processor": image, "video_processor": {"num_frames": 64}}
    (folder / "processor_config.json").write_text(json.dumps(both))
    import_checkpoint(folder, tmp_path / "megatron", overwrite=True)
    again = export_checkpoint(tmp_path / "megatron", tmp_path / "again")
    assert (again / "preprocessor_config.json").read_text() == (out / "preprocessor_config.json").read_text()


def test_what_a_processor_asks_for_in_vain_is_said(tmp_path: Path) -> None:
    """Written by an export: nothing to say. Other numbers or flags: one note each; those that follow are kept."""
    folder = export_checkpoint(import_checkpoint(FIXTURES / "olmo3", tmp_path / "one"), tmp_path / "hf")
    assert notes(import_checkpoint(folder, tmp_path / "two")) == []
    image = json.loads((folder / "preprocessor_config.json").read_text())
    changes: dict[str, Any] = {
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": None,
        "size": {"height": 10, "width": 10},
        "patch_size": 16,
        "do_normalize": False,
        "rescale_factor": 0.00392156862745098,
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(image | changes))
    (folder / "processor_config.json").write_text(
        json.dumps({"video_use_col_tokens": True, "use_frame_special_tokens": True})
    )
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"frame_sample_mode": "fps"}))
    done = import_checkpoint(folder, tmp_path / "three")
    assert [note.split(" is ")[0] for note in notes(done)] == [
        "processor_config.json: video_use_col_tokens",
        "preprocessor_config.json: resample",
        "preprocessor_config.json: do_normalize",
        "preprocessor_config.json: image_mean",
        "preprocessor_config.json: size",
        "preprocessor_config.json: patch_size",
        "video_preprocessor_config.json: frame_sample_mode",
    ]
    again = export_checkpoint(done, tmp_path / "again")
    assert json.loads((again / "processor_config.json").read_text())["use_frame_special_tokens"] is True


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "preprocessor_config.json"])
def test_a_folder_or_a_dead_link_of_a_files_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(FIXTURES / "qwen3_untied", folder)
    (folder / name).mkdir()
    with pytest.raises(ConversionError, match=f"{name} is a folder, expected a file"):
        import_checkpoint(folder, tmp_path / "out")
    (folder / name).rmdir()
    (folder / name).symlink_to("gone")
    with pytest.raises(ConversionError, match=f"{name} is a link to a file that is not there"):
        import_checkpoint(folder, tmp_path / "out")


def test_part_of_a_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(FIXTURES / "qwen3_untied", folder)
    (folder / "tokenizer_config.json").write_text("{}")
    done = import_checkpoint(folder, tmp_path / "out")
    assert notes(done) == ["tokenizer_config.json is there without tokenizer.json: imported without a tokenizer"]
    assert not (done / "tokenizer").exists()
    export_checkpoint(done, tmp_path / "back")
    make_source(tmp_path / "tiny", preset("tiny"), "native", torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SHIPPED["tiny"] / name, tmp_path / "tiny" / name)
    assert (import_checkpoint(tmp_path / "tiny", tmp_path / "whole") / "tokenizer" / "tokenizer_config.json").is_file()
    (tmp_path / "tiny" / "tokenizer_config.json").write_text("[3]")
    with pytest.raises(ConversionError, match="tiny has a tokenizer that cannot be used"):
        import_checkpoint(tmp_path / "tiny", tmp_path / "never")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ["5"]}, r"molmo2.json is damaged: name is \['5'\], expected a string"),
        ({"tie_embeddings": "no"}, "molmo2.json is damaged: tie_embeddings is 'no', expected true or false"),
        ({"visual_attention": []}, r"damaged: visual_attention is \[\], expected 'image_tokens' or"),
        ({"config": None}, "damaged: config is null, expected an object"),
        ({"config": {"model_type": "x"}}, r"molmo2.json is damaged: \S*model_type is 'x'"),
        ({"preprocessing": {"image": {"pool": 0}}}, r"preprocessing.image.pool is 0, expected an integer from 1"),
        ({"preprocessing": {"video": {"max_frames": "8"}}}, r"preprocessing.video.max_frames is '8', expected"),
        ({"preprocessing": {"image": {"margin": 500}}}, "margin 500 do not fit"),
    ],
)
def test_fields_of_the_record_of_an_import(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    done = import_checkpoint(FIXTURES / "olmo3", tmp_path / "megatron")
    data = json.loads((done / "molmo2.json").read_text())
    (done / "molmo2.json").write_text(json.dumps(data | change))
    with pytest.raises(ConversionError, match=message) as caught:
        export_checkpoint(done, tmp_path / "out")
    assert "ConversionError" not in str(caught.value) and "\n" not in str(caught.value)


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_source_is_never_replaced(tmp_path: Path) -> None:
    hf, outer = tmp_path / "outer" / "hf", tmp_path / "outer"
    shutil.copytree(FIXTURES / "olmo3", hf)
    done = import_checkpoint(hf, outer / "megatron")
    (tmp_path / "link").symlink_to(hf)
    before = everything(outer)
    for target in (hf, outer, hf / "new", hf / "original", tmp_path / "link", hf / ".." / "hf"):
        with pytest.raises(ConversionError, match="the target .* the source .*name another folder"):
            import_checkpoint(hf, target, overwrite=True)
        with pytest.raises(ConversionError, match="the target .* the source .*name another folder"):
            init_checkpoint(FIXTURES / "llm", hf, target, overwrite=True)
    for target in (done, outer, done / "weights"):
        with pytest.raises(ConversionError, match="the target .* the source .*name another folder"):
            export_checkpoint(done, target, overwrite=True)
    assert everything(outer) == before
    for _ in range(2):  # NeMo exports into the checkpoint
        export_checkpoint(done, done / "hf", overwrite=True)
    assert before.items() <= everything(outer).items()
    import_checkpoint(hf, done, overwrite=True)  # a neighbour may be replaced


@pytest.mark.parametrize("preprocessing", [3, [1], {"image": 3}, {"video": ["x"]}])
def test_a_damaged_record_of_preprocessing(tmp_path: Path, preprocessing: Any) -> None:
    done = import_checkpoint(FIXTURES / "olmo3", tmp_path / "megatron")
    data = json.loads((done / "molmo2.json").read_text())
    (done / "molmo2.json").write_text(json.dumps(data | {"preprocessing": preprocessing}))
    with pytest.raises(ConversionError, match="molmo2.json is damaged: preprocessing is"):
        export_checkpoint(done, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("generation_config.json", "[]", "generation_config.json holds a list"),
        ("preprocessor_config.json", '{"max_crops": "many"}', "max_crops is 'many', expected an integer"),
        ("preprocessor_config.json", '{"overlap_margins": [1, 2]}', "expected a list of two equal integers"),
        ("preprocessor_config.json", '{"overlap_margins": [9, 9]}', "margin 9 do not fit"),
        (
            "preprocessor_config.json",
            '{"pooling_size": [0, 0]}',
            "pooling_size is .0, 0., expected twice an integer from 1",
        ),
        (
            "preprocessor_config.json",
            '{"pooling_size": [99, 99]}',
            "pooling_size is .99, 99., expected twice an integer",
        ),
        ("preprocessor_config.json", '{"overlap_margins": [-1, -1]}', "expected twice an integer of at least 0"),
        (
            "preprocessor_config.json",
            '{"max_crops": 100000000000}',
            "max_crops is 100000000000, expected an integer from",
        ),
        (
            "video_preprocessor_config.json",
            '{"num_frames": 100000000000}',
            "num_frames is 1.*, expected an integer from",
        ),
        ("video_preprocessor_config.json", '{"pooling_size": [99, 99]}', "pooling_size is .99, 99., expected twice"),
        (
            "video_preprocessor_config.json",
            '{"max_fps": 1e300}',
            "max_fps is 1e.300, expected a number above 0, at most",
        ),
        (
            "processor_config.json",
            '{"video_processor": {"num_frames": 0}}',
            "video_processor: num_frames is 0, expected",
        ),
        ("processor_config.json", '{"use_frame_special_tokens": 1}', "use_frame_special_tokens is 1, expected true or"),
        ("tokenizer.json", "{}", "a tokenizer that cannot be used, .*tokenizer.json is not a tokenizer file"),
        ("processor_config.json", '{"image_processor": 3}', "image_processor is a int, expected an object"),
        ("video_preprocessor_config.json", '{"max_fps": 0}', "max_fps is 0, expected a number above 0"),
        ("config.json", "[" * 100_000, "nested too deeply"),
        ("model.safetensors.index.json", "[" * 100_000, "nested too deeply"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 3}}', "it has no weight_map of names and files"),
    ],
)
def test_damaged_files_end_in_one_line(tmp_path: Path, file: str, content: str, message: str) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(FIXTURES / "qwen3_untied", folder)
    (folder / file).write_text(content)
    with pytest.raises(ConversionError, match=message):
        import_checkpoint(folder, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
