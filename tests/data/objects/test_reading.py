"""Data sets at an object store: the same records as in the folder, by few requests, also when the server misbehaves."""

import fcntl
import itertools
import json
import multiprocessing
import os
import shutil
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from molmo2_nemo.data.config import DataConfig, PackingConfig, SourceConfig, StoreConfig
from molmo2_nemo.data.loader import PackStream
from molmo2_nemo.data.manifest import MANIFEST, ShardError
from molmo2_nemo.data.objects import files as remote
from molmo2_nemo.data.objects import store as requests_module
from molmo2_nemo.data.objects import traffic
from molmo2_nemo.data.objects.address import Address, place_of
from molmo2_nemo.data.objects.cache import ABANDONED, PART, TAKEN, SpanCache
from molmo2_nemo.data.objects.files import together
from molmo2_nemo.data.record import BadRecord
from molmo2_nemo.data.sampling import is_missing
from molmo2_nemo.data.shard_files import Span
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.errors import UserError
from tests.support.object_store import filesystem, needs_s3, range_server, s3, upload, use_s3_at
from tests.support.shards import demo_shards


def records(count=7):
    for i in range(count):
        yield f"r/{i:03d}", {"json": json.dumps({"i": i}).encode(), "0.jpg": bytes([i]) * (i * 300), "1.png": b"p"}


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / "set", records(), records_per_shard=3)
    return tmp_path / "set"


@pytest.fixture
def retries():
    return 4


@pytest.fixture
def server(folder):
    with range_server(folder) as httpd:
        yield httpd


def everything(dataset):
    return [dataset.read(i) for i in range(len(dataset))]


def gets(server, path=None):
    return [ask for method, at, ask in server.seen if method == "GET" and path in (None, at)]


# --- an S3 on this machine ------------------------------------------------------------------------------------------


@needs_s3
def test_an_s3_gives_the_records_of_the_folder(folder, monkeypatch):
    with s3(monkeypatch):
        upload(folder, "s3://bucket/sets/mine")
        local, far = ShardDataset(folder), ShardDataset("s3://bucket/sets/mine")
        assert everything(far) == everything(local)
        assert (far.fingerprint, len(far), far.counted) == (local.fingerprint, len(local), local.counted)
        far.verify()
        assert traffic.counts["requests"] == 1 + 7 + 3  # manifest, a record each, a small shard each
        before = traffic.counts["requests"]
        assert everything(ShardDataset("s3://bucket/sets/mine/")) == everything(local)
        assert traffic.counts["requests"] == before and traffic.counts["hits"] == 7 * 3
        assert far.without_crc() == 0


@needs_s3
def test_what_an_s3_refuses_is_said(folder, monkeypatch):
    with s3(monkeypatch):
        upload(folder, "s3://bucket/mine")
        assert is_missing(SourceConfig("s3://bucket/none")) and not is_missing(SourceConfig("s3://bucket/mine"))
        with pytest.raises(ShardError, match="'far': no shards at s3://bucket/none"):
            ShardDataset("s3://bucket/none", "far")
        with pytest.raises(ShardError, match="no shards at s3://no-bucket/none"):
            ShardDataset("s3://no-bucket/none")
        dataset = ShardDataset("s3://bucket/mine")
        filesystem().rm_file("s3://bucket/mine/set-000001.tar")
        with pytest.raises(ShardError, match="shard s3://bucket/mine/set-000001.tar has disappeared"):
            dataset.read(4)
        remote._listed.clear()
        with pytest.raises(ShardError, match=r"mine/set-000001.tar is missing; the manifest lists it with 3"):
            ShardDataset("s3://bucket/mine")
        filesystem().pipe_file("s3://bucket/mine/set-000001.tar", b"short")
        remote._listed.clear()
        with pytest.raises(ShardError, match=r"set-000001.tar is cut off: it has 5 bytes, the manifest says \d+"):
            ShardDataset("s3://bucket/mine")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
        monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
        monkeypatch.setattr(requests_module, "_open", {})  # as a new process
        remote._listed.clear()
        with pytest.raises(ShardError, match="s3://bucket/mine.*: no credentials"):
            ShardDataset("s3://bucket/mine")


@needs_s3
def test_an_s3_that_refuses_listings_and_fails(folder, server, options, monkeypatch):
    """s3fs and botocore between us and a server's failures: each is one try of ours, and is counted."""
    use_s3_at(server.url, monkeypatch)
    remote.use(StoreConfig(cache=options.cache, retries=4, timeout=1.0))
    dataset = ShardDataset("s3://bucket/set")
    assert not is_missing(SourceConfig("s3://bucket/set"))
    shard, expected = "/bucket/set/set-000001.tar", ShardDataset(folder).read(5)
    for plans in (["503", "429"], ["500"], ["cut"], ["slow:3"], ["damage"]):
        for path in dataset.files.cache.folder.glob("??/*"):
            path.unlink()
        traffic.take()
        asked, server.plans[shard] = len(gets(server, shard)), list(plans)
        assert dataset.read(5) == expected, plans
        assert len(gets(server, shard)) - asked == 1 + len(plans), plans
        assert traffic.counts["retries"] == (0 if plans == ["damage"] else len(plans)), plans
    server.plans[shard] = ["403"]
    with pytest.raises(ShardError, match=r"s3://bucket/set/set-000001.tar: .*see docs/object_stores.md, Credentials"):
        dataset.read(4)


def real_stream(config, rank=0, size=1):
    return PackStream(config, micro_batch_size=1, dp_rank=rank, dp_size=size)


def same(a, b):
    for field in fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            np.testing.assert_array_equal(x, y, err_msg=field.name)
        else:
            assert x == y, field.name


@needs_s3
@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_of_packs_is_the_local_one_resumed_too(monkeypatch, options, workers):
    """Real pictures and films, two phases of reading (planning and decoding), worker processes that are forked."""
    shards = demo_shards()
    with s3(monkeypatch):
        for stage in ("pretrain", "sft"):
            upload(shards / stage, f"s3://bucket/all/{stage}")

        def config(root, count):
            sources = {name: SourceConfig(f"{root}/{name}") for name in ("pretrain", "sft")}
            made = DataConfig(sources=sources, packing=PackingConfig(2048, 24, 6), num_workers=count, store=options)
            made.image.crop_size, made.image.margin, made.image.max_crops, made.video.max_frames = 126, 2, 2, 8
            return made

        expected = list(itertools.islice(real_stream(config(shards, 0)), 8))
        far = iter(real_stream(config("s3://bucket/all", workers)))
        found = list(itertools.islice(far, 4))
        far.close()
        moved = real_stream(config("s3://bucket/all", workers))
        moved.load_states(json.loads(json.dumps([found[-1].state])))
        rest = iter(moved)
        found += itertools.islice(rest, 4)
        rest.close()
        for a, b in zip(expected, found, strict=True):
            same(a, b)
        assert traffic.counts["requests"] > 2 and traffic.counts["hits"] > 2  # those of the workers too
        assert traffic.counts["retries"] == traffic.counts["damaged"] == 0


# --- a server that misbehaves ---------------------------------------------------------------------------------------


def test_few_requests(server, folder):
    dataset = ShardDataset(f"{server.url}/set")
    assert everything(dataset) == everything(ShardDataset(folder))
    assert len(gets(server)) == 1 + len(dataset)  # the manifest, and one for all members of a record
    assert sum(method == "HEAD" for method, *_ in server.seen) == 1 + len(dataset.shards)


@pytest.mark.parametrize("plan", ["429", "429:1", "503", "500", "408", "cut"])
def test_an_answer_that_is_none_is_asked_for_again(server, folder, plan):
    dataset = ShardDataset(f"{server.url}/set")
    server.plans["/set/set-000001.tar"] = [plan, plan] if plan != "429:1" else [plan]
    tries = len(server.plans["/set/set-000001.tar"])
    assert dataset.read(5) == ShardDataset(folder).read(5)
    assert traffic.counts["retries"] == tries and len(gets(server, "/set/set-000001.tar")) == 1 + tries


def test_a_slow_answer_is_not_waited_for(server, folder, options):
    remote.use(StoreConfig(cache=options.cache, retries=1, timeout=0.3))
    dataset = ShardDataset(f"{server.url}/set")
    server.plans["/set/set-000001.tar"] = ["slow:2"]
    assert dataset.read(5) == ShardDataset(folder).read(5)
    assert traffic.counts["retries"] == 1


@pytest.mark.parametrize(
    "plan, message",
    [
        ("503", r"set-000001.tar: 5 tries, the last: the server answers 503 .*data.store.retries"),
        ("403", r"set-000001.tar: the server answers 403 .*: no permission; see docs/object_stores.md, Credentials"),
        ("404", r"shard http://.*set-000001.tar has disappeared: .*it is not there"),
        ("400", r"set-000001.tar: the server answers 400"),
        ("plain", r"the server sends [\d,]+: it does not know ranges .*molmo2 shards copy http://.*/set DIR"),
    ],
)
def test_what_a_server_refuses_is_said(server, plan, message, capsys, monkeypatch):
    monkeypatch.setattr(requests_module, "_said", -1e9)
    dataset = ShardDataset(f"{server.url}/set", "far")
    server.plans["/set/set-000001.tar"] = [plan] * 9
    with pytest.raises(ShardError, match=message):
        dataset.read(5)
    asked = len(gets(server, "/set/set-000001.tar"))
    assert asked == (5 if plan == "503" else 1)
    said = capsys.readouterr().err  # while it is waited for, and once
    assert said.count("the server answers 503") == (plan == "503") and said.count("\n") == (plan == "503")


def test_damaged_bytes_are_fetched_again_and_then_said(server, folder):
    """The record's checksum is that of the manifest, whatever the server says of its own answer."""
    dataset = ShardDataset(f"{server.url}/set")
    server.plans["/set/set-000001.tar"] = ["damage"]
    assert dataset.read(5) == ShardDataset(folder).read(5)
    assert traffic.counts["damaged"] == 3
    server.plans["/set/set-000001.tar"] = ["damage", "damage"]
    with pytest.raises(BadRecord, match="CRC-32"):
        dataset.read(4)
    assert dataset.read(4) == ShardDataset(folder).read(4)  # nothing of it was kept


def test_a_damaged_file_of_the_cache_is_fetched_again(server, folder, options):
    dataset = ShardDataset(f"{server.url}/set")
    expected = dataset.read(5)
    kept = [path for path in dataset.files.cache.folder.glob("??/*") if path.is_file()]
    assert len(kept) == 3
    for path, how in zip(kept, (lambda b: b[:-1], lambda b: b"x" + b[1:], lambda b: b""), strict=True):
        path.write_bytes(how(path.read_bytes()))
    asked = len(gets(server))
    assert dataset.read(5) == expected
    assert traffic.counts["damaged"] == 3 and len(gets(server)) == asked + 1


def test_the_manifest_is_fetched_once_and_again_where_its_copy_is_damaged(server, folder):
    def asked():
        return len(gets(server, f"/set/{MANIFEST}"))

    first = ShardDataset(f"{server.url}/set")
    assert asked() == 1
    ShardDataset(f"{server.url}/set")
    assert asked() == 1
    kept = first.files.manifest()
    assert kept.read_bytes() == (folder / MANIFEST).read_bytes()
    data = bytearray(kept.read_bytes())
    data[40] ^= 255  # in a page: its checksum says so
    kept.write_bytes(data)
    assert first.read(0) == ShardDataset(folder).read(0)
    assert asked() == 2
    kept.write_bytes(data)
    assert everything(ShardDataset(f"{server.url}/set")) == everything(ShardDataset(folder))
    assert asked() == 3
    kept.unlink()  # the cache had no room for it any more
    first._indexes.clear()
    assert first.read(1) == ShardDataset(folder).read(1)
    server.files[f"/set/{MANIFEST}"] = server.files[f"/set/{MANIFEST}"][:-200] + bytes(200)
    kept.unlink()
    first._indexes.clear()
    with pytest.raises(ShardError, match=f"{MANIFEST} was replaced while this run reads it"):
        first.read(1)


def test_a_set_that_was_replaced_is_not_read_from_the_cache(server, folder, tmp_path):
    everything(ShardDataset(f"{server.url}/set"))
    shutil.rmtree(folder)
    write_shards(folder, ((k, {**m, "1.png": b"q"}) for k, m in records()), records_per_shard=3)
    server.files |= {f"/set/{path.name}": path.read_bytes() for path in folder.iterdir()}
    found = everything(ShardDataset(f"{server.url}/set"))
    assert found == everything(ShardDataset(folder)) and found[0][1]["1.png"] == b"q"


def test_a_damaged_manifest_is_named_by_its_address(server):
    server.files[f"/set/{MANIFEST}"] = b"no manifest"
    with pytest.raises(ShardError, match=rf"http://127.0.0.1:\d+/set/{MANIFEST} cannot be parsed"):
        ShardDataset(f"{server.url}/set")


def test_without_a_cache_records_are_fetched_each_time(server, folder, options):
    remote.use(StoreConfig(cache=options.cache, cache_gib=0))
    dataset = ShardDataset(f"{server.url}/set")
    assert everything(dataset) == everything(dataset) == everything(ShardDataset(folder))
    assert len(gets(server)) == 1 + 2 * len(dataset)
    assert [path.parent.name for path in dataset.files.cache.folder.glob("*/*")] == ["manifests"]


def test_schemes(tmp_path, monkeypatch):
    assert place_of("a/b") == Path("a/b") and place_of(f"file://{tmp_path}") == tmp_path
    assert place_of("s3://b/c/") == Address("s3://b/c") and (place_of("s3://b") / "c.tar").parent.url == "s3://b"
    for bad in ("s3://", "simplecache::s3://b/c"):
        with pytest.raises(UserError, match="is not the address of a folder"):
            place_of(bad)
    with pytest.raises(ShardError, match="nothing:// is not a scheme that fsspec knows"):
        ShardDataset("nothing://b/c")
    from fsspec.registry import known_implementations

    entry = {"class": "no_such_package.FileSystem", "err": "Install no_such_package"}
    monkeypatch.setitem(known_implementations, "gcs", entry)
    with pytest.raises(ShardError, match=r"a package is missing to read gcs://.*: pip install 'molmo2_nemo\[gcs\]'"):
        ShardDataset("gcs://b/c")


def test_other_filesystems_of_fsspec(folder):
    import fsspec

    memory = fsspec.filesystem("memory")
    try:
        for path in folder.iterdir():
            memory.pipe_file(f"/far/set/{path.name}", path.read_bytes())
        assert everything(ShardDataset("memory://far/set")) == everything(ShardDataset(folder))
        assert everything(ShardDataset(f"file://{folder}")) == everything(ShardDataset(folder))
    finally:
        memory.rm("/far", recursive=True)


def test_spans_that_lie_close_are_one_request():
    spans = [Span(0, 700_000, 10), Span(0, 0, 100), Span(0, 612, 50), Span(1, 0, 5), Span(0, 30_000, 1)]
    assert together(spans) == [Span(0, 0, 30_001), Span(0, 700_000, 10), Span(1, 0, 5)]


# --- several processes, one cache -----------------------------------------------------------------------------------


def fill(url, cache, limit, seed):
    """Reads all records of a set several times, in an order of its own."""
    remote.use(StoreConfig(cache=cache, cache_gib=limit / 2**30, retries=4, timeout=20))
    dataset = ShardDataset(url)
    for i in np.random.default_rng(seed).permutation(np.arange(len(dataset)).repeat(3)):
        _, members = dataset.read(int(i))
        assert members["bin"] == bytes([i]) * 20_000


def test_processes_share_a_cache_and_its_limit(tmp_path, options):
    """Each of three processes reads more than the limit; whenever one looks, the files take no more."""
    made = ((f"{i:03d}", {"json": b"{}", "bin": bytes([i]) * 20_000}) for i in range(60))
    write_shards(tmp_path / "large", made, records_per_shard=20)
    limit = 600_000
    with range_server(tmp_path / "large") as httpd:
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=fill, args=(f"{httpd.url}/set", options.cache, limit, seed)) for seed in range(3)
        ]
        for process in processes:
            process.start()
        most = 0
        while any(process.is_alive() for process in processes):
            most = max(most, taken(options.cache))
            time.sleep(0.01)
        assert [process.exitcode for process in processes] == [0, 0, 0]
        assert 0.5 * limit < most <= limit


def taken(folder):
    """Bytes of all files, as a disk counts them."""
    if not (Path(folder) / TAKEN).exists():
        return 0
    with (Path(folder) / TAKEN).open() as lock:  # a file that gets its name meanwhile would be seen twice
        fcntl.flock(lock, fcntl.LOCK_SH)
        return sum(-(-path.stat().st_size // 4096) * 4096 for path in Path(folder).glob("*/*"))


def test_a_disk_without_room_does_not_stop_reading(server, folder, options, monkeypatch):
    """The cache's folder cannot be written any more: what is read is right, and the count says so."""
    dataset = ShardDataset(f"{server.url}/set")
    cache = dataset.files.cache.folder
    (cache / "taken").unlink()
    (cache / "taken").mkdir()  # refuses root too
    assert everything(dataset) == everything(ShardDataset(folder))
    assert traffic.counts["not_kept"] == 7 * 3


@needs_s3
def test_a_store_that_does_not_answer_is_not_asked_for_each_data_set(monkeypatch, options):
    """A port that nobody listens on: looking for two data sets and opening them fail by the same tries."""
    use_s3_at("http://127.0.0.1:9", monkeypatch)
    assert not is_missing(SourceConfig("s3://bucket/mine"))
    with pytest.raises(ShardError, match="s3://bucket/mine: 5 tries, the last: .*127.0.0.1:9"):
        ShardDataset("s3://bucket/other")
    assert traffic.counts["retries"] == 4


def test_what_killed_processes_left_in_the_cache_is_removed(tmp_path):
    """A file that nobody finished counts as long as somebody may be writing it; a lock ends with its process."""
    cache = SpanCache(str(tmp_path / "cache"), 100_000)
    cache.open()
    cache.put("first", bytes(20_000))
    old, young = (next(cache.folder.glob("??")) / f"{name}{PART}" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(bytes(30_000))
    os.utime(old, (time.time() - 2 * ABANDONED,) * 2)
    (cache.folder / TAKEN).unlink()  # whoever comes next counts what is there
    cache.put("second", bytes(40_000))
    assert not old.exists() and young.exists()
    assert cache.get("first") is not None and cache.get("second") == bytes(40_000)
    cache.put("third", bytes(30_000))  # the limit: what was used longest ago goes
    assert cache.get("first") is None and cache.get("third") == bytes(30_000)
    assert young.exists() and taken(cache.folder) <= 100_000
    cache.put("fourth", bytes(200_000))  # more than the limit is never kept
    assert cache.get("fourth") is None and cache.get("third") is not None


def test_media_of_several_records_are_fetched_once(tmp_path):
    """They lie in one of the shards; a second record that shows one has it from the cache."""
    pictures = [bytes([n]) * 150_000 for n in range(3)]
    made = ((f"k{i:02d}", {"json": b'{"images": ["0.jpg"]}', "0.jpg": pictures[i % 3]}) for i in range(12))
    write_shards(tmp_path / "once", made, records_per_shard=4, media_once=True)
    with range_server(tmp_path / "once") as httpd:
        dataset = ShardDataset(f"{httpd.url}/set")
        assert everything(dataset) == everything(ShardDataset(tmp_path / "once"))
        assert [members["0.jpg"] for _, members in everything(dataset)] == [pictures[i % 3] for i in range(12)]
        assert traffic.counts["bytes"] < 2 * 3 * 150_000
        assert traffic.counts["requests"] == 1 + 12
