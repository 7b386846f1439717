"""molmo2 shards repair loses nothing that is whole: renamed shards, records in other tars, interruptions, originals."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile

import pytest

from data_prep import misnamed
from data_prep.shard_repair import KEPT, LOCK, repair
from data_prep.shard_tools import check, index
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.manifest import MANIFEST, read_entries, read_head
from molmo2_nemo.data.record import BadRecord
from molmo2_nemo.data.shard_writer import lock_file, write_shards
from molmo2_nemo.data.shards import BLOCK, ShardDataset
from molmo2_nemo.errors import DataError

QA = {"style": "user_qa", "question": "q"}


def written(folder, start=0, number=12):
    """Shards of 4 records with texts of different lengths, so that their files have equal sizes."""
    made = {}
    for i in range(start, start + number):
        made[f"r{i}"] = {"json": json.dumps({"annotations": [{**QA, "answer": f"answer {i} " + "x" * i}]}).encode()}
    write_shards(folder, made.items(), records_per_shard=4)
    return folder


@pytest.fixture
def made(tmp_path):
    return written(tmp_path / "dm")


def exchange(one, other):
    between = one.with_suffix(".between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def contents(folder):
    """Name of each file -> its bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def read(folder):
    """Key -> members, as training reads them."""
    data = ShardDataset(folder)
    records = [data.read(i) for i in range(len(data))]
    return {label.split(":")[1]: members for label, members in records}


def damage(folder, key, *, header=False):
    """Flip a bit of a record, or of its tar header."""
    for shard, entries in zip(read_head(folder / MANIFEST)["shards"], read_entries(folder / MANIFEST), strict=True):
        for entry in entries:
            if entry.key == key:
                path = folder / shard["name"]
                content = bytearray(path.read_bytes())
                content[entry.members[0].offset - (BLOCK - 130 if header else -20)] ^= 1
                path.write_bytes(content)
                return path
    raise AssertionError(key)


def test_swapped_shards_are_renamed_back(made, capsys):
    before = contents(made)
    tars = sorted(made.glob("*.tar"))
    exchange(tars[0], tars[1])
    assert main(["shards", "check", str(made), "--workers", "0"]) == 2
    shown = capsys.readouterr().out
    assert "2 problems" in shown and f"{tars[0].name}: its bytes are intact in the file {tars[1].name}" in shown
    assert main(["shards", "repair", str(made)]) == 0
    shown = capsys.readouterr().out
    assert "no record removed" in shown and f"{tars[0].name} is the manifest's {tars[1].name}" in shown
    assert contents(made) == before and check(made) == []


def test_what_is_no_record_is_removed_and_said(made, capsys):
    """Bytes behind the end of a tar: no record is lost, and yet there is something to say."""
    before, path = read(made), sorted(made.glob("*.tar"))[0]
    whole = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"rubbish" * 500)
    assert main(["shards", "repair", str(made)]) == 0
    first, mended, kept = capsys.readouterr().out.splitlines()[:3]
    assert first == f"{made}: no record removed"
    assert mended.startswith(f"  {path.name} is written anew as {path.stem}-r1.tar with ")
    assert mended.endswith(f" records: has {whole + 3500} bytes, the manifest says {whole}")
    assert kept.startswith(f"  what was replaced is in {made / KEPT}: {path.name}")
    assert read(made) == before and check(made) == []
    assert main(["shards", "repair", str(made)]) == 0
    assert capsys.readouterr().out.startswith(f"{made}: nothing to repair\n")


@pytest.mark.parametrize("name", ["dm-000001 (1).tar", "dm-000001.tar.1", "other.tar"])
def test_a_renamed_shard_is_found(made, name):
    before = contents(made)
    (made / "dm-000001.tar").rename(made / name)
    assert [p.shard for p in check(made)] == ["dm-000001.tar"]
    assert repair(made) == [] and contents(made) == before


def test_renaming_that_was_stopped_is_finished_by_another_call(made, monkeypatch):
    before = contents(made)
    tars = sorted(made.glob("*.tar"))
    rename = os.rename
    for number in range(4):
        exchange(tars[0], tars[1])
        left = iter(range(number))

        def stops(source, target, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(misnamed.os, "rename", stops)
            with pytest.raises(KeyboardInterrupt):
                repair(made)
        assert sorted(contents(made).values()) == sorted(before.values()), "every file is still there"
        assert next(left, None) is None and contents(made) != before
        assert repair(made) == [] and contents(made) == before


def test_one_repair_at_a_time(made):
    damage(made, "r5")
    held = lock_file(made / LOCK)
    before = contents(made)
    with pytest.raises(DataError, match="is being repaired by another process"):
        repair(made)
    assert contents(made) == before
    held.close()
    assert [problem.key for problem in repair(made)] == ["r5"]
    assert not (made / LOCK).exists() and check(made) == []


def test_swapped_and_one_of_them_damaged(made):
    whole = read(made)
    path = damage(made, "r1")
    damaged = path.read_bytes()
    exchange(*sorted(made.glob("*.tar"))[:2])
    said = []
    assert [p.key for p in repair(made, said=said)] == ["r1"]
    assert read(made) == {key: members for key, members in whole.items() if key != "r1"} and check(made) == []
    assert damaged in contents(made / KEPT).values() and str(made / KEPT) in said[-1]


def test_a_record_that_is_whole_in_another_tar_is_taken_from_there(made, tmp_path):
    whole = read(made)
    path = damage(made, "r1")
    second = damage(made, "r6")
    other = written(tmp_path / "again", 6, 6)  # the same record at another place
    shutil.copy(min(other.glob("*.tar")), made / "again.tar")
    shutil.copy(path, made / "copy.tar")
    damaged = [path.read_bytes(), second.read_bytes()]
    assert [p.key for p in repair(made)] == ["r1"]
    assert read(made) == {key: members for key, members in whole.items() if key != "r1"}
    assert set(damaged) <= set(contents(made / KEPT).values())


def retarred(path):
    """The same members in another order of records."""
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, content in reversed(members):
            tar.addfile(info, io.BytesIO(content))


def inserted(path):
    """A block of zeros behind the second member."""
    content = path.read_bytes()
    path.write_bytes(content[: 4 * BLOCK] + bytes(BLOCK) + content[4 * BLOCK :])


def shifted(path):
    """A few bytes less at the start of the second record: what follows lies at odd places."""
    content = path.read_bytes()
    path.write_bytes(content[: 2 * BLOCK + 100] + content[2 * BLOCK + 107 :])


@pytest.mark.parametrize(("change", "lost"), [(retarred, []), (inserted, []), (shifted, ["r5"])])
@pytest.mark.parametrize("name", ["", "other.tar"])
def test_records_at_other_places_of_their_own_tar(made, change, lost, name):
    whole = read(made)
    path = sorted(made.glob("*.tar"))[1]
    change(path)
    if name:
        path = path.rename(made / name)
    damaged = path.read_bytes()
    assert [problem.key for problem in repair(made)] == lost
    assert read(made) == {key: members for key, members in whole.items() if key not in lost}
    assert [problem.shard for problem in check(made)] == ([name] if name else []), "a tar that no manifest lists"
    assert damaged in contents(made if name else made / KEPT).values()


def test_a_missing_shard_can_come_back_with_the_manifest_kept(made, tmp_path):
    before = contents(made)
    (made / "dm-000002.tar").rename(tmp_path / "away.tar")
    assert [p.text for p in repair(made)] == ["its shard is missing"] * 4
    (tmp_path / "away.tar").rename(made / "dm-000002.tar")
    (made / KEPT / MANIFEST).rename(made / MANIFEST)
    assert check(made) == [] and contents(made) == {**before, "skipped.jsonl": (made / "skipped.jsonl").read_bytes()}


def test_a_manifest_of_another_data_set_changes_nothing(made, tmp_path):
    other = written(tmp_path / "other", 50)
    for path in other.glob("*.tar"):
        path.rename(path.with_name(path.name.replace("other", "dm")))
    shutil.copy(made / MANIFEST, other)
    before = contents(other)
    assert main(["shards", "repair", str(other)]) == 2
    assert contents(other) == before and not (other / KEPT).exists()


def test_records_that_were_added_to_a_tar_are_not_deleted(made):
    path = made / "dm-000000.tar"
    with tarfile.open(path, "a") as tar:
        tar.add(made / MANIFEST, "new.json")
    grown = path.read_bytes()
    assert repair(made) == [] and grown == (made / KEPT / path.name).read_bytes()


@pytest.mark.parametrize("quick", [False, True])
def test_check_names_what_training_refuses_and_repair_heals_headers(made, quick):
    whole = read(made)
    damage(made, "r1")
    damage(made, "r2", header=True)
    path = damage(made, "r7", header=True)
    data, refused = ShardDataset(made), {}
    for i in range(len(data)):
        try:
            data.read(i)
        except BadRecord as error:
            refused[error.key.split(":")[1]] = error.detail
    found = {p.key: p.text for p in check(made, quick=quick) if p.key}
    assert set(found) == set(refused) == {"r1", "r2", "r7"}
    assert found["r2"] == refused["r2"] and found["r7"] == refused["r7"] and "damaged tar header" in found["r7"]
    assert [p.key for p in repair(made)] == ["r1"]
    assert read(made) == {key: members for key, members in whole.items() if key != "r1"}
    assert not path.exists() and not (made / KEPT / path.name).exists(), "all it held is in the new one"


def test_tars_of_another_tool(made):
    """They are neither renamed nor rewritten; a record with a damaged header is left out, as training refuses it."""
    (made / MANIFEST).unlink()
    index(made)
    before = read(made)
    tars = sorted(made.glob("*.tar"))
    exchange(tars[0], tars[1])
    with pytest.raises(DataError, match=f"rename {tars[0].name} to {tars[1].name}, rename {tars[1].name}"):
        repair(made)
    exchange(tars[0], tars[1])
    content = damage(made, "r2", header=True).read_bytes()
    assert [p.key for p in repair(made)] == ["r2"] and check(made) == [] and repair(made) == []
    assert tars[0].read_bytes() == content
    assert read(made) == {key: members for key, members in before.items() if key != "r2"}


def test_index_names_every_tar_that_cannot_be_read(made, capsys):
    first = damage(made, "r1", header=True)
    last = made / "dm-000002.tar"
    last.write_bytes(last.read_bytes()[:3000])
    (made / MANIFEST).unlink()
    assert main(["shards", "index", str(made)]) == 2
    shown = capsys.readouterr().err
    assert "2 of 3 tars cannot be read" in shown and f"{first}: no tar header" in shown and f"{last} is cut" in shown
    assert not (made / MANIFEST).exists()
    for path in (first, last):
        path.rename(path.with_suffix(".damaged"))
    assert main(["shards", "index", str(made)]) == 0 and set(read(made)) == {"r4", "r5", "r6", "r7"}


def test_a_new_tar_with_the_name_of_a_missing_one_is_not_put_aside(made):
    before = read(made)
    damage(made, "r5")
    assert [p.key for p in repair(made)] == ["r5"]
    tar = made / "dm-000001-r1.tar"
    spare = bytearray(tar.read_bytes())
    tar.unlink()
    spare[-1] ^= 1  # behind the last record
    (made / "spare.tar").write_bytes(spare)
    assert repair(made) == [] and tar.is_file()
    (made / "spare.tar").unlink()
    assert check(made) == [] and read(made) == {key: record for key, record in before.items() if key != "r5"}
