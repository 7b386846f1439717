"""The preview shows what training gets: the loader's packs, the predicate's mask, the pooling's windows."""

import base64
import html
import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import ImageConfig, PhaseConfig, SourceConfig
from molmo2_nemo.data.loader import PackStream
from molmo2_nemo.data.resize import patchify
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.errors import DataError
from molmo2_nemo.preview import collect, draw
from molmo2_nemo.preview.page import write_pages
from molmo2_nemo.settings.compose import compose
from tests.support.pictures import encode_image

torch.set_num_threads(1)
HOSTILE = '</div><script>alert("x")</script> <im_patch> & \u2028'


def jpeg(width, height, seed=0):
    out = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, "JPEG")
    return out.getvalue()


def annotation(question, answer):
    return {"style": "user_qa", "question": question, "answer": answer}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preview") / "mine"
    tree = {"images": ["0.jpg"], "annotations": [annotation("a?", "b"), annotation(HOSTILE, HOSTILE)]}
    two = {"images": ["0.jpg", "1.jpg"], "annotations": [annotation("same?", "no")]}
    text = {"annotations": [annotation("count", "one two")]}
    records = [
        ("tree", {"json": json.dumps(tree).encode(), "0.jpg": jpeg(300, 150)}),
        ("two", {"json": json.dumps(two).encode(), "0.jpg": jpeg(90, 90), "1.jpg": jpeg(60, 200, 1)}),
        ("text", {"json": json.dumps(text).encode()}),
    ]
    write_shards(folder, records)
    return folder


def config(shards):
    cfg = compose(["recipe=tiny", "stage=sft"])
    cfg.data.sources = {"mine": SourceConfig(str(shards))}
    return cfg


def test_packs_are_those_of_the_loader(shards):
    cfg = config(shards)
    views = collect.packs(cfg, 3)
    stream = iter(PackStream(cfg.data, micro_batch_size=1, dp_rank=0, dp_size=1))
    for view in views:
        batch = next(stream)
        np.testing.assert_array_equal(view.batch.input_ids, batch.input_ids)
        np.testing.assert_array_equal(view.batch.crops, batch.crops)
        assert [part.example.key for part in view.parts] == batch.keys[0]
        joined = np.concatenate([part.example.loss_weights for part in view.parts])
        np.testing.assert_array_equal(batch.loss_weights[0, : len(joined)], joined)


def test_packs_of_another_rank_and_of_phases(shards):
    """Each rank has its own; where packs grow within a stage the first ones are short and built with few frames."""
    cfg = config(shards)
    cfg.data.progression = [PhaseConfig(1, 300, 8, 2)]
    cfg.stage.global_batch_size = 2
    keys = []
    for rank in range(2):
        stream = iter(PackStream(collect.in_process(cfg), micro_batch_size=1, dp_rank=rank, dp_size=2))
        views = collect.packs(cfg, 3, rank, 2)
        assert [v.budget[0] for v in views] == [300, cfg.data.packing.sequence_length, cfg.data.packing.sequence_length]
        for view in views:
            batch = next(stream)
            np.testing.assert_array_equal(view.batch.input_ids, batch.input_ids)
            assert view.title.endswith(f"rank {rank} of 2")
        keys.append([v.batch.keys for v in views])
    assert keys[0] != keys[1]


def test_visual_ids_begin_behind_the_models_rows(shards, monkeypatch):
    """A tokenizer with fewer entries than the model has rows is filled up, as the trainer does."""
    cfg = config(shards)
    small = Molmo2Tokenizer.load("tiny").vocab_size
    monkeypatch.setattr(
        "molmo2_nemo.settings.run.preset", lambda name: SimpleNamespace(text=SimpleNamespace(vocab_size=small + 56))
    )
    assert collect.tokenizer_of(cfg).vocab_size == small + 56
    view = collect.record(cfg, "tree")
    assert set(view.batch.input_ids[view.batch.visual] - small - 56) <= {0, 1, 2, 3, 4}
    assert (view.mask(small + 56, "image_tokens").visual_block[0].numpy() > 0).sum() == view.batch.visual.sum()


def test_unpatchify_inverts_patchify():
    crops = np.random.default_rng(0).integers(0, 256, (3, 126, 126, 3), dtype=np.uint8)
    np.testing.assert_array_equal(draw.unpatchify(patchify(crops, 14)), crops)


def test_windows_of_a_tiled_picture():
    tokenizer = Molmo2Tokenizer.load("tiny")
    config = ImageConfig(crop_size=126, margin=2, max_crops=2)
    root = encode_image(np.zeros((126, 300, 3), np.uint8), config, tokenizer, max_crops=2)
    windows = draw.window_map(root.pooling, len(root.crops), 81)
    assert (windows[0] >= 0).all()  # the global view is pooled whole
    assert (windows[1][:, :7] >= 0).all() and (windows[1][:, 7:] < 0).all()  # left tile: its right margin is cut
    assert (windows[2][:, :2] < 0).all() and (windows[2][:, 2:] >= 0).all()
    for row, slots in enumerate(root.pooling):
        assert set(windows.reshape(-1)[slots[slots >= 0]]) == {row}


@pytest.mark.parametrize("side", [1000, 40, 13])
@pytest.mark.parametrize("visual_attention", ["image_tokens", "within_image", "none"])
def test_mask_image_against_the_predicate(side, visual_attention):
    """White exactly where no pair of the square is allowed, at full size and downsampled."""
    rng = np.random.default_rng(side)
    length = 97
    example = np.sort(rng.integers(0, 3, length))
    branch = np.where(np.arange(length) % 30 < 14, -1, rng.integers(0, 3, length))
    block = np.where(branch < 0, rng.integers(0, 3, length), 0)
    mask = TokenMask(*(torch.from_numpy(v[None]) for v in (example, branch, block)), visual_attention)
    dense = mask.rows(0, length)[0].numpy()
    picture = draw.mask_image(mask, length, branch, side=side)
    cell = -(-length // side)
    cells = -(-length // cell)
    assert picture.shape == (cells, cells, 3)
    padded = np.zeros((cells * cell, cells * cell), bool)
    padded[:length, :length] = dense
    any_pair = padded.reshape(cells, cell, cells, cell).any((1, 3))
    np.testing.assert_array_equal((picture != 255).any(-1), any_pair)
    if cell == 1:
        both = dense & (block[:, None] > 0) & (block[None] > 0)
        assert (picture[both] == draw.rgb(draw.VISUAL)).all()
        root = dense & ~both & (branch[None] < 0)
        assert (picture[root] == draw.rgb(draw.ROOT)).all()
        second = dense & (branch[None] == 1)
        assert (picture[second] == draw.rgb(draw.BRANCHES[1])).all()


@pytest.mark.parametrize("side", [97, 40, 13])
def test_mask_image_mixes_colours_by_pairs(side):
    """Every pair of tokens painted on its own."""
    length, rng = 97, np.random.default_rng(side)
    branch = np.where(np.arange(length) < 50, -1, np.arange(length) // 12 % 4)
    block = np.where((branch < 0) & (np.arange(length) % 17 > 2), 1, 0)
    example = np.sort(rng.integers(0, 2, length))
    mask = TokenMask(*(torch.from_numpy(v[None]) for v in (example, branch, block)))
    cell = -(-length // side)
    cells = -(-length // cell)
    total, count, area = np.zeros((cells, cells, 3)), np.zeros((cells, cells)), np.zeros((cells, cells))
    dense = mask.rows(0, length)[0].numpy()
    for q, k in np.ndindex(length, length):
        colour = draw.VISUAL if block[q] and block[k] else draw.ROOT if branch[k] < 0 else draw.BRANCHES[branch[k]]
        total[q // cell, k // cell] += np.array(draw.rgb(colour)) * dense[q, k]
        count[q // cell, k // cell] += dense[q, k]
        area[q // cell, k // cell] += 1
    strength = np.where(count > 0, 0.25 + 0.75 * count / area, 0)[..., None]
    expected = 255 * (1 - strength) + total / np.maximum(count, 1)[..., None] * strength
    got = draw.mask_image(mask, length, branch, side=side).astype(float)
    assert np.abs(got - expected).max() < 0.51


def test_each_record_is_decoded_once(tmp_path, monkeypatch):
    """A set of one record, which the packer sees many times before it makes a pack."""
    picture = io.BytesIO()
    Image.new("RGB", (300, 200), "red").save(picture, "JPEG")
    content = {"images": ["jpg"], "annotations": [{"style": "long_caption", "text": "red"}]}
    write_shards(tmp_path / "one", [("red", {"json": json.dumps(content).encode(), "jpg": picture.getvalue()})])
    cfg = config(tmp_path)
    cfg.data.sources = {"one": SourceConfig(path=str(tmp_path / "one"))}
    decoded, decode = [], ExampleBuilder.decode
    monkeypatch.setattr(
        ExampleBuilder, "decode", lambda self, record, *a: decoded.append(1) or decode(self, record, *a)
    )
    (view,) = collect.packs(cfg, 1)
    assert 0 < len(decoded) == len(view.parts) < cfg.data.packing.buffer_size
    assert all(part.example.num_crops > 0 for part in view.parts)
    np.testing.assert_array_equal(np.concatenate([part.example.crops for part in view.parts]), view.batch.crops)


def test_page_is_self_contained_and_escapes_the_data(shards, tmp_path):
    cfg = config(shards)
    views = collect.packs(cfg, 2)
    paths = write_pages(views, cfg, collect.tokenizer_of(cfg), tmp_path / "out", "about <b>")
    text = paths[0].read_text()
    assert "<script" not in text and html.escape(HOSTILE[:40]) in text and "about &lt;b&gt;" in text
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"data:image/\w+;base64,[\w+/=]+", "", text))
    for kind, data in re.findall(r"data:image/(\w+);base64,([\w+/=]+)", text):
        assert Image.open(io.BytesIO(base64.b64decode(data))).format == kind.upper()
    links = re.findall(r"href='#([^']+)'", text)
    parts = [part for view in views for part in view.parts]
    drawn = {(n, p.example.key, p.example.input_ids.tobytes()): p for n, v in enumerate(views) for p in v.parts}
    again = len(parts) - len(drawn)  # the demo is small: they lead to where they are drawn
    assert again > 0 and len(links) == len(parts) + again and len(set(links)) == len(parts)
    assert all(text.count(f"id='{link}'") == 1 for link in links)
    assert paths[1].name == "pack1.png" and all(Image.open(path).format == "PNG" for path in paths[1:])
    with_crops = sum(part.example.num_crops > 0 for part in drawn.values())
    assert len(paths) == 1 + len(views) + with_crops


def test_page_counts_what_it_does_not_draw(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("molmo2_nemo.preview.page.MAX_CROPS", 2)
    monkeypatch.setattr("molmo2_nemo.preview.page.MAX_CHIPS", 5)
    cfg = config(shards)
    view = collect.record(cfg, "two")
    text = write_pages([view], cfg, collect.tokenizer_of(cfg), tmp_path, "")[0].read_text()
    assert f"(2 of {view.batch.crops.shape[0]} drawn)" in text and re.search(r"and [\d,]+ more", text)


def test_page_says_what_an_example_lost(shards, tmp_path):
    cfg = config(shards)
    cfg.data.image.max_images = 1
    text = write_pages([collect.record(cfg, "two")], cfg, collect.tokenizer_of(cfg), tmp_path, "")[0].read_text()
    assert "images after the first ones, left out: 1" in text and "annotations beyond" not in text


def test_one_record(shards):
    cfg = config(shards)
    view = collect.record(cfg, "mine-000000.tar:tree")
    assert view.parts[0].example.key == "mine-000000.tar:tree" and len(view.parts[0].branches()) == 2
    assert collect.record(cfg, "tree").batch.input_ids.tolist() == view.batch.input_ids.tolist()
    with pytest.raises(DataError, match=r"no record 'nope' in mine; keys look like 'mine-000000.tar:t"):
        collect.record(cfg, "nope")


def test_command(shards, tmp_path, capsys):
    out = str(tmp_path / "look")
    assert main(["preview", str(shards), "--record", "text", "--out", out]) == 0
    assert (tmp_path / "look" / "index.html").is_file() and "index.html" in capsys.readouterr().out
    assert main(["preview", str(shards), "stage=pretrain", "--packs", "1", "--out", out]) == 0
    assert main(["preview", str(shards / "mine-000000.tar"), "--out", out]) == 0
    assert "mine-000000.tar:tree" in (tmp_path / "look" / "index.html").read_text()
    for wrong in (
        ["/absent"],
        ["/absent/x.tar"],
        [str(shards), "--packs", "0"],
        ["a", "b"],
        [str(shards), "--record", "nope"],
        [str(shards), "--rank", "2/2"],
    ):
        assert main(["preview", *wrong, "--out", out]) == 2
    assert "no folder at /absent" in capsys.readouterr().err
