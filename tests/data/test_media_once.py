"""Media that several records show are written once, and read as if they had been written with each."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import tarfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest

from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.manifest import MANIFEST, SHARED, read_entries, read_head, write_manifest_file
from molmo2_nemo.data.media_once import FIELD, MEDIA, MediaOnce, Places, digest
from molmo2_nemo.data.record import BadRecord, parse_record
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.data.tar_manifest import write_manifest
from molmo2_nemo.errors import DataError

PICTURES = [bytes([n]) * (1000 + n) for n in range(6)]
NUMBER = 40


def records():
    """40 records of one or two of 6 pictures."""
    rng = random.Random(0)
    for i in range(NUMBER):
        shown = rng.sample(PICTURES, 1 + i % 2)
        names = [f"{n}.jpg" for n in range(len(shown))]
        data = {"images": names, "annotations": [{"style": "user_qa", "question": "q", "answer": f"a {i}"}]}
        yield f"k{i:03d}", {"json": json.dumps(data).encode(), **dict(zip(names, shown, strict=True))}


@pytest.fixture
def made(tmp_path):
    write_shards(tmp_path / "dm", records(), records_per_shard=7, media_once=True)
    return tmp_path / "dm"


def read_all(folder):
    data = ShardDataset(folder)
    return [data.read(i) for i in range(len(data))]


def without_owners(raw):
    return {name: value for name, value in json.loads(raw).items() if name != FIELD}


def assert_as_written(found):
    assert len(found) == NUMBER
    for (label, members), (key, wanted) in zip(found, records(), strict=True):
        assert label.endswith(f":{key}") and set(members) == set(wanted)
        assert all(members[suffix] == wanted[suffix] for suffix in wanted if suffix != "json")
        assert without_owners(members["json"]) == json.loads(wanted["json"])
        parse_record(label, members)


def entries_of(folder):
    return list(read_entries(folder / MANIFEST))


def rewrite(folder, change):
    """Write the manifest with every shared member changed."""
    head, listed = read_head(folder / MANIFEST), entries_of(folder)
    for entry in (entry for entries in listed for entry in entries):
        entry.members = [m if m.owner is None else change(m) for m in entry.members]
    write_manifest_file(folder / MANIFEST, head, listed)


def test_every_medium_is_in_the_tars_once_and_every_record_reads_as_written(made, tmp_path):
    write_shards(tmp_path / "full", records(), records_per_shard=7)
    assert_as_written(read_all(made))
    assert_as_written(read_all(tmp_path / "full"))
    stored = [
        tar.extractfile(m).read() for path in sorted(made.glob("*.tar")) for tar in [tarfile.open(path)] for m in tar
    ]
    media = [content for content in stored if not content.startswith(b"{")]
    assert sorted(media) == sorted(PICTURES)
    head = read_head(made / MANIFEST)
    shown = [m for _, members in records() for suffix, m in members.items() if suffix != "json"]
    assert head[SHARED] == {"members": len(shown) - 6, "bytes": sum(map(len, shown)) - sum(map(len, PICTURES))}
    assert sorted(path.name for path in made.iterdir() if path.suffix != ".tar") == [MANIFEST]


def test_older_readers_are_told_by_the_version_and_sets_without_shared_media_keep_theirs(made, tmp_path):
    assert read_head(made / MANIFEST)["version"] == 3
    single = [pair for pair in records() if len(pair[1]) == 2][:1]
    write_shards(tmp_path / "full", records(), records_per_shard=7)
    write_shards(tmp_path / "single", single, media_once=True)
    write_shards(tmp_path / "single_before", single, name="single")
    for name in ("full", "single"):
        head = read_head(tmp_path / name / MANIFEST)
        assert head["version"] == 2 and SHARED not in head
    one, other = ((tmp_path / name / MANIFEST).read_bytes() for name in ("single", "single_before"))
    assert one == other


def test_the_json_names_the_owner(made):
    named = 0
    for _, members in read_all(made):
        for suffix, place in json.loads(members["json"]).get(FIELD, {}).items():
            tar, _, name = place.partition(":")
            with tarfile.open(made / tar) as file:
                assert file.extractfile(name).read() == members[suffix]
            named += 1
    assert named == read_head(made / MANIFEST)[SHARED]["members"]


def test_the_manifest_is_made_again_from_the_tars_alone(made):
    before = entries_of(made)
    (made / MANIFEST).unlink()
    head = write_manifest(made, "dm")
    assert head["name"] == "dm" and entries_of(made) == before
    assert_as_written(read_all(made))


def test_a_tar_that_was_not_brought_is_named(made):
    (made / MANIFEST).unlink()
    first = sorted(made.glob("*.tar"))[0]
    first.unlink()
    with pytest.raises(BadRecord, match=rf"which is not there; expected {first.name} in this folder; bring that tar"):
        write_manifest(made, "dm")
    lost = []
    write_manifest(made, "dm", left_out=lambda shard, key, error: lost.append(key))
    left = {label.partition(":")[2]: members for label, members in read_all(made)}
    wanted = dict(records())
    assert lost and sorted([*left, *lost]) == sorted(wanted)[7:]
    assert all(left[key]["0.jpg"] == wanted[key]["0.jpg"] for key in left)


@pytest.mark.parametrize(
    "named",
    [
        5,
        [],
        {"0.jpg": 5},
        {"0.jpg": ""},
        {"0.jpg": "../x.tar:k.0.jpg"},
        {"0.jpg": "/etc/x.tar:k"},
        {"0.jpg": "dm.tar:k1.0.jpg"},
    ],
)
def test_hostile_names_of_owners(tmp_path, named):
    data = {"images": ["0.jpg"], FIELD: named, "annotations": [{"style": "user_qa", "question": "q", "answer": "a"}]}
    other = {**data, FIELD: {"0.jpg": "dm.tar:k0.0.jpg"}}  # and a circle
    content = {f"k{n}": {"json": json.dumps(d).encode()} for n, d in enumerate((data, other))}
    write_shards(tmp_path / "dm", content.items())
    (tmp_path / "dm" / "dm-000000.tar").rename(tmp_path / "dm" / "dm.tar")
    lost = {}
    with pytest.raises(DataError, match="none of the records"):
        write_manifest(tmp_path / "dm", "dm", left_out=lambda shard, key, error: lost.update({key: error}))
    assert set(lost) == {"k0", "k1"} and all(error.fault.field.startswith(FIELD) for error in lost.values())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: replace(m, shard=99), "outside the data set"),
        (lambda m: replace(m, shard=-1), "outside the data set"),
        (lambda m: replace(m, shard=None), "outside the data set"),
        (lambda m: replace(m, offset=2**40), "outside the data set"),
        (lambda m: replace(m, offset=-4096), "outside the data set"),
        (lambda m: replace(m, offset=0), "outside the data set"),
        (lambda m: replace(m, offset=m.offset - 512), "record .* damaged|does not match|outside the data set"),
        (lambda m: replace(m, shard=m.shard + 1), "record .* damaged|does not match its index"),
        (lambda m: replace(m, owner="other.0.jpg"), "does not match its index"),
        (lambda m: replace(m, owner="noending"), "has no suffix"),
        (lambda m: replace(m, size=m.size - 1), "does not match its index"),
        (lambda m: replace(m, size=-1), "negative size"),
        (lambda m: replace(m, size=2**40), "record_bytes"),
    ],
)
def test_a_hostile_manifest_is_refused(made, change, says):
    shares = [i for i, (_, members) in enumerate(read_all(made)) if FIELD.encode() in members["json"]]
    rewrite(made, change)
    data = ShardDataset(made)
    for i in shares:
        with pytest.raises(DataError, match=says):
            data.read(i)


def test_another_medium_of_the_same_size_is_noticed(made):
    """A pointer to another medium of equal name length and size: the record's checksum is that of its contents."""
    other = {"k000": dict(records())["k000"], "k001": {**dict(records())["k000"], "0.jpg": b"?" * 1000}}
    other["k001"]["0.jpg"] = b"?" * len(other["k000"]["0.jpg"])
    write_shards(made, [*other.items(), ("k002", other["k001"])], overwrite=True, media_once=True)
    first = entries_of(made)[0][0].members[0]
    rewrite(made, lambda m: replace(m, offset=first.offset, owner="k000.0.jpg"))
    with pytest.raises(BadRecord, match=r"contents changed: CRC-32 .*its \.0\.jpg is k000\.0\.jpg of dm-000000\.tar"):
        ShardDataset(made).read(2)


def test_limits_of_a_record_count_shared_media(made):
    labels = [i for i, (_, members) in enumerate(read_all(made)) if FIELD.encode() in members["json"]]
    data = ShardDataset(made, limits=LimitsConfig(record_bytes=1100))
    for i in labels:
        with pytest.raises(BadRecord, match=r"data\.limits\.record_bytes"):
            data.read(i)


def test_forked_workers_read_shared_media(made):
    data = ShardDataset(made)
    data.read(NUMBER - 1)  # files are open already
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as pool:
        assert_as_written(list(pool.map(data.read, range(NUMBER))))


def test_damage_of_a_medium_is_found_in_every_record_that_shows_it(made):
    member = entries_of(made)[0][0].members[0]
    path = made / "dm-000000.tar"
    content = bytearray(path.read_bytes())
    content[member.offset + 3] ^= 1
    path.write_bytes(content)
    shown = dict(records())["k000"]["0.jpg"]
    data = ShardDataset(made)
    for i, (_, members) in enumerate(records()):
        if shown in members.values():
            with pytest.raises(BadRecord, match="contents changed"):
                data.read(i)
        else:
            data.read(i)


def test_places_are_those_of_a_dictionary():
    places, wanted, rng = Places(), {}, random.Random(1)
    for n in range(1, 6000):
        key = bytes(rng.choices(range(3), k=16)) if n % 2 else digest(str(n).encode())  # many of the same slot
        places.add(key, n)
        wanted.setdefault(key, n)
    assert len(places) == len(wanted) and all(places.get(key) == n for key, n in wanted.items())
    assert places.get(digest(b"another")) == 0
    assert places.nbytes <= 72 * len(wanted)


def test_the_map_is_made_again_where_its_file_is_lost(made):
    names = [shard["name"] for shard in read_head(made / MANIFEST)["shards"]]
    once = MediaOnce(made, names, None)
    again = once.find({f"{n}.jpg": content for n, content in enumerate(PICTURES)})
    state = once.state()
    once.close()
    assert len(again) == 6 and state[0] == os.path.getsize(made / MEDIA) == 6 * 24
    listed = {(m.shard, m.offset): m for entries in entries_of(made) for e in entries for m in e.members if m.owner}
    assert all(listed[m.shard, m.offset].owner == m.owner for m in again.values() if (m.shard, m.offset) in listed)
    short = MediaOnce(made, names, [state[0] + 24, 0, 0])  # the file is shorter than it was said to be
    assert short.find({"0.jpg": PICTURES[2]})["0.jpg"] == replace(again["2.jpg"], suffix="0.jpg")
    short.close()
