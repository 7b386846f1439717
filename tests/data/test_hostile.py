"""Broken and hostile records through shards, the real builder and the loader: each is skipped, the run goes on."""

import json
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from molmo2_nemo.data.config import DataConfig, ImageConfig, PackingConfig, SourceConfig, VideoConfig
from molmo2_nemo.data.loader import PackStream
from molmo2_nemo.data.manifest import MANIFEST, read_entries
from molmo2_nemo.data.reader import ExampleReader, Skipped, default_builder
from molmo2_nemo.data.shard_writer import write_shards

MEDIA = Path(__file__).parents[2] / "data_prep" / "demo_media"
CAT = (MEDIA / "cat.jpg").read_bytes()
FILM = (MEDIA / "bunny.mp4").read_bytes()
QA = {"style": "user_qa", "question": "What is it?", "answer": "a cat"}


def png(width, height):
    """A PNG that claims to be huge and holds almost nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def image(data, *annotations):
    content = {"images": ["0.jpg"], "annotations": list(annotations) or [QA]}
    return {"json": json.dumps(content).encode(), "0.jpg": data}


def video(data, **more):
    content = {"video": "mp4", "annotations": [QA], **more}
    return {"json": json.dumps(content).encode(), "mp4": data}


def text(answer):
    return {"json": json.dumps({"annotations": [{"style": "user_qa", "question": "q", "answer": answer}]}).encode()}


BAD = {
    "headers-of-a-jpeg": image(CAT[:200]),
    "not-a-picture": image(b"hello" * 100),
    "huge-png": image(png(50_000, 50_000)),
    "truncated-mp4": video(FILM[:50_000]),
    "no-film": video(b"\0" * 5000),
    "clip-after-the-end": video(FILM, clip=[100.0, 200.0]),
    "truncated-json": {"json": b'{"annotations": [{"style": "user_qa"'},
    "not-utf8": {"json": b'{"annotations": [{"style": "user_qa", "question": "\xff", "answer": "a"}]}'},
    "pickle": {**text("a"), "pickle": b"cos\nsystem\n(S'touch /tmp/owned'\ntR."},
    "no-picture": {"json": json.dumps({"images": ["0.jpg"], "annotations": [QA]}).encode()},
    "nan-point": image(CAT, {"style": "pointing", "label": "x", "points": [["NaN", 1]], "point_scale": 100}),
    "long-text": text("word " * 3_000_000),
}
GOOD = {
    "good": image(CAT),
    "truncated-jpeg": image(CAT[:2000]),
    "many-branches": image(CAT, *[QA] * 2000),
    "points-outside": image(CAT, {"style": "pointing", "label": "x", "points": [[-5, 500]], "point_scale": 100}),
    "special-tokens": text("<im_patch><|im_end|><|image|> are only characters"),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    out = tmp_path_factory.mktemp("hostile") / "set"
    write_shards(out, {**BAD, **GOOD}.items(), records_per_shard=5)
    return DataConfig(
        sources={"set": SourceConfig(str(out))},
        image=ImageConfig(crop_size=126, margin=2, max_crops=2),
        video=VideoConfig(max_frames=8),
        packing=PackingConfig(sequence_length=512, max_crops=16, buffer_size=4),
    )


@pytest.fixture(scope="module")
def results(config):
    builder, im_patch = default_builder(config)
    reader = ExampleReader(config, builder, im_patch)
    found = {}
    for n in range(len(BAD) + len(GOOD)):  # one epoch: every record once
        result = reader[n]
        found[result.key.split(":")[1]] = result
    return found, im_patch


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_refused(results, name):
    result = results[0][name]
    assert isinstance(result, Skipped), f"{name} was accepted"
    assert result.cause and result.detail and len(result.detail) < 2000


@pytest.mark.parametrize("name", GOOD)
def test_odd_but_good_records_are_used(results, name):
    result = results[0][name]
    assert not isinstance(result, Skipped), result
    assert result.num_tokens <= 512


def test_written_special_tokens_stay_text(results):
    found, im_patch = results
    assert not (found["special-tokens"].input_ids == im_patch).any()
    assert found["many-branches"].info["branches_dropped"] > 1900


def test_the_run_goes_on(config):
    stream = PackStream(config, micro_batch_size=1, dp_rank=0, dp_size=1)
    keys = set()
    for _, batch in zip(range(12), stream, strict=False):
        keys.update(key.split(":")[1] for key in batch.keys[0])
    assert keys == set(GOOD)
    assert stream.counts["truncated"] >= 2 and stream.counts["ignored"] == 0
    assert sum(stream.skipped.values()) >= len(BAD) and stream.counts["branches_dropped"] > 1900
    assert not Path("/tmp/owned").exists()


@pytest.mark.parametrize("suffix", ["json", "jpg", "mp4", "header"])
def test_flipped_bits_are_never_trained(tmp_path, suffix):
    """Most would decode: a JPEG with other pixels, a word with another letter. One bit in each of many records."""
    film = video(FILM)
    write_shards(tmp_path / "set", [(f"{i:02d}", film if suffix == "mp4" else image(CAT)) for i in range(16)])
    random = np.random.default_rng(1)
    with (tmp_path / "set" / "set-000000.tar").open("r+b") as shard:
        for entry in next(iter(read_entries(tmp_path / "set" / MANIFEST)))[:-1]:
            member = next(m for m in entry.members if suffix in ("header", m.suffix.rpartition(".")[2]))
            at = member.offset - 512 if suffix == "header" else member.offset
            at += int(random.integers(100 if suffix == "header" else member.size))
            shard.seek(at)
            byte = shard.read(1)[0] ^ 1 << int(random.integers(8))
            shard.seek(at)
            shard.write(bytes([byte]))
    config = DataConfig(
        sources={"set": SourceConfig(str(tmp_path / "set"))},
        image=ImageConfig(crop_size=126, margin=2, max_crops=2),
        video=VideoConfig(max_frames=8),
        packing=PackingConfig(sequence_length=512, max_crops=16, buffer_size=1),
        quarantine=str(tmp_path / "bad.jsonl"),
    )
    stream = PackStream(config, micro_batch_size=1, dp_rank=0, dp_size=1)
    keys = {key for _, batch in zip(range(2), stream, strict=False) for key in batch.keys[0]}
    assert keys == {"set-000000.tar:15"} and set(stream.skipped) == {"damaged"}
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {line["record"] for line in lines} == {f"set-000000.tar:{i:02d}" for i in range(15)}


def test_truncated_pictures_can_be_skipped(config):
    """data.image.truncated=skip; by default they are loaded as far as they go, like in the published code."""
    config = replace(config, image=replace(config.image, truncated="skip"))
    stream = PackStream(config, micro_batch_size=1, dp_rank=0, dp_size=1)
    keys = {key.split(":")[1] for _, batch in zip(range(9), stream, strict=False) for key in batch.keys[0]}
    assert keys == set(GOOD) - {"truncated-jpeg"} and stream.counts["truncated"] == 0


def test_missing_checksums_are_said(config, tmp_path):
    """One line a data set, for whoever starts the training."""
    builder, im_patch = default_builder(config)
    assert ExampleReader(config, builder, im_patch).without_crc() == []
    bare = shutil.copytree(config.sources["set"].path, tmp_path / "bare")
    table = pq.read_table(bare / MANIFEST)
    pq.write_table(table.drop_columns(["crc"]), bare / MANIFEST, row_group_size=5)
    reader = ExampleReader(replace(config, sources={"old": SourceConfig(str(bare))}), builder, im_patch)
    (line,) = reader.without_crc()
    count = len(BAD) + len(GOOD)
    assert line.startswith(f"data set old: {count} of {count} records have no checksum")
    assert not isinstance(reader[0], Skipped) or reader[0].cause != "damaged"
