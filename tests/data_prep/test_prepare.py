"""Preparing a source: the same bytes whatever the workers and interruptions, and nothing lost when something fails."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.download import FAILED, DownloadError
from data_prep.output import Output
from data_prep.prepare import Options, Progress, prepare
from data_prep.record_builder import Built, member_key
from data_prep.sources.base import File, Inline, Manual, Sample, Skip, Source, SourceError, Table, Url
from data_prep.sources.shapes import qa
from molmo2_nemo.data.manifest import MANIFEST, read_entries
from molmo2_nemo.data.record import parse_record
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.errors import UserError

ROWS = 60


def png(seed, side=24):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def records(rows, ctx):
    for row in rows:
        if row["n"] % 7 == 3:
            yield Skip(str(row["n"]), "unwanted", "every seventh")
            continue
        pick = int(ctx.rng(str(row["n"])).integers(100))
        media = [Inline(b"broken") if row["n"] % 11 == 5 else Inline(png(row["n"]))]
        yield Sample(str(row["n"]), [qa(f"number {row['n']}?", str(pick))], images=media)


def source(**changes):
    values = dict(
        name="mine",
        mixes={},
        kind="pictures",
        origin=Manual("rows.jsonl from nowhere", (Table("rows.jsonl"),)),
        licence="CC0",
        fields={"n": int},
        records=records,
        counts_as=2,
    )
    return Source(**{**values, **changes})


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps({"n": n}) + "\n" for n in range(ROWS)))
    return folder


def options(raw, **changes):
    return Options(**{"folders": (raw,), "cache": raw.parent / "cache", "records_per_shard": 10, **changes})


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class StopAt(Progress):
    """Fails, or kills this process, once so many items are written."""

    def __init__(self, items, action):
        self.items, self.action = items, action

    def step(self, rows, output):
        if output.items >= self.items:
            self.action()


def interrupt():
    raise KeyboardInterrupt


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_is_written(raw, tmp_path):
    out = tmp_path / "out" / "mine"
    head = prepare(source(), out, options(raw)).head
    kept = [n for n in range(ROWS) if n % 7 != 3 and n % 11 != 5]
    data = ShardDataset(out)
    assert [data.read(i)[0].split(":")[1] for i in range(len(data))] == [str(n) for n in kept]
    assert data.counted == 2 * len(kept) == head["length"] and head["licence"] == "CC0"
    assert [shard["records"] for shard in data.shards] == [10] * (len(kept) // 10) + [len(kept) % 10]
    assert parse_record(*data.read(3)).images == [png(kept[3])]
    assert head["skipped"] == {"unwanted": 9, "image cannot be decoded": 4}
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [str(n) for n in range(ROWS) if n not in kept]
    entries = [entry for group in read_entries(out / MANIFEST) for entry in group]
    assert all(e.images == 1 and e.crops == 2 and e.tokens > 196 and e.frames is None for e in entries)
    assert not list(tmp_path.glob("out/*.partial")) and prepare(source(), out, options(raw)).already
    assert sorted(p.name for p in out.iterdir())[:2] == [MANIFEST, "mine-000000.tar"]
    data.verify()


def test_same_bytes_whatever_the_workers_and_interruptions(raw, tmp_path):
    prepare(source(), tmp_path / "a" / "mine", options(raw))
    once = content(tmp_path / "a" / "mine")
    prepare(source(), tmp_path / "b" / "mine", options(raw, workers=2))
    assert content(tmp_path / "b" / "mine") == once
    out = tmp_path / "c" / "mine"
    for stop in (1, 18, 18, 37, 59):  # before any shard is complete, twice at the same place, near the end
        with pytest.raises(KeyboardInterrupt):
            prepare(source(), out, options(raw), progress=StopAt(stop, interrupt))
        assert not out.exists() and not list(out.parent.glob("mine.partial/*.part"))
    done = [p.name for p in out.with_name("mine.partial").glob("*.tar")]
    assert len(done) == 4, "complete shards are kept"
    prepare(source(), out, options(raw))
    assert content(out) == once


def test_killed_and_called_again(raw, tmp_path):
    """SIGKILL of the main process while workers run: nothing complete is lost, no process stays behind."""
    out, others = tmp_path / "c" / "mine", _orphans()
    child = multiprocessing.get_context("fork").Process(
        target=prepare, args=(source(), out, options(raw, workers=1)), kwargs={"progress": StopAt(30, kill)}
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    partial = out.with_name("mine.partial")
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.tar")}
    assert len(before) == 2 and not out.exists()
    prepare(source(), out, options(raw))
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before, (
        "what was complete is not written again"
    )
    prepare(source(), tmp_path / "a" / "mine", options(raw))
    assert content(out) == content(tmp_path / "a" / "mine")
    deadline = time.monotonic() + 20
    while _orphans() - others and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _orphans() - others


def _orphans():
    """Workers on this machine that have lost their parent."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if b"multiprocessing" in command and b"spawn_main" in command and parent == 1:
            found.add(folder.name)
    return found


def test_half_of_an_upload_is_not_taken_for_a_shard(raw, tmp_path):
    """What a copy or a crash left half-written in the work folder is made anew."""
    out = tmp_path / "c" / "mine"
    with pytest.raises(KeyboardInterrupt):
        prepare(source(), out, options(raw), progress=StopAt(40, interrupt))
    partial = out.with_name("mine.partial")
    second = partial / "mine-000001.tar"
    second.write_bytes(second.read_bytes()[:700])
    (partial / "mine-000002.journal.json").write_text("{")
    prepare(source(), out, options(raw))
    prepare(source(), tmp_path / "a" / "mine", options(raw))
    assert content(out) == content(tmp_path / "a" / "mine")


def test_other_settings_are_refused(raw, tmp_path):
    out = tmp_path / "out" / "mine"
    prepare(source(), out, options(raw, limit=20))
    before = content(out)
    with pytest.raises(UserError, match=r"--limit: 20 there, none now.*--overwrite"):
        prepare(source(), out, options(raw))
    assert content(out) == before
    with pytest.raises(KeyboardInterrupt):
        prepare(source(), out, options(raw, overwrite=True), progress=StopAt(25, interrupt))
    assert content(out) == before, "the old one stays until the new one is complete"
    prepare(source(), out, options(raw, overwrite=True))
    assert len(ShardDataset(out)) > 20
    half = tmp_path / "half" / "mine"
    with pytest.raises(KeyboardInterrupt):
        prepare(source(), half, options(raw, seed=1), progress=StopAt(25, interrupt))
    with pytest.raises(UserError, match="seed: 1 there, 0 now"):
        prepare(source(), half, options(raw))
    prepare(source(), half, options(raw, overwrite=True))
    (tmp_path / "other" / "mine").mkdir(parents=True)
    (tmp_path / "other" / "mine" / "thesis.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises((UserError, ValueError), match="not a molmo2 data set"):
            prepare(source(), tmp_path / "other" / "mine", options(raw, overwrite=overwrite))


def test_another_writer_is_noticed(raw, tmp_path):
    out = tmp_path / "out" / "mine"
    with Output(out, options(raw).settings(source())), pytest.raises(UserError, match="another molmo2 prepare"):
        prepare(source(), out, options(raw))


def test_source_that_changed_in_between(raw, tmp_path):
    out = tmp_path / "out" / "mine"
    with pytest.raises(KeyboardInterrupt):
        prepare(source(), out, options(raw), progress=StopAt(25, interrupt))
    rows = raw / "rows.jsonl"
    lines = rows.read_text().splitlines(True)
    rows.write_text("".join(lines[1:]))
    with pytest.raises(UserError, match="begun with different rows"):
        prepare(source(), out, options(raw))
    rows.write_text("".join(lines[:5]))
    with pytest.raises(UserError, match="more rows than there are now; start over"):
        prepare(source(), out, options(raw))
    rows.write_text("".join(lines))
    prepare(source(), out, options(raw))


def test_full_disk(raw, tmp_path):
    out = tmp_path / "out" / "mine"
    ours, theirs = multiprocessing.Pipe()
    with pytest.raises(KeyboardInterrupt):
        prepare(
            source(), out, options(raw, records_per_shard=1000, bytes_per_shard=50_000), progress=StopAt(45, interrupt)
        )
    child = multiprocessing.get_context("fork").Process(target=small_disk, args=(out, raw, theirs))
    child.start()
    assert ours.poll(60)
    message = ours.recv()
    child.join()
    assert "no space left" in message and "run the command again" in message and "complete shards are kept" in message
    partial = out.with_name("mine.partial")
    kept = list(partial.glob("*.tar"))
    assert kept and not out.exists() and not list(partial.glob(".*.part"))
    prepare(source(), out, options(raw, records_per_shard=1000, bytes_per_shard=50_000))
    assert len(ShardDataset(out)) == 47


def small_disk(out, raw, pipe):
    """A file system on which no file may grow beyond 20 kB: what the kernel says is what a full one says."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        prepare(source(), out, options(raw, records_per_shard=1000, bytes_per_shard=50_000))
        pipe.send("it went through")
    except UserError as error:
        pipe.send(str(error))


def test_wrong_schema_names_the_field(raw, tmp_path):
    wrong = source(fields={"n": int, "question": str})
    with pytest.raises(SourceError, match=r"field 'question': is missing \(there are: n"):
        prepare(wrong, tmp_path / "out" / "mine", options(raw))
    with pytest.raises(SourceError, match="field 'n': text was expected, not 0"):
        prepare(source(fields={"n": str}), tmp_path / "out" / "mine", options(raw))
    assert not (tmp_path / "out" / "mine").exists()
    rows = (raw / "rows.jsonl").read_text()
    (raw / "rows.jsonl").write_text(rows + '{"n": "x"}\n' + '{"m": 1}\n')
    head = prepare(source(), tmp_path / "out" / "mine", options(raw)).head
    assert head["skipped"]["bad row"] == 2
    listed = (tmp_path / "out" / "mine" / "skipped.jsonl").read_text().splitlines()[-2:]
    assert "a whole number was expected, not 'x'" in listed[0] and "is missing" in listed[1]


def test_files_that_are_not_there(raw, tmp_path):
    with pytest.raises(SourceError, match=r"rows.jsonl not found below nowhere.*--source.*from nowhere"):
        prepare(source(), tmp_path / "out" / "mine", Options(cache=tmp_path / "cache"))

    def lost(rows, ctx):
        for row in rows:
            yield Sample(str(row["n"]), [qa("q", "a")], images=[File(f"pictures/{row['n']}")])

    (raw / "rows.jsonl").write_text("".join(json.dumps({"n": n}) + "\n" for n in range(300)))
    with pytest.raises(UserError, match=r"media not found: 300.*the first: 0, .*pictures/0 below .*--source"):
        prepare(source(records=lost), tmp_path / "out" / "mine", options(raw))
    listed = (tmp_path / "out" / "mine.missing.txt").read_text().splitlines()
    assert listed == sorted(f"pictures/{n}" for n in range(300))


def test_bad_samples_are_skipped_with_the_reason(raw, tmp_path):
    def odd(rows, ctx):
        for row in rows:
            n = row["n"]
            yield {
                0: Sample("0", [qa("q", "a")]),
                1: Sample("1", []),
                2: Sample("2", [{"style": "pointing", "label": "x", "points": [[1]]}]),
                3: Sample("0", [qa("q", "a")]),
                4: Sample("4", [qa("q", "a")], video=Inline(b"no video")),
                5: Sample("5", [{"style": "user_qa", "question": "q", "answer": float("nan")}]),
                6: Sample("6", [qa("q", "a")], images=[Url("ftp://host/x.jpg")]),
                7: Sample("7", [{"style": "user_qa", "question": "\ud800", "answer": "a"}]),
                8: Sample("8", [qa("q", "a")], weight=float("inf")),
            }.get(n, Sample(str(n), [qa("q", "a")]))

    head = prepare(source(records=odd), tmp_path / "out" / "mine", options(raw)).head
    lines = [json.loads(line) for line in (tmp_path / "out" / "mine" / "skipped.jsonl").read_text().splitlines()]
    found = [(line["key"], line["reason"]) for line in lines]
    assert found == [
        ("1", "bad sample"),
        ("2", "bad sample"),
        ("0", "duplicate key"),
        ("4", "video cannot be decoded"),
        ("5", "bad sample"),
        ("6", "not https"),
        ("7", "bad sample"),
        ("8", "bad sample"),
    ]
    assert head["records"] == ROWS - 8


def test_a_lost_network_loses_nothing(raw, tmp_path, monkeypatch):
    """Downloads that all fail stop the run; with the network back, the same call fetches what was missing."""
    monkeypatch.setattr("data_prep.giving_up.OUTAGE_AFTER", 10)
    there = {"network": True}

    def fetch(self, url, sha256=None):
        n = int(url.rpartition("/")[2])
        if n == 4 or (n > 25 and not there["network"]):
            raise DownloadError(url, "gone" if n == 4 else FAILED, "no route")
        path = self.cache / str(n)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(n))
        return path

    monkeypatch.setattr("data_prep.media.Downloader.fetch", fetch)

    def web(rows, ctx):
        for row in rows:
            yield Sample(str(row["n"]), [qa("q", "a")], images=[Url(f"http://host/{row['n']}")])

    out = tmp_path / "out" / "mine"
    there["network"] = False
    with pytest.raises(UserError, match="10 downloads in a row failed.*run the command again.*no route"):
        prepare(source(records=web), out, options(raw))
    assert len(list(out.with_name("mine.partial").glob("*.tar"))) == 2 and not out.exists()
    there["network"] = True
    head = prepare(source(records=web), out, options(raw)).head
    assert head["records"] == ROWS - 1 and head["skipped"] == {"gone": 1}


def test_full_cache(raw, tmp_path, monkeypatch):
    """A full disk under the cache is the same mistake as one under the shards."""

    def fetch(self, url, sha256=None):
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/x")

    monkeypatch.setattr("data_prep.media.Downloader.fetch", fetch)

    def web(rows, ctx):
        for row in rows:
            yield Sample(str(row["n"]), [qa("q", "a")], images=[Url("https://host/x")])

    with pytest.raises(UserError, match="no space left while writing /cache/x"):
        prepare(source(records=web), tmp_path / "out" / "mine", options(raw))


def test_shards_are_bounded_in_size(raw, tmp_path):
    head = prepare(
        source(), tmp_path / "out" / "mine", options(raw, records_per_shard=1000, bytes_per_shard=20_000)
    ).head
    assert len(head["shards"]) > 3 and all(shard["bytes"] <= 20_000 + 20 * 512 for shard in head["shards"])


def test_member_keys_are_plain_and_unique():
    keys = ["a", "a/b", "a b", "a_b", "A", "é", "", ".", "x" * 200, "x" * 201, "a.json"]
    names = [member_key(key) for key in keys]
    assert len(set(names)) == len(names) and names[0] == "a" and names[3] == "a_b"
    assert all(name.isascii() and len(name) <= 80 and "." not in name and "/" not in name for name in names)


def test_large_media_are_read_when_they_are_written(tmp_path):
    """Videos travel by their path; one that vanishes before it is written stops the run with its name."""
    big = tmp_path / "film.mp4"
    big.write_bytes(b"x" * 1000)
    with Output(tmp_path / "set", {}) as output:
        members = {"json": b'{"video": "mp4", "annotations": [{"style": "user_qa"}]}', "mp4": big}
        output.add("a", Built("a", members))
        big.unlink()
        with pytest.raises(FileNotFoundError, match="film.mp4"):
            output.add("b", Built("b", members))
