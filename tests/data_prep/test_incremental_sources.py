"""A second call for media of every kind: downloads, folders of frames, archives, published sets, several processes."""

from __future__ import annotations

import json
import os
import zipfile

import pytest

from data_prep.ledger import LEDGER, MISSING, MISSING_URLS, read_lines
from data_prep.own_files import find_rows
from data_prep.prepare import Options, prepare, prepare_own
from data_prep.shard_tools import check
from data_prep.sources.base import ArchiveMember, File, FirstOf, Frames, Manual, Sample, Source, Table, Url
from data_prep.sources.shapes import qa
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.errors import UserError
from tests.data_prep.test_incremental import content, numbers, png
from tests.support.servers import serve


def rows(path, count):
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(count)))


def source(medium):
    """Each row is a sample; `medium` says what it shows."""

    def records(rows, ctx):
        for row in rows:
            yield Sample(str(row["n"]), [qa(f"{row['n']}?", str(row["n"]))], **medium(row["n"]))

    origin = Manual("rows.jsonl from nowhere", (Table("rows.jsonl"),))
    return Source("mine", {}, "pictures", origin, "CC0", {"n": int}, records, counts_as=2)


@pytest.fixture
def raw(tmp_path):
    (tmp_path / "raw").mkdir()
    rows(tmp_path / "raw" / "rows.jsonl", 6)
    return tmp_path / "raw"


def options(raw, **changes):
    return Options(**{"folders": (raw,), "cache": raw.parent / "cache", "records_per_shard": 4, **changes})


def test_downloads_that_failed_are_tried_again_and_those_that_are_gone_are_not(raw, tmp_path, certificate):
    out = tmp_path / "out" / "mine"
    with serve(certificate) as server:
        address = server.url
        server.files.update({f"/{n}.png": png(n) for n in range(6) if n != 4})
        server.plans.update({"/1.png": ["503:100"], "/2.png": ["503:100"]})
        made = source(lambda n: {"images": [Url(f"{address}/{n}.png")]})
        asked = options(raw, verify=str(certificate))
        head = prepare(made, out, asked).head
        assert head["skipped"] == {"download failed": 2, "gone": 1} and numbers(out) == [0, 3, 5]
        assert (out / MISSING_URLS).read_text().splitlines() == [f"{address}/{n}.png" for n in (1, 2)]
        assert not (out / MISSING).exists()
        server.plans["/2.png"] = []
        before = len(server.seen)
        summary = prepare(made, out, asked)
        assert (summary.counts["mended"], summary.look.skipped, summary.already) == (1, 3, False)
        assert {path for path, *_ in server.seen[before:]} == {"/1.png", "/2.png"}
        assert numbers(out) == [0, 3, 5, 2] and summary.head["length"] == 8 and check(out) == []
        assert (out / MISSING_URLS).read_text() == f"{address}/1.png\n"
        server.plans["/1.png"] = []
        assert prepare(made, out, asked).head["skipped"] == {"gone": 1} and not (out / MISSING_URLS).exists()
        before = len(server.seen)
        assert prepare(made, out, asked).already and len(server.seen) == before
        server.shutdown()


def test_archives_and_frames(raw, tmp_path):
    """A picture in an archive, else a file; a folder of frames, of which one changes."""

    def medium(n):
        if n < 3:
            return {"images": [FirstOf(ArchiveMember(File("pack.zip"), f"{n}"), File(f"loose/{n}"))]}
        return {"video": Frames(f"frames/{n}", 2.0)}

    def packed(seed):
        with zipfile.ZipFile(raw / "pack.zip", "w") as archive:
            archive.writestr("0.png", png(seed))
            archive.writestr("1.png", png(seed + 1))

    out = tmp_path / "out" / "mine"
    for n in (3, 4):
        (raw / "frames" / str(n)).mkdir(parents=True)
        for i in range(3):
            (raw / "frames" / str(n) / f"{i}.png").write_bytes(png(10 * n + i))
    head = prepare(source(medium), out, options(raw)).head
    assert head["skipped"] == {"media not found": 4} and numbers(out) == [3, 4]
    assert (out / MISSING).read_text() == "frames/5\npack.zip\n"
    packed(100)
    assert prepare(source(medium), out, options(raw)).counts["mended"] == 2 and numbers(out) == [3, 4, 0, 1]
    packed(200)
    (raw / "frames" / "4" / "1.png").write_bytes(png(999))
    before = ShardDataset(out).read(1)[1]["mp4"]
    summary = prepare(source(medium), out, options(raw))
    assert summary.counts["replaced"] == 3 and numbers(out) == [3, 0, 1, 4] and check(out) == []
    dataset = ShardDataset(out)
    assert dataset.read(1)[1]["0.png"] == png(200) and dataset.read(3)[1]["mp4"] != before
    os.utime(raw / "frames" / "4" / "1.png", (1, 1))
    assert prepare(source(medium), out, options(raw)).already
    (raw / "loose").mkdir()
    (raw / "loose" / "2.png").write_bytes(png(2))  # the archive does not have it
    assert prepare(source(medium), out, options(raw)).counts["mended"] == 1 and numbers(out) == [3, 0, 1, 4, 2]
    (raw / "loose" / "2.png").write_bytes(png(222))
    (raw / "loose" / "0.png").write_bytes(png(0))  # the archive has it
    summary = prepare(source(medium), out, options(raw))
    assert summary.counts["replaced"] == 1 and ShardDataset(out).read(4)[1]["0.png"] == png(222)


def test_another_folder_with_the_same_media_changes_nothing(raw, tmp_path):
    import shutil

    out = tmp_path / "out" / "mine"
    for n in range(6):
        (raw / f"{n}.png").write_bytes(png(n))
    made = source(lambda n: {"images": [File(str(n))]})
    prepare(made, out, options(raw))
    shutil.copytree(raw, tmp_path / "moved", copy_function=shutil.copyfile)
    shutil.rmtree(raw)
    before = content(out)
    summary = prepare(made, out, options(tmp_path / "moved"))
    assert summary.already and summary.look.media == 6 and not summary.look.gone and content(out) == before


def made_of(summary):
    return {name: count for name, count in summary.counts.items() if count}


def test_rows_of_a_published_set_that_changed_are_refused_and_new_ones_taken(raw, tmp_path):
    out = tmp_path / "out" / "mine"
    made = source(lambda n: {"images": [File(f"{n}.png")]})
    for n in range(5):
        (raw / f"{n}.png").write_bytes(png(n))
    prepare(made, out, options(raw))
    (raw / "5.png").write_bytes(png(5))
    before = content(out)
    (raw / "rows.jsonl").write_text("".join(json.dumps({"n": n}) + "\n" for n in (0, 2, 1, 3, 4, 5)))
    with pytest.raises(UserError, match="rows have changed since .*'2' is the first that differs.*--overwrite"):
        prepare(made, out, options(raw))
    rows(raw / "rows.jsonl", 5)
    with pytest.raises(UserError, match="fewer rows"):
        prepare(made, out, options(raw))
    assert content(out) == before and not list(out.parent.glob("*.adding"))
    rows(raw / "rows.jsonl", 7)
    (raw / "6.png").write_bytes(png(6))
    summary = prepare(made, out, options(raw))
    assert made_of(summary) == {"mended": 1, "added": 1} and numbers(out) == list(range(7))


def test_several_processes_add_the_same_bytes(tmp_path):
    (tmp_path / "pictures").mkdir()
    path = tmp_path / "own.jsonl"

    def written(count):
        lines = ({"image": f"pictures/{n}.png", "question": f"{n}?", "answer": str(n)} for n in range(count))
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    for n in range(60):
        if n % 7:
            (tmp_path / "pictures" / f"{n}.png").write_bytes(png(n))
    outs = [tmp_path / str(workers) / "own" for workers in (0, 2)]
    written(50)
    for out in outs:
        prepare_own(path, out, Options(records_per_shard=8, cache=tmp_path / "cache"), found=find_rows(path))
    for n in (0, 14, 21):
        (tmp_path / "pictures" / f"{n}.png").write_bytes(png(n))
    (tmp_path / "pictures" / "30.png").write_bytes(png(300))
    written(60)
    for workers, out in zip((0, 2), outs, strict=True):
        summary = prepare_own(path, out, Options(records_per_shard=8, cache=tmp_path / "cache", workers=workers))
        assert made_of(summary) == {"mended": 3, "added": 9, "replaced": 1}
    assert content(outs[0]) == content(outs[1])
    assert sorted(numbers(outs[0])) == [n for n in range(60) if n % 7 or n in (0, 14, 21)]
    assert [line.reason for line in read_lines(outs[0] / LEDGER)].count("media not found") == 6
