"""molmo2 shards copy, check and stats at an object store: both ways, resumed, with the manifest last."""

import json
import shutil

import pytest

from data_prep.shard_copy import Watch, check_apart, copy, sets_at, target_of
from data_prep.shard_remote import check_at
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.manifest import MANIFEST, ShardError
from molmo2_nemo.data.objects import store as requests_module
from molmo2_nemo.data.objects import traffic
from molmo2_nemo.data.objects.address import Address, place_of
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.errors import UserError
from tests.support.object_store import filesystem, needs_s3, range_server, s3
from tests.support.shards import demo_shards


def records(count=7, text="a"):
    for i in range(count):
        data = {"annotations": [{"style": "long_caption", "text": f"{text} {i}"}]}
        yield f"r/{i:03d}", {"json": json.dumps(data).encode()}


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / "mine", records(), records_per_shard=3)
    (tmp_path / "mine" / "skipped.jsonl").write_text("{}\n")
    return tmp_path / "mine"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stored(address):
    files = filesystem()
    return {entry.rpartition("/")[2]: files.cat_file(entry) for entry in files.ls(address, detail=False)}


@needs_s3
def test_to_a_store_and_back_byte_for_byte(folder, tmp_path, options, monkeypatch):
    with s3(monkeypatch):
        far, steps = Address("s3://bucket/all/mine"), []
        found = copy(folder, far, options, watch=Watch(step=steps.append))
        size = sum(path.stat().st_size for path in folder.glob("*.tar"))
        assert found == (3, size, 0, 0) and sum(steps) == size
        assert stored("s3://bucket/all/mine") == content(folder)
        asked = traffic.counts["requests"]
        assert copy(folder, far, options) == (0, 0, 3, 0)
        assert traffic.counts["requests"] == asked + 1  # the manifest; what was sent is noted, and not read again
        shutil.rmtree(options.cache)
        assert copy(folder, far, options) == (0, 0, 3, 0)  # without the note it is read, and is right
        assert sets_at(Address("s3://bucket/all"), options) == [far]
        assert copy(far, tmp_path / "back", options) == (3, size, 0, 0)
        assert content(tmp_path / "back") == content(folder)
        assert copy(far, Address("s3://bucket/second"), options) == (3, size, 0, 0)
        assert stored("s3://bucket/second") == content(folder)


@needs_s3
def test_a_copy_that_is_stopped_has_no_manifest_and_goes_on(folder, options, monkeypatch):
    with s3(monkeypatch):
        far, real, sent = Address("s3://bucket/mine"), requests_module.ObjectStore.put, []

        def stopped(self, name, local, size):
            if len(sent) == 2:
                raise KeyboardInterrupt
            sent.append(name)
            real(self, name, local, size)

        monkeypatch.setattr(requests_module.ObjectStore, "put", stopped)
        with pytest.raises(KeyboardInterrupt):
            copy(folder, far, options)
        assert sorted(stored("s3://bucket/mine")) == ["mine-000000.tar", "mine-000001.tar"]
        monkeypatch.setattr(requests_module.ObjectStore, "put", real)
        filesystem().pipe_file("s3://bucket/mine/mine-000001.tar", bytes(10240))  # another of the same size
        assert copy(folder, far, options)[::2] == (2, 1)
        assert stored("s3://bucket/mine") == content(folder)


def test_a_folder_goes_on_in_the_middle_of_a_shard_and_refuses_another_one(folder, tmp_path, options):
    with range_server(folder) as httpd:
        far, to = Address(f"{httpd.url}/set"), tmp_path / "to"
        to.mkdir()
        whole = (folder / "mine-000001.tar").read_bytes()
        (to / ".mine-000001.tar.part").write_bytes(whole[:4000])
        copy(far, to, options)
        assert content(to) == content(folder)
        asked = [ask for method, at, ask in httpd.seen if at.endswith("000001.tar") and method == "GET"]
        assert asked == [f"bytes=4000-{len(whole) - 1}"]
        shutil.rmtree(to)
        httpd.plans["/set/mine-000002.tar"] = ["damage"]
        with pytest.raises(ShardError, match=r"/mine-000002.tar is not the shard of the manifest \(SHA-256\)"):
            copy(far, to, options)
        assert sorted(content(to)) == ["mine-000000.tar", "mine-000001.tar"]  # no manifest, no part
        assert copy(far, to, options)[::2] == (1, 2)
        assert content(to) == content(folder)
        with pytest.raises(UserError, match="cannot be written over http://"):
            copy(folder, Address(f"{httpd.url}/other"), options)


@pytest.mark.parametrize(
    ("source", "target", "how"),
    [
        ("mine", "mine", "are the same place"),
        ("mine", "link", "are the same place"),
        ("mine", "mine/x", "lies in"),
        ("mine", "link/x/y", "lies in"),
        ("mine", ".", "lies in"),
        (".", "mine/x", "lies in"),
        ("mine", "other/../mine", "are the same place"),
    ],
)
def test_a_folder_is_not_copied_onto_itself(source, target, how, folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "link").symlink_to(folder)
    before = content(folder), sorted(tmp_path.rglob("*"))
    for places in ((tmp_path / source, tmp_path / target), (source, target), (f"file://{tmp_path}/{source}", target)):
        monkeypatch.chdir(tmp_path)
        assert main(["shards", "copy", *map(str, places), "--overwrite"]) == 2
        assert how in (error := capsys.readouterr().err) and "name a target beside it" in error
        assert (content(folder), sorted(tmp_path.rglob("*"))) == before


def test_addresses_that_overlap_are_refused(tmp_path):
    def apart(source, target):
        return check_apart(place_of(source), place_of(target))

    for source, target in (("s3://b/a", "S3://b/a/"), ("s3://b/a", "s3://b/a/x"), ("s3://b/a/x", "s3://b/a")):
        with pytest.raises(UserError, match="same place|lies in"):
            apart(source, target)
    apart("s3://b/a", "s3://b/ab")
    apart("s3://b/a", "gs://b/a/x")
    apart("s3://b/a", tmp_path)
    apart(tmp_path / "a", tmp_path / "ab")


def test_another_data_set_is_not_replaced_unasked(folder, tmp_path, options):
    write_shards(tmp_path / "other", records(text="b"), records_per_shard=3)
    copy(folder, tmp_path / "to", options)
    with pytest.raises(UserError, match="is another data set, or .* as it was before: .*--overwrite"):
        copy(tmp_path / "other", tmp_path / "to", options)
    assert content(tmp_path / "to") == content(folder)
    copy(tmp_path / "other", tmp_path / "to", options, overwrite=True)
    assert (tmp_path / "to" / MANIFEST).read_bytes() == (tmp_path / "other" / MANIFEST).read_bytes()
    shard = folder / "mine-000000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(ShardError, match="is not the shard of the manifest"):
        copy(folder, tmp_path / "third", options)


def test_shards_of_the_data_set_that_was_replaced_go(folder, tmp_path, options):
    """As after a repair: a shard has another name. What another name has stays, and so does all without overwrite."""
    there = tmp_path / "there"
    copy(folder, there, options)
    for name in ("other-000000.tar", "mine-notes.tar", "prepared.jsonl.gz"):
        (there / name).write_bytes(b"x")
    write_shards(tmp_path / "again", records(text="b"), name="mine", records_per_shard=3)
    (tmp_path / "again" / "prepared.jsonl.gz").write_bytes(b"ledger")
    (tmp_path / "again" / "missing.txt").write_bytes(b"a.png")
    (there / "mine-000007-r1.tar").write_bytes(b"left over")
    found = copy(tmp_path / "again", there, options, overwrite=True)
    assert found.removed == 1 and sorted(path.name for path in there.iterdir()) == sorted(
        ["mine-notes.tar", "missing.txt", "other-000000.tar", "prepared.jsonl.gz", "skipped.jsonl", MANIFEST]
        + [f"mine-{n:06d}.tar" for n in range(3)]
    )
    assert (there / "prepared.jsonl.gz").read_bytes() == b"ledger" and (there / "missing.txt").read_bytes() == b"a.png"


def test_a_damaged_manifest_at_the_target_is_named(folder, tmp_path, options):
    copy(folder, tmp_path / "there", options)
    manifest = tmp_path / "there" / MANIFEST
    manifest.write_bytes(manifest.read_bytes()[:-100])
    with pytest.raises(UserError, match="manifest.parquet cannot be parsed.*; --overwrite replaces what is there"):
        copy(folder, tmp_path / "there", options)
    assert copy(folder, tmp_path / "there", options, overwrite=True).already == 3
    assert content(tmp_path / "there") == content(folder)


def test_a_shard_of_another_size_is_named_at_once(folder, tmp_path, options):
    shard = folder / "mine-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ShardError, match="000001.tar is cut off: it has 9728 bytes, the manifest says 10240"):
        copy(folder, tmp_path / "there", options)


def test_targets(tmp_path):
    far = Address("s3://b/all")
    assert target_of(tmp_path, far, [tmp_path]) == {tmp_path: far}
    assert target_of(tmp_path, far, [tmp_path / "x", tmp_path / "y"]) == {
        tmp_path / "x": far / "x",
        tmp_path / "y": far / "y",
    }


@needs_s3
def test_the_commands(tmp_path, options, monkeypatch, capsys):
    shards = tmp_path / "shards"
    for stage in ("pretrain", "sft"):
        shutil.copytree(demo_shards() / stage, shards / stage)
    with s3(monkeypatch):
        cache = ["--cache", options.cache]
        assert main(["shards", "copy", str(shards), "s3://bucket/all", *cache]) == 0
        assert "s3://bucket/all/sft: " in capsys.readouterr().out
        assert main(["shards", "check", "s3://bucket/all", *cache]) == 0
        far = capsys.readouterr().out
        assert main(["shards", "check", str(shards), "--workers", "0"]) == 0
        assert far.replace("s3://bucket/all", str(shards)) == capsys.readouterr().out
        png = str(tmp_path / "stats.png")
        assert main(["shards", "stats", "s3://bucket/all", "--png", png, *cache]) == 0
        far = capsys.readouterr().out
        assert main(["shards", "stats", str(shards), "--png", png]) == 0
        assert far == capsys.readouterr().out
        sources = [f"data.sources.{name}.path=s3://bucket/all/{name}" for name in ("pretrain", "sft", "none")]
        assert main(["mixture", "data=demo", "~data.sources.demo", *sources, f"data.store.cache={options.cache}"]) == 0
        assert "1 of 3 data sets have no shards" in capsys.readouterr().out
        page = str(tmp_path / "page.html")
        assert (
            main(
                [
                    "preview",
                    "s3://bucket/all/sft",
                    "data=demo",
                    "--packs",
                    "1",
                    "--out",
                    page,
                    f"data.store.cache={options.cache}",
                ]
            )
            == 0
        )
        capsys.readouterr()
        files = filesystem()
        name = next(n for n in files.ls("s3://bucket/all/sft", detail=False) if n.endswith("0.tar"))
        data = bytearray(files.cat_file(name))
        data[700] ^= 1
        files.pipe_file(name, bytes(data))
        problems = check_at(Address("s3://bucket/all/sft"), config=DataConfig(store=options))
        (shards / "sft" / name.rpartition("/")[2]).write_bytes(data)
        assert problems == check_at(shards / "sft", config=DataConfig()) != []
        assert main(["shards", "check", "s3://bucket/all/sft", "--quick", *cache]) == 2


def test_commands_that_need_a_folder(capsys):
    assert main(["shards", "repair", "s3://bucket/set"]) == 2
    assert "molmo2 shards copy s3://bucket/set DIR; molmo2 shards repair DIR;" in capsys.readouterr().err
    assert main(["prepare", "own.jsonl", "--out", "s3://bucket/all"]) == 2
    assert "molmo2 prepare own.jsonl ... --out DIR; molmo2 shards copy DIR s3://bucket/all" in capsys.readouterr().err
    assert main(["shards", "copy", "s3://bucket/set"]) == 2
    assert "copy needs two places" in capsys.readouterr().err


def test_check_of_shared_media_fetches_the_shards_they_lie_in(tmp_path, options):
    made = ((f"k{i:02d}", {"json": b'{"images": ["0.jpg"]}', "0.jpg": bytes([i % 3]) * 5000}) for i in range(12))
    folder = tmp_path / "once"
    write_shards(folder, made, records_per_shard=4, media_once=True)
    with range_server(folder) as httpd:
        found = check_at(Address(f"{httpd.url}/set"), config=DataConfig(store=options))
        assert found == check_at(folder, config=DataConfig()) and len(found) == 12  # each for its picture, that is none
        assert {problem.key for problem in found} == {f"k{i:02d}" for i in range(12)}
        assert not list((tmp_path / "cache").glob("checking-*"))
