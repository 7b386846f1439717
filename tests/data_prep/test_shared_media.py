"""Shards whose records share media: prepared, interrupted, checked, indexed, repaired, drawn from."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_prep.media import Resolver
from data_prep.output import Output
from data_prep.prepare import Options, prepare_own
from data_prep.record_builder import Built
from data_prep.shard_repair import KEPT, repair
from data_prep.shard_stats import collect
from data_prep.shard_tools import check, index
from data_prep.sources.base import Prepared
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.manifest import MANIFEST, SHARED, read_entries, read_head
from molmo2_nemo.data.media_once import FIELD, MEDIA
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.data.shards import BLOCK, ShardDataset
from molmo2_nemo.errors import UserError

# The picture of each record. Shards of 5 records share in themselves and with others, and three bring new pictures.
SHOWN = (0, 1, 2, 3, 0) + (1, 2, 3, 0, 1) + (4, 1, 4, 5, 0) + (4, 5, 2, 1, 0) + (6, 6, 5, 1)
PICTURES, RECORDS = 7, len(SHOWN)


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def rows():
    return [{"image": f"{p}.png", "question": f"number {n}?", "answer": f"it is {n}"} for n, p in enumerate(SHOWN)]


def showing(picture):
    """Keys of its records."""
    return [f"{n:08d}" for n, shown in enumerate(SHOWN, 1) if shown == picture]


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    for n in range(PICTURES):
        (folder / f"{n}.png").write_bytes(png(n))
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return folder


def prepared(raw, out, **changes):
    options = Options(**{"cache": raw.parent / "cache", "records_per_shard": 5, **changes})
    return prepare_own(raw / "qa.jsonl", out, options)


@pytest.fixture
def made(raw, tmp_path):
    prepared(raw, tmp_path / "qa")
    return tmp_path / "qa"


def read(folder):
    """Key -> picture and JSON without the places of media, as training reads them."""
    data = ShardDataset(folder)
    found = {}
    for label, members in (data.read(i) for i in range(len(data))):
        fields = {name: value for name, value in json.loads(members["json"]).items() if name != FIELD}
        found[label.partition(":")[2]] = members["0.png"], fields
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def entry_of(folder, key):
    """(path of its tar, entry)."""
    for shard, entries in zip(read_head(folder / MANIFEST)["shards"], read_entries(folder / MANIFEST), strict=True):
        for entry in entries:
            if entry.key == key:
                return folder / shard["name"], entry
    raise AssertionError(key)


def own(entry, suffix="0.png"):
    return next(m for m in entry.members if m.suffix == suffix and m.owner is None)


def pictures_stored(folder):
    return [m.name for path in sorted(folder.glob("*.tar")) for m in tarfile.open(path) if m.name.endswith("png")]


# --- preparing -------------------------------------------------------------------------------------------------------


def test_both_ways_read_alike_and_one_takes_a_part_of_the_disk(raw, made, tmp_path, capsys):
    summary = prepared(raw, tmp_path / "full", repeat_media=True)
    assert SHARED not in summary.head and read(tmp_path / "full") == read(made) and len(read(made)) == RECORDS
    assert len(pictures_stored(made)) == PICTURES and len(pictures_stored(tmp_path / "full")) == RECORDS
    saved = sum(len(png(n)) for n in SHOWN) - sum(len(png(n)) for n in range(PICTURES))
    assert read_head(made / MANIFEST)[SHARED] == {"members": RECORDS - PICTURES, "bytes": saved}
    assert collect(made).bytes < 0.6 * collect(tmp_path / "full").bytes
    assert main(["shards", "stats", str(made), "--png", str(tmp_path / "stats.png")]) == 0
    assert f"{RECORDS - PICTURES} media are those of earlier records" in " ".join(capsys.readouterr().out.split())
    assert check(made) == [] == check(tmp_path / "full", workers=2)
    assert check(made, quick=True) == []


def test_a_set_prepared_before_is_found_complete_and_the_flag_makes_another(raw, made):
    assert prepared(raw, made).already
    with pytest.raises(UserError, match="--repeat-media"):
        prepared(raw, made, repeat_media=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_write_the_same_bytes(raw, made, tmp_path, workers):
    prepared(raw, tmp_path / "other" / "qa", workers=workers)
    assert contents(tmp_path / "other" / "qa") == contents(made)


CHILD = """
import os, signal, sys
from pathlib import Path
from data_prep import output
from data_prep.prepare import Options, prepare_own

class Killed(output.Output):
    def add(self, *args):
        super().add(*args)
        if self.records == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

import data_prep.prepare
data_prep.prepare.Output = Killed
raw = Path(sys.argv[1])
prepare_own(raw / "qa.jsonl", Path(sys.argv[2]), Options(cache=raw.parent / "cache", records_per_shard=5))
"""


@pytest.mark.parametrize("lost", ["nothing", "the map", "a part of the map"])
@pytest.mark.parametrize("at", [3, 6, 17])
def test_killed_and_resumed(raw, made, tmp_path, at, lost):
    out = tmp_path / "killed" / "qa"
    done = subprocess.run([sys.executable, "-c", CHILD, str(raw), str(out), str(at)], check=False)
    assert done.returncode == -signal.SIGKILL and not out.exists()
    partial = out.with_name("qa.partial")
    if lost == "the map":
        (partial / MEDIA).unlink(missing_ok=True)
        for path in partial.glob("*.journal.json"):
            journal = json.loads(path.read_text())
            del journal["media"]  # as a version wrote it that kept none
            path.write_text(json.dumps(journal))
    elif lost == "a part of the map" and (partial / MEDIA).exists():
        os.truncate(partial / MEDIA, 30)
    summary = prepared(raw, out)
    if lost == "the map":  # what was shared before is not counted, but nothing else differs
        assert {n: c for n, c in contents(out).items() if n != MANIFEST} == {
            n: c for n, c in contents(made).items() if n != MANIFEST
        }
        assert read(out) == read(made)
    else:
        assert contents(out) == contents(made)
    assert summary.head["records"] == RECORDS


def test_a_full_disk_keeps_what_is_complete(raw, made, tmp_path):
    out, code = (
        tmp_path / "full_disk" / "qa",
        (
            "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (12000, 12000))\n"
            "from pathlib import Path\nfrom data_prep.prepare import Options, prepare_own\n"
            "from molmo2_nemo.errors import UserError\nraw = Path(sys.argv[1])\n"
            "options = Options(cache=raw.parent / 'cache', records_per_shard=5)\n"
            "try: prepare_own(raw / 'qa.jsonl', Path(sys.argv[2]), options)\n"
            "except UserError as error: sys.exit(7 if 'no space left' in str(error) else 8)"
        ),
    )
    assert subprocess.run([sys.executable, "-c", code, str(raw), str(out)], check=False).returncode == 7
    prepared(raw, out)
    assert contents(out) == contents(made)


def test_json_that_would_get_too_long_keeps_its_own_copy(tmp_path, monkeypatch):
    from data_prep import output

    with Output(tmp_path / "dm", {"a": 1}) as out:
        for n in range(3):
            data = {"images": ["0.png"], "annotations": [{"style": "user_qa", "question": "q", "answer": "a" * 80 * n}]}
            built = Built(f"k{n}", {"json": json.dumps(data).encode(), "0.png": png(0)})
            longest = len(built.members["json"]) + (0 if n == 1 else 100)
            monkeypatch.setattr(output.LimitsConfig, "json_bytes", longest)
            out.add(str(n), built)
        out.finish({"name": "dm"})
    shared = [any(m.owner for m in e.members) for entries in read_entries(tmp_path / "dm" / MANIFEST) for e in entries]
    assert shared == [False, False, True]
    assert [picture for picture, _ in read(tmp_path / "dm").values()] == [png(0)] * 3


def test_media_drawn_from_a_set_that_shares_them(made):
    resolver = Resolver((), made.parent / "cache", None, prepared=made.parent)
    for n, picture in enumerate(SHOWN):
        assert resolver.read(Prepared("qa", n)) == (png(picture), "png")


# --- index -----------------------------------------------------------------------------------------------------------


def test_index_from_the_tars_alone(made, capsys):
    before, entries = read(made), list(read_entries(made / MANIFEST))
    (made / MANIFEST).unlink()
    assert main(["shards", "index", str(made)]) == 0
    assert list(read_entries(made / MANIFEST)) == entries and read(made) == before and check(made) == []
    head = read_head(made / MANIFEST)
    assert head[SHARED]["members"] == RECORDS - PICTURES and head["version"] == 3


def test_index_without_the_first_tar_lists_what_it_cannot_find(made, capsys):
    (made / MANIFEST).unlink()
    first = made / "qa-000000.tar"
    first.unlink()
    index(made)
    lines = [json.loads(line) for line in (made / "skipped.jsonl").read_text().splitlines()]
    lost = sorted(key for picture in range(4) for key in showing(picture) if int(key) > 5)
    assert [line["key"] for line in lines] == lost and len(read(made)) == RECORDS - 5 - len(lost)
    assert all(line["field"] == f"{FIELD}.0.png" and first.name in line["detail"] for line in lines)
    assert check(made) == []
    assert read_head(made / MANIFEST)["unused"] == ["qa-000001.tar"]


def test_preview_of_one_tar_says_what_it_leaves_out(made, tmp_path, capsys):
    from molmo2_nemo.cli.preview import _alone

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert len(ShardDataset(_alone(made / "qa-000000.tar", tmp_path / "a"))) == 5
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"qa-000000\.tar in this folder; bring that tar too"):
        _alone(made / "qa-000001.tar", tmp_path / "b")


# --- check -----------------------------------------------------------------------------------------------------------


def test_check_names_every_record_of_a_damaged_medium(made):
    path, entry = entry_of(made, "00000002")
    flip(path, own(entry).offset + 40)
    found = check(made)
    assert sorted(p.key for p in found if p.key) == showing(1)
    assert {p.shard for p in check(made, quick=True)} == {path.name}


def test_check_of_a_missing_and_of_a_renamed_tar(made):
    first = made / "qa-000000.tar"
    first.rename(made / "other.tar")
    assert [p.text for p in check(made)] == [
        "its bytes are intact in the file other.tar (SHA-256); molmo2 shards repair gives it its name"
    ]
    (made / "other.tar").rename(made.parent / "away.tar")
    found = check(made)
    lost = [key for picture in range(4) for key in showing(picture) if int(key) > 5]
    assert found[0].text == "is missing" and sorted(p.key for p in found[1:]) == sorted(lost)
    assert all("lie in qa-000000.tar, which is missing" in p.text for p in found[1:])


# --- repair ----------------------------------------------------------------------------------------------------------


def test_a_removed_record_leaves_the_media_that_others_show(made):
    before = read(made)
    path, entry = entry_of(made, "00000002")
    json_at = own(entry, "json").offset
    flip(path, json_at)  # no JSON any longer
    assert [p.key for p in repair(made)] == ["00000002"]
    left = {key: record for key, record in before.items() if key != "00000002"}
    assert read(made) == left and check(made) == []
    assert (made / KEPT / path.name).is_file() and not path.exists()
    entries = list(read_entries(made / MANIFEST))
    (made / MANIFEST).unlink()  # and the tars alone say the same
    head = index(made)
    assert head["passed_over"] == {"media of removed records that others show": 1} and "skipped" not in head
    assert [[(e.key, e.members, e.crc) for e in es] for es in entries] == [
        [(e.key, e.members, e.crc) for e in es] for es in read_entries(made / MANIFEST)
    ]
    assert read(made) == left and check(made) == []


def test_a_shard_without_records_stays_for_its_media(made):
    before = read(made)
    for n in range(1, 6):
        path, entry = entry_of(made, f"{n:08d}")
        flip(path, own(entry, "json").offset)
    assert len(repair(made)) == 5
    left = {key: record for key, record in before.items() if int(key) > 5}
    assert read(made) == left and check(made) == [] and check(made, quick=True) == []
    assert [shard["records"] for shard in read_head(made / MANIFEST)["shards"]] == [0, 5, 5, 5, 4]
    assert len(pictures_stored(made)) == PICTURES
    path, entry = entry_of(made, "00000007")  # another repair, of the tars that the first left
    flip(path, own(entry, "json").offset)
    flip(made / "qa-000000-r1.tar", os.path.getsize(made / "qa-000000-r1.tar") - 1)
    assert [p.key for p in repair(made)] == ["00000007"]
    assert read(made) == {key: record for key, record in left.items() if key != "00000007"} and check(made) == []
    assert sorted(path.name for path in made.glob("*.tar"))[0] == "qa-000000-r2.tar"
    (made / MANIFEST).unlink()
    index(made)
    assert len(read(made)) == RECORDS - 6 and check(made) == []


def test_a_damaged_medium_costs_its_records_unless_another_tar_has_it(made, tmp_path):
    before = read(made)
    copy = tmp_path / "copy.tar"
    path, entry = entry_of(made, "00000002")
    shutil.copy(path, copy)
    flip(path, own(entry).offset + 40)
    damaged = path.read_bytes()
    shutil.copytree(made, tmp_path / "second")
    assert [p.key for p in repair(made)] == showing(1)
    assert read(made) == {key: record for key, record in before.items() if key not in showing(1)} and check(made) == []
    assert (made / KEPT / path.name).read_bytes() == damaged

    again = tmp_path / "second"
    shutil.copy(copy, again / "spare.tar")
    flip(again / "spare.tar", os.path.getsize(copy) - 1)  # another file than the one that was damaged
    assert repair(again) == [] and read(again) == before
    (again / "spare.tar").unlink()
    assert check(again) == [] and read(again) == before and len(pictures_stored(again)) == PICTURES


def test_a_medium_that_only_another_records_copy_has_is_written_with_the_first_of_the_others(made, tmp_path):
    """The owner's JSON and medium are damaged, and whole nowhere together."""
    before = read(made)
    path, entry = entry_of(made, "00000002")
    write_shards(tmp_path / "lone", [("00000002", {"json": b"{}", "0.png": png(1)})])
    flip(path, own(entry).offset + 40)
    flip(path, own(entry, "json").offset)
    shutil.copy(tmp_path / "lone" / "lone-000000.tar", made / "spare.tar")
    assert [p.key for p in repair(made)] == ["00000002"]
    (made / "spare.tar").unlink()
    assert read(made) == {key: record for key, record in before.items() if key != "00000002"} and check(made) == []
    assert len(pictures_stored(made)) == PICTURES
    (made / MANIFEST).unlink()
    index(made)
    left = read(made)
    assert check(made) == [] and all(before[key] == record for key, record in left.items())
    assert "00000006" in left, "it has the medium itself, whatever its JSON says"


def test_a_damaged_header_of_a_shared_medium_is_healed(made):
    before = read(made)
    path, entry = entry_of(made, "00000002")
    flip(path, own(entry).offset - BLOCK + 130)
    assert sorted(p.key for p in check(made) if p.key) == showing(1)
    assert repair(made) == [] and read(made) == before and check(made) == []
    assert len(pictures_stored(made)) == PICTURES


def test_a_missing_shard(made):
    before = read(made)
    (made / "qa-000000.tar").unlink()
    lost = {f"{n:08d}" for n in range(1, 6)} | {key for picture in range(4) for key in showing(picture)}
    assert {p.key for p in repair(made)} == lost
    assert read(made) == {key: record for key, record in before.items() if key not in lost} and check(made) == []


def test_repair_renames_shards_back(made):
    before = contents(made)
    (made / "qa-000000.tar").rename(made / "between")
    (made / "qa-000001.tar").rename(made / "qa-000000.tar")
    (made / "between").rename(made / "qa-000001.tar")
    assert len(check(made)) == 2
    assert repair(made) == [] and contents(made) == before


def test_repair_that_is_killed_leaves_the_old_or_the_new(made, tmp_path):
    before = read(made)
    path, entry = entry_of(made, "00000002")
    flip(path, own(entry, "json").offset)
    left = {key: record for key, record in before.items() if key != "00000002"}
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom data_prep import shard_repair\n"
        "number = int(sys.argv[2])\n"
        "def kill(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "name = ['renumber', '_replace_manifest', '_put_aside'][number]\nsetattr(shard_repair, name, kill)\n"
        "shard_repair.repair(Path(sys.argv[1]))"
    )
    for number in range(3):
        folder = tmp_path / f"killed{number}" / "qa"
        shutil.copytree(made, folder)
        done = subprocess.run([sys.executable, "-c", code, str(folder), str(number)], check=False)
        assert done.returncode == -signal.SIGKILL
        repair(folder)
        assert read(folder) == left
        assert {p.text for p in check(folder)} <= {"is not listed in the manifest"}


def test_records_of_an_indexed_set_are_left_out_and_their_media_stay(made):
    (made / MANIFEST).unlink()
    index(made)
    before, tars = read(made), {name: c for name, c in contents(made).items() if name.endswith(".tar")}
    path, entry = entry_of(made, "00000002")
    flip(path, own(entry, "json").offset)
    assert [p.key for p in repair(made)] == ["00000002"]
    assert read(made) == {key: record for key, record in before.items() if key != "00000002"} and check(made) == []
    now = {name: c for name, c in contents(made).items() if name.endswith(".tar")}
    assert set(now) == set(tars) and sum(now[name] != tars[name] for name in tars) == 1
