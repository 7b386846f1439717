"""Records are checked with the settings of the run that they are for, and the limits used are printed."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from data_prep.estimate import image_cost
from data_prep.run_limits import changed, in_words
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.config import DataConfig, ImageConfig
from molmo2_nemo.data.manifest import MANIFEST, read_head
from molmo2_nemo.data.reader import ExampleReader, Skipped, default_builder
from molmo2_nemo.settings.compose import compose
from tests.support.source_rows import png


@pytest.fixture
def folder(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (90, 80, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(file.getvalue()[:-900])
    (tmp_path / "whole.jpg").write_bytes(file.getvalue())
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(30 + i, 20))
    lines = [
        {"key": "whole", "image": "whole.jpg", "caption": "x"},
        {"key": "cut", "image": "cut.jpg", "caption": "x"},
        {"key": "six", "images": [f"{i}.png" for i in range(6)], "caption": "x"},
    ]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def prepare(folder, *options):
    arguments = ["prepare", str(folder / "my.jsonl"), "--out", str(folder / "out"), "--workers", "0", "--overwrite"]
    status = main([*arguments, *options])
    path = folder / "out" / "my" / "skipped.jsonl"
    return status, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trained(folder, config):
    """Keys of the records that the loader of training reads, or the cause why not."""
    from molmo2_nemo.data.config import SourceConfig

    config.sources = {"my": SourceConfig(path=str(folder / "out" / "my"))}
    builder, im_patch = default_builder(config)
    reader = ExampleReader(config, builder, im_patch)
    found = [reader[n] for n in range(len(reader.datasets["my"]))]
    return {e.key.partition(":")[2]: e.cause if isinstance(e, Skipped) else "" for e in found}


@pytest.mark.parametrize("option", [["--truncated", "skip"], ["--for", "data.image.truncated=skip"]])
def test_cut_pictures_are_skipped_as_the_run_skips_them(folder, option, capsys):
    status, skipped = prepare(folder)
    said = capsys.readouterr().out
    assert status == 0 and not skipped and "loaded as far as it goes (the first: cut)" in said
    assert "cut pictures loaded (the default limits" in said
    config = DataConfig(image=ImageConfig(truncated="skip"))
    assert trained(folder, config)["cut"] == "bad media"  # what prepare said nothing of
    status, skipped = prepare(folder, *option)
    said = capsys.readouterr().out
    assert status == 0 and "cut pictures skipped (the limits asked for)" in said
    assert [(s["key"], s["line"], s["field"], s["expected"]) for s in skipped] == [
        ("cut", 2, "image", "an image that training reads")
    ]
    assert set(trained(folder, config).values()) == {""}


def test_limits_of_a_recipe_are_those_of_the_run(folder, capsys):
    assert prepare(folder, "--for", "recipe=8b", "stage=long")[0] == 0
    packing = compose(["recipe=8b", "stage=long"]).data.packing
    said = capsys.readouterr().out
    assert f"384 frames (2 a second), packs of {packing.sequence_length:,} tokens" in said
    assert "images after the first 5" in said
    assert prepare(folder, "--for", "data.image.max_images=6")[0] == 0
    assert "images after the first" not in capsys.readouterr().out


def test_what_no_pack_holds_is_skipped_as_in_training(folder, capsys):
    """Oracle: the loader of training with the same settings."""
    sizes = [(30 + i, 20) for i in range(6)]
    tokens, crops = image_cost(sizes, compose([]).data.image)
    small = {"data.packing.max_crops": crops - 1, "data.packing.sequence_length": tokens + 1000}
    short = {"data.packing.max_crops": crops, "data.packing.sequence_length": tokens - 1}
    for limits in (small, short):
        status, skipped = prepare(folder)
        config = compose([f"{name}={value}" for name, value in limits.items()]).data
        config.groups, config.tokenizer, config.vocab_size = {}, "tiny", None
        assert {key for key, cause in trained(folder, config).items() if cause == "too long"} == {"six"}
        status, skipped = prepare(folder, "--for", *(f"{name}={value}" for name, value in limits.items()))
        said = capsys.readouterr().out
        assert (
            status == 0 and [s["key"] for s in skipped] == ["six"] and "data.packing.max_crops" in said + str(skipped)
        )


def test_check_and_index_ask_for_the_same(folder, capsys):
    assert prepare(folder)[0] == 0
    out = str(folder / "out" / "my")
    assert main(["shards", "check", out, "--workers", "0"]) == 0
    assert "the default limits" in capsys.readouterr().out
    assert main(["shards", "check", out, "--workers", "0", "--truncated", "skip"]) == 2
    said = capsys.readouterr().out
    assert "my-000000.tar:cut: image cannot be decoded" in said and "cut pictures skipped" in said
    assert main(["shards", "check", out, "--workers", "0", "--json", "--truncated", "skip"]) == 2
    found = map(json.loads, capsys.readouterr().out.splitlines())
    (line,) = [one for one in found if one["reason"] == "problem"]
    assert (line["folder"], line["shard"], line["member"]) == (out, "my-000000.tar", "cut.0.jpg")
    assert line["field"] == "images[0]" and line["seen"] and line["expected"] == "an image that training reads"
    assert main(["shards", "index", out, "--truncated", "skip"]) == 0
    assert read_head(folder / "out" / "my" / MANIFEST)["records"] == 2
    listed = [json.loads(line) for line in (folder / "out" / "my" / "skipped.jsonl").read_text().splitlines()]
    assert listed[-1].items() >= {"key": "cut", "member": "cut.0.jpg", "field": "images[0]"}.items()


def test_only_what_limits_records_is_kept_with_the_data_set(folder, capsys):
    usual = DataConfig()
    usual.seed, usual.packing.buffer_size, usual.video.decoder = 3, 7, "torchcodec"
    assert changed(usual) == {} and "the default limits; those of the run, too" in in_words(usual)
    assert "the default limits; --for recipe=8b stage=long: a run's" in in_words(DataConfig(tokenizer=""))
    assert prepare(folder)[0] == 0
    arguments = ["prepare", str(folder / "my.jsonl"), "--out", str(folder / "out"), "--workers", "0"]
    assert main(arguments) == 0 and "is there already" in capsys.readouterr().out
    assert main([*arguments, "--truncated", "skip"]) == 2
    assert "image.truncated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prepare", "my.jsonl", "--out", "x", "--for", "more.jsonl"], "--for more.jsonl: settings are written key="),
        (["prepare", "my.jsonl", "--out", "x", "--for", "recipe=9b"], "unknown choice recipe=9b"),
        (["prepare", "my.jsonl", "--out", "x", "--config-dir", "."], "--config-dir belongs to --for"),
        (["shards", "stats", ".", "--truncated", "skip"], "not to stats"),
        (["shards", "index", ".", "--json"], "--json belongs to molmo2 shards check"),
    ],
)
def test_errors_of_the_options(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err
