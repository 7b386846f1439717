"""Shards: plain webdataset tars, random access equals what webdataset and tarfile read, hostile tars are refused."""

import io
import json
import multiprocessing
import os
import re
import tarfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.manifest import MANIFEST, ShardError, read_entries, read_head, write_manifest_file
from molmo2_nemo.data.record import BadRecord
from molmo2_nemo.data.shard_writer import clean_leftovers, write_shards
from molmo2_nemo.data.shards import BLOCK, ShardDataset
from molmo2_nemo.data.tar_index import index_tar
from molmo2_nemo.data.tar_manifest import write_manifest


def records(count=7):
    for i in range(count):
        yield f"r/{i:03d}", {"json": json.dumps({"i": i}).encode(), "0.jpg": bytes([i]) * (i * 300), "1.png": b"p"}


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / "set", records(), records_per_shard=3)
    return tmp_path / "set"


def test_random_access(folder):
    data = ShardDataset(folder, "mine")
    assert len(data) == 7 and len(data.shards) == 3
    expected = list(records())
    for i in (6, 0, 3, 2, 5):
        label, members = data.read(i)
        assert members == expected[i][1]
        assert label == f"set-{i // 3:06d}.tar:{expected[i][0]}"
    with pytest.raises(IndexError):
        data.read(7)
    data.verify()
    data.close()


@pytest.mark.parametrize(
    "limits, allowed, message",
    [
        (LimitsConfig(record_bytes=1000), 4, r"3 members, 1209 bytes; 1000 allowed \(data.limits.record_bytes\)"),
        (LimitsConfig(json_bytes=7), 0, r".json: 8 bytes, 7 allowed \(data.limits.json_bytes\)"),
    ],
)
def test_records_beyond_the_limits_are_not_read(folder, monkeypatch, limits, allowed, message):
    """Members may be compressed pictures of any number: their sum counts, before the first byte."""
    data = ShardDataset(folder, "mine", limits)
    assert sum(len(v) for i in range(allowed) for v in data.read(i)[1].values()) == sum(
        len(v) for _, members in list(records())[:allowed] for v in members.values()
    )
    monkeypatch.setattr(data.files, "read", lambda *_: pytest.fail("it was read"))
    with pytest.raises(BadRecord, match=message) as caught:
        data.read(4)
    assert caught.value.cause == "too large"


def test_webdataset_reads_the_shards(folder):
    import webdataset

    urls = [str(p) for p in sorted(folder.glob("*.tar"))]
    seen = {s["__key__"]: s for s in webdataset.WebDataset(urls, shardshuffle=False)}
    assert sorted(seen) == [key for key, _ in records()]
    for key, members in records():
        assert {name: seen[key][name] for name in members} == members


def test_writing_is_reproducible(folder, tmp_path):
    write_shards(tmp_path / "again", records(), name="set", records_per_shard=3)
    assert (tmp_path / "again" / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()
    assert ShardDataset(tmp_path / "again").fingerprint == ShardDataset(folder).fingerprint


def test_interrupted_write_leaves_nothing(tmp_path):
    def broken():
        yield from records(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "set", broken(), records_per_shard=2)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_overwrite_keeps_the_old(folder, tmp_path):
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(ShardError, match="exists"):
        write_shards(folder, records(2))
    with pytest.raises(ShardError, match="bad key!"):
        write_shards(folder, [("bad key!", {"json": b"{}"})], overwrite=True)
    assert (folder / MANIFEST).read_bytes() == before and list(tmp_path.iterdir()) == [folder]
    write_shards(folder, records(2), overwrite=True)
    assert len(ShardDataset(folder)) == 2 and list(tmp_path.iterdir()) == [folder]


def test_foreign_folder_is_not_overwritten(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    with pytest.raises(ShardError, match="not overwritten"):
        write_shards(tmp_path / "home", records(), overwrite=True)


def test_data_set_of_an_earlier_version(folder):
    """It is not read, the message says what to do, and writing anew may replace it."""
    (folder / MANIFEST).rename(folder / "manifest.json")
    with pytest.raises(ShardError, match="older version.*molmo2 shards index"):
        ShardDataset(folder)
    write_shards(folder, records(2), overwrite=True)
    assert len(ShardDataset(folder)) == 2


def test_open_errors(folder, tmp_path):
    with pytest.raises(ShardError, match="no folder"):
        ShardDataset(tmp_path / "nowhere", "mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShardError, match="'mine': no shards at.*; `molmo2 prepare` makes shards of data"):
        ShardDataset(tmp_path / "empty", "mine")
    with pytest.raises(ShardError, match=f"no shards at .*data sets lie in it, each with a path of its own: {folder}$"):
        ShardDataset(folder.parent, "mine")
    with pytest.raises(ShardError, match="tar is a file. Give the folder that holds the shards; it is one shard"):
        ShardDataset(folder / "set-000001.tar", "mine")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ShardError, match="molmo2 prepare .*rows.jsonl --out DIR makes shards of it"):
        ShardDataset(tmp_path / "rows.jsonl", "mine")
    shard = folder / "set-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ShardError, match="set-000001.tar is cut off"):
        ShardDataset(folder)
    shard.unlink()
    with pytest.raises(ShardError, match="set-000001.tar is missing"):
        ShardDataset(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(ShardError, match="no manifest.parquet.*shards index"):
        ShardDataset(folder)


@pytest.mark.parametrize("name", ["../x.tar", "/etc/passwd", "a/b.tar", ".."])
def test_manifest_cannot_point_elsewhere(folder, name):
    head = read_head(folder / MANIFEST)
    head["shards"][0]["name"] = name
    write_manifest_file(folder / MANIFEST, head, [])
    with pytest.raises(ShardError, match="not a plain file name"):
        ShardDataset(folder)


def test_another_shard_of_the_same_size(folder):
    """Good headers of other records: the shard is not the one that the manifest describes, which no record survives."""
    data = ShardDataset(folder)
    shard = folder / "set-000000.tar"
    content = shard.read_bytes()
    other = tarfile.TarInfo.frombuf(content[:512], "utf-8", "strict")
    other.name = "r/other.0.jpg"
    shard.write_bytes(other.tobuf() + content[512:])
    with pytest.raises(ShardError, match="does not match its index.*'r/other.0.jpg' found"):
        data.read(0)
    with pytest.raises(ShardError, match="SHA-256"):
        data.verify()


def flip(path, at, bit):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def test_no_flipped_bit_is_read(folder):
    """Any bit of a record's contents, and of its headers all that tar's own checksum covers. What is reported is the
    shard, the key and the bytes. The padding between members is not read at all."""
    shard, data = folder / "set-000000.tar", ShardDataset(folder)
    entry = next(iter(read_entries(folder / MANIFEST)))[2]
    random = np.random.default_rng(0)
    for member in entry.members:
        unused = {*range(member.offset - BLOCK + 154, member.offset - BLOCK + 156)}  # the end of the checksum's field
        places = [*range(member.offset, member.offset + member.size), *range(member.offset - BLOCK, member.offset)]
        for at in random.choice([p for p in places if p not in unused], 60):
            bit = int(random.integers(8))
            flip(shard, at, bit)
            with pytest.raises(BadRecord, match=r"record set-000000.tar:r/002: bytes (\d+) to (\d+) of the") as caught:
                data.read(2)
            start, end = map(int, re.findall(r"bytes (\d+) to (\d+)", caught.value.detail)[0])
            assert start <= at < end and caught.value.cause == "damaged"
            flip(shard, at, bit)
    assert data.read(2)[1] == list(records())[2][1] and data.read(1)[1] == list(records())[1][1]


@pytest.mark.parametrize("lacking", ["null", "column"])
def test_manifests_without_checksums_are_read(folder, lacking):
    """As other programs may write them. Their damage passes, and how many records that concerns is known."""
    table = pq.read_table(folder / MANIFEST)
    place = table.column_names.index("crc")
    table = table.remove_column(place)
    if lacking == "null":
        crcs = pa.array([None, 1, None, None, None, None, None], pa.uint32())
        table = table.append_column("crc", crcs)
    with pq.ParquetWriter(folder / MANIFEST, table.schema) as writer:
        for start in (0, 3, 6):
            writer.write_table(table.slice(start, 3))
    data = ShardDataset(folder)
    assert data.without_crc() == (6 if lacking == "null" else 7)
    assert [data.read(i)[1] for i in (0, 6)] == [list(records())[i][1] for i in (0, 6)]
    if lacking == "null":
        with pytest.raises(BadRecord, match="CRC-32 .* 00000001 written"):
            data.read(1)


def test_cut_while_training(folder):
    data = ShardDataset(folder)
    shard = folder / "set-000002.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(ShardError, match="cut off"):
        data.read(6)


def tar(path, *entries, fmt=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=fmt) as file:
        for name, kind in entries:
            info = tarfile.TarInfo(name)
            info.mtime = 1.5  # makes PAX write an extended header
            if kind == "file":
                info.size = 2
                file.addfile(info, io.BytesIO(b"{}"))
            else:
                info.type, info.linkname = kind, "/etc/passwd"
                file.addfile(info)


HOSTILE = {
    "absolute": (("/a.json", "file"),),
    "climbing": (("x/../../a.json", "file"),),
    "symlink": (("a.json", "file"), ("a.jpg", tarfile.SYMTYPE)),
    "hardlink": (("a.json", "file"), ("a.jpg", tarfile.LNKTYPE)),
    "nothing but folders": (("a.d", tarfile.DIRTYPE),),
    "device": (("a.json", tarfile.CHRTYPE),),
    "duplicate": (("a.json", "file"), ("a.json", "file")),
    "duplicate by case": (("a.json", "file"), ("a.JSON", "file")),
    "split record": (("a.json", "file"), ("b.json", "file"), ("a.jpg", "file")),
    "no suffix": (("a", "file"),),
    "long name": (("a" * 300 + ".json", "file"),),
    "odd name": (("a\u00e9.json", "file"),),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("fmt", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_hostile_tars(tmp_path, name, fmt):
    tar(tmp_path / "x.tar", *HOSTILE[name], fmt=fmt)
    with pytest.raises(ShardError, match="x.tar"):
        write_manifest(tmp_path, "x")
    assert not (tmp_path / MANIFEST).exists()


def test_foreign_tars_are_indexed(tmp_path):
    tar(tmp_path / "x.tar", ("a.json", "file"), ("a.jpg", "file"), ("b.json", "file"))
    write_manifest(tmp_path, "x")
    data = ShardDataset(tmp_path)
    assert data.read(0) == ("x.tar:a", {"json": b"{}", "jpg": b"{}"}) and data.read(1)[0] == "x.tar:b"


@pytest.mark.parametrize("keep", [100, 513, 3000])
def test_cut_and_compressed_tars_are_not_indexed(folder, keep):
    path = folder / "set-000001.tar"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ShardError, match="cut off|holds no record"):
        index_tar(path)
    path.write_bytes(b"\x1f\x8b" + b"x" * 2000)
    with pytest.raises(ShardError, match="uncompressed"):
        index_tar(path)


def test_bad_input_of_the_writer(tmp_path):
    for bad, words in [
        ([("a", {"0.jpg": b""})], "no json"),
        ([("a", {"json": b"", "J P": b""})], "suffix"),
        ([("../a", {"json": b""})], "key"),
        ([("a.b", {"json": b""})], "key"),
        ([("a" * 99, {"json": b""})], "longer"),
        ([("a", {"json": b""}), ("a", {"json": b""})], "twice"),
        ([], "no record"),
    ]:
        with pytest.raises(ShardError, match=words):
            write_shards(tmp_path / "x", bad)
    assert list(tmp_path.iterdir()) == []


def interrupted(out, pipe):
    """Write a data set, and stop in the middle of it."""

    def records():
        yield "a", {"json": b"{}"}
        pipe.send("begun")
        time.sleep(60)

    write_shards(out, records())


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    """A living writer's folder stays; once it is killed, the next writer of the same data set removes it."""
    out = tmp_path / "set"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=interrupted, args=(out, theirs))
    process.start()
    assert ours.recv() == "begun"
    folders = list(tmp_path.glob(".set.tmp-*"))
    assert len(folders) == 1 and clean_leftovers(out) == [] and folders[0].is_dir()
    (tmp_path / ".set.tmp-new").mkdir()  # not locked yet: perhaps about to be
    (tmp_path / ".set2.tmp-other").mkdir()
    os.utime(tmp_path / ".set2.tmp-other", (0, 0))
    process.kill()
    process.join()
    write_shards(out, [("a", {"json": b"{}"})])
    assert sorted(p.name for p in tmp_path.iterdir()) == [".set.tmp-new", ".set2.tmp-other", "set"]
    assert not (out / ".writing").exists()


def test_old_data_set_comes_back(tmp_path):
    """Killed between moving the old one aside and putting the new one in place."""
    write_shards(tmp_path / "old", [("a", {"json": b"{}"})])
    aside = tmp_path / ".set.old-x"
    aside.mkdir()
    (tmp_path / "old").rename(aside / "data")
    os.utime(aside, (0, 0))
    assert clean_leftovers(tmp_path / "set") == [aside]
    assert len(ShardDataset(tmp_path / "set")) == 1 and not aside.exists()
