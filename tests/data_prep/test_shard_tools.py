"""molmo2 shards: what is damaged is found and named, repaired without it, described and indexed."""

from __future__ import annotations

import json
import shutil
import tarfile

import pytest
from PIL import Image

from data_prep.shard_repair import repair
from data_prep.shard_tools import check
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.manifest import MANIFEST, ShardError, read_entries, read_head
from molmo2_nemo.data.shards import ShardDataset


@pytest.fixture
def sft(shards, tmp_path):
    return shutil.copytree(shards / "sft", tmp_path / "sets" / "sft")


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def member(folder, suffix, shard=0):
    """(key, offset of the middle) of the first member of a kind in a shard."""
    entries = list(read_entries(folder / MANIFEST))[shard]
    for entry in entries:
        for m in entry.members:
            if m.suffix.endswith(suffix):
                return entry.key, m.offset + m.size // 2
    raise AssertionError(suffix)


def showing(folder, key, suffix):
    """Keys of the records that show the first medium of a kind of a record, itself first -> their shards."""
    found = {}
    for shard, entries in zip(read_head(folder / MANIFEST)["shards"], read_entries(folder / MANIFEST), strict=True):
        for e in entries:
            own = e.key == key or any(
                (m.owner or "").startswith(f"{key}.") and m.suffix.endswith(suffix) for m in e.members
            )
            found |= {e.key: shard["name"]} if own else {}
    return found


def keys(folder):
    data = ShardDataset(folder)
    return [data.read(i)[0].split(":")[1] for i in range(len(data))]


def test_good_shards(shards, sft, capsys):
    assert main(["shards", "check", str(shards), "--workers", "0"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("good") == 3 and all(name in shown for name in ("pretrain", "sft", "long"))
    assert repair(sft) == []


@pytest.mark.parametrize("suffix", ["json", "jpg", "mp4"])
def test_one_flipped_bit_costs_the_records_that_show_it(sft, suffix, capsys):
    shard = min(sft.glob("*.tar"))
    if suffix == "mp4":
        shard = next(
            p for p in sorted(sft.glob("*.tar")) if any(m.endswith(".mp4") for m in tarfile.open(p).getnames())
        )
    number = sorted(sft.glob("*.tar")).index(shard)
    key, offset = member(sft, suffix, number)
    before, lost = keys(sft), showing(sft, key, suffix)
    assert len(lost) == {"json": 1, "jpg": 2, "mp4": 2}[suffix], "a medium is written once, whoever shows it"
    flip(shard, offset)
    assert main(["shards", "check", str(sft.parent), "--workers", "0"]) == 2
    shown = capsys.readouterr().out
    assert f"{shard.name}:{key}: its contents changed" in shown and "SHA-256" in shown
    assert main(["shards", "check", str(sft), "--quick", "--workers", "0"]) == 2
    assert main(["shards", "repair", str(sft.parent)]) == 0
    removed = "1 record removed" if len(lost) == 1 else f"{len(lost)} records removed"
    assert f"{removed}\n  {shard.name}:{key}" in capsys.readouterr().out
    assert keys(sft) == [k for k in before if k not in lost] and check(sft) == []
    assert not shard.exists() and shard.with_name(f"{shard.stem}-r1.tar").is_file()
    assert {p.name for p in (sft / "kept-by-repair").iterdir()} == {MANIFEST, *lost.values()}
    head = read_head(sft / MANIFEST)
    assert head["records"] == head["length"] == len(before) - len(lost)
    assert head["skipped"] == {"removed by repair": len(lost)}
    assert [json.loads(line)["key"] for line in (sft / "skipped.jsonl").read_text().splitlines()] == list(lost)
    ShardDataset(sft).verify()


def test_cut_and_missing_shards(sft, capsys):
    first, second = sorted(sft.glob("*.tar"))[:2]
    entries = list(read_entries(sft / MANIFEST))
    end = entries[0][3].members[-1]
    first.write_bytes(first.read_bytes()[: end.offset + end.size + 100])  # within the fifth record
    second.unlink()
    problems = check(sft)
    assert {(p.shard, p.key) for p in problems if p.key} == {(first.name, e.key) for e in entries[0][4:]}
    assert (second.name, "is missing") in {(p.shard, p.text) for p in problems}
    lost = repair(sft)
    assert [p.key for p in lost] == [e.key for e in entries[0][4:]] + [e.key for e in entries[1]]
    assert keys(sft) == [e.key for e in entries[0][:4]] + [e.key for group in entries[2:] for e in group]
    assert check(sft) == []
    for path in sft.glob("*.tar"):
        path.unlink()
    assert main(["shards", "repair", str(sft)]) == 2
    assert "nothing was changed" in capsys.readouterr().err


def test_repair_that_was_stopped(sft, monkeypatch):
    """Before the manifest is replaced the data set is the old one; afterwards the new one: calling again is enough."""
    shard = min(sft.glob("*.tar"))
    key, offset = member(sft, "json")
    flip(shard, offset)

    def listed():
        return [entry.key for entries in read_entries(sft / MANIFEST) for entry in entries]

    before = listed()

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.shard_repair._replace_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            repair(sft)
    assert shard.exists() and listed() == before
    assert [p.key for p in repair(sft)] == [key]
    assert [p.text for p in check(sft)] == ["is not listed in the manifest"]


def test_a_tar_that_the_manifest_does_not_describe(sft):
    """Same size, and even the same checksum in the manifest: the structure gives it away."""
    shard = min(sft.glob("*.tar"))
    shutil.copy(shard, sft / "extra.tar")
    assert [(p.shard, p.text) for p in check(sft)] == [("extra.tar", "is not listed in the manifest")]


def test_statistics(shards, tmp_path, capsys):
    assert main(["shards", "stats", str(shards), "--png", str(tmp_path / "stats.png")]) == 0
    shown = capsys.readouterr().out
    counted = {name: len(ShardDataset(shards / name)) for name in ("pretrain", "sft", "long")}
    for name, count in counted.items():
        line, cost = [line for line in shown.splitlines() if line.startswith(f"{name} ")]
        assert line.split()[1] == str(count) and len(line.split()) == 8 and len(cost.split()) == 6
    assert max(map(len, shown.splitlines())) <= 80
    assert not (shards / "stats.png").exists()
    assert "ATTRIBUTION.md" in shown, "licences are listed"
    with Image.open(tmp_path / "stats.png") as image:
        assert (
            image.size[0] > 800 and len(image.convert("L").histogram()) and len(set(image.convert("L").getdata())) > 20
        )


def test_damaged_manifest(sft):
    """Wherever a bit flips: an error, or everything reads as it was written."""
    path = sft / MANIFEST
    good, content = list(read_entries(path)), path.read_bytes()
    refused = 0
    for offset in range(10, len(content), 97):
        flipped = bytearray(content)
        flipped[offset] ^= 0x10
        path.write_bytes(flipped)
        try:
            found = list(read_entries(path))
            read_head(path)
        except ShardError as error:
            assert MANIFEST in str(error)
            refused += 1
        else:
            assert found == good, offset
    assert refused > 10
