"""A second call of `molmo2 prepare`: what has come is added, what has changed is prepared anew, nothing else moves."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from data_prep.addition import Addition
from data_prep.ledger import LEDGER, MISSING, Line, is_of, mark_of, read_lines
from data_prep.shard_repair import repair
from data_prep.shard_tools import check, index
from data_prep.sources.base import Place, Sample, Skip
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.manifest import MANIFEST, read_head
from molmo2_nemo.data.record import parse_record
from molmo2_nemo.data.shards import ShardDataset


def png(seed, side=24):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def line(n):
    return {"image": f"pictures/{n}.png", "question": f"number {n}?", "answer": str(n)}


def write(path, numbers):
    path.write_text("".join(json.dumps(line(n)) + "\n" for n in numbers))
    return path


def prepare(path, *words):
    shape = ("--workers", "0", "--shard-records", "4", "--out", path.parent / "out")
    return main(["prepare", *map(str, (path, *words, *shape))])


def numbers(folder):
    dataset = ShardDataset(folder)
    dataset.verify()
    found = [json.loads(dataset.read(i)[1]["json"])["annotations"][0]["answer"] for i in range(len(dataset))]
    return [int(n) for n in found]


def pictures(folder):
    dataset = ShardDataset(folder)
    return {
        json.loads(m["json"])["annotations"][0]["answer"]: m["0.png"] for _, m in map(dataset.read, range(len(dataset)))
    }


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def skipped(folder):
    path = folder / "skipped.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def raw(tmp_path):
    """Ten rows; of their pictures 3 and 7 are not there, and 5 is none."""
    (tmp_path / "pictures").mkdir()
    for n in range(10):
        if n not in (3, 7):
            (tmp_path / "pictures" / f"{n}.png").write_bytes(png(n) if n != 5 else b"no picture")
    return write(tmp_path / "own.jsonl", range(10))


def test_what_has_come_is_added_and_nothing_else_moves(raw, tmp_path, capsys):
    out, place = tmp_path / "out" / "own", tmp_path / "pictures"
    assert prepare(raw) == 0
    before = content(out)
    assert numbers(out) == [0, 1, 2, 4, 6, 8, 9] and (out / MISSING).read_text() == "pictures/3.png\npictures/7.png\n"
    capsys.readouterr()
    assert prepare(raw) == 0
    said = capsys.readouterr().out
    assert "is there already" in said and "nothing has changed (10 media compared)" in said
    assert content(out) == before
    (place / "7.png").write_bytes(png(7))
    (place / "5.png").write_bytes(png(5))
    assert prepare(raw) == 0
    said = capsys.readouterr().out
    assert "2 of 3 skipped samples could be added" in said and "9 of 10 records; media of 1 not found" in said
    after = content(out)
    assert numbers(out) == [0, 1, 2, 4, 6, 8, 9, 5, 7] and pictures(out)["7"] == png(7)
    assert [name for name in before if name.endswith(".tar") and after[name] != before[name]] == []
    assert [entry["key"] for entry in skipped(out)] == ["00000004"] and after[MISSING] == b"pictures/3.png\n"
    head = read_head(out / MANIFEST)
    assert head["skipped"] == {"media not found": 1} and head["records"] == head["length"] == 9
    assert check(out) == []
    (place / "3.png").write_bytes(png(3))
    assert prepare(raw) == 0
    assert "1 of 1 skipped samples could be added" in capsys.readouterr().out
    assert numbers(out)[-1] == 3 and not (out / MISSING).exists() and not (out / "skipped.jsonl").exists()
    assert sorted(p.name for p in out.parent.glob("own*")) == ["own"] and check(out) == []


def test_broken_pictures_are_tried_again_only_where_the_file_has_changed(raw, tmp_path, capsys):
    out, broken = tmp_path / "out" / "own", tmp_path / "pictures" / "5.png"
    assert prepare(raw) == 0
    os.utime(broken, (1, 1))
    capsys.readouterr()
    assert prepare(raw) == 0 and "nothing has changed" in capsys.readouterr().out
    broken.write_bytes(b"another one that is no picture")
    assert prepare(raw) == 0 and "0 of 3 skipped samples could be added" in capsys.readouterr().out
    assert numbers(out) == [0, 1, 2, 4, 6, 8, 9]
    assert prepare(raw) == 0 and "nothing has changed" in capsys.readouterr().out


def test_a_changed_picture_is_prepared_anew(raw, tmp_path, capsys):
    out, place = tmp_path / "out" / "own", tmp_path / "pictures"
    assert prepare(raw) == 0
    before = content(out)
    (place / "1.png").write_bytes(png(101))
    os.utime(place / "0.png", (5, 5))  # touched, not changed
    (place / "9.png").unlink()
    capsys.readouterr()
    assert prepare(raw) == 0
    said = capsys.readouterr().out
    assert "1 media of records have changed (the first: pictures/1.png):\n    1 record prepared anew\n" in said
    assert "1 media are gone (the first: pictures/9.png); their records stay as they are" in said
    assert "cannot be resumed" in said
    assert numbers(out) == [0, 2, 4, 6, 8, 9, 1] and pictures(out)["1"] == png(101)
    after = content(out)
    assert [n for n in before if n.endswith(".tar") and n not in after] == ["own-000000.tar"]
    assert "own-000000-r1.tar" in after and after["own-000001.tar"] == before["own-000001.tar"] and check(out) == []


def test_a_picture_that_is_too_large_now_takes_its_record_along(raw, tmp_path, capsys):
    out, place, limit = tmp_path / "out" / "own", tmp_path / "pictures", ("--max-media-mb", "1")
    assert prepare(raw, *limit) == 0
    (place / "1.png").write_bytes(png(1, side=700))
    assert prepare(raw, *limit) == 0
    assert "0 records prepared anew, 1 can no longer be used" in capsys.readouterr().out
    assert numbers(out) == [0, 2, 4, 6, 8, 9] and [e["key"] for e in skipped(out)][0] == "00000002"
    (place / "1.png").write_bytes(png(1))
    assert prepare(raw, *limit) == 0 and numbers(out) == [0, 2, 4, 6, 8, 9, 1] and pictures(out)["1"] == png(1)
    assert check(out) == []


def test_every_picture_changed(raw, tmp_path):
    out = tmp_path / "out" / "own"
    assert prepare(raw) == 0
    for path in (tmp_path / "pictures").iterdir():
        path.write_bytes(png(int(path.stem) + 1000))
    assert prepare(raw) == 0
    assert numbers(out) == [0, 1, 2, 4, 5, 6, 8, 9] and pictures(out)["4"] == png(1004) and check(out) == []


def test_changed_so_that_nothing_would_be_left(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.png").write_bytes(png(0))
    path, out = write(tmp_path / "own.jsonl", [0]), tmp_path / "out" / "own"
    assert prepare(path, "--max-media-mb", "1") == 0
    before = content(out)
    (tmp_path / "pictures" / "0.png").write_bytes(png(0, side=700))
    assert prepare(path, "--max-media-mb", "1") == 2
    assert "none would be left; nothing was changed" in capsys.readouterr().err
    assert content(out) == before


def test_lines_that_are_appended(raw, tmp_path, capsys):
    out = tmp_path / "out" / "own"
    assert prepare(raw) == 0
    before = content(out)
    for n in (10, 11):
        (tmp_path / "pictures" / f"{n}.png").write_bytes(png(n))
    (tmp_path / "pictures" / "3.png").write_bytes(png(3))
    write(raw, range(13))
    capsys.readouterr()
    assert prepare(raw) == 0
    said = capsys.readouterr().out
    assert "2 new records" in said and "1 of 3 skipped samples could be added" in said
    assert numbers(out) == [0, 1, 2, 4, 6, 8, 9, 3, 10, 11]
    after = content(out)
    assert all(after[name] == before[name] for name in before if name.endswith(".tar"))
    assert [entry["line"] for entry in skipped(out)] == [6, 8, 13]
    assert prepare(raw) == 0 and "nothing has changed" in capsys.readouterr().out


def test_former_lines_that_are_edited_are_refused_by_number(raw, tmp_path, capsys):
    out = tmp_path / "out" / "own"
    assert prepare(raw) == 0
    before, whole = content(out), raw.read_text()
    raw.write_text(whole.replace('"number 6?"', '"number six?"'))
    assert prepare(raw) == 2
    said = capsys.readouterr().err
    assert "own.jsonl has changed" in said and "line 7 is the first that differs" in said and "--overwrite" in said
    raw.write_text("".join(whole.splitlines(True)[:8]))
    assert prepare(raw) == 2 and "lines are missing at its end" in capsys.readouterr().err
    raw.write_text(whole)
    assert prepare(raw, "--seed", "4") == 2 and "seed: 0 there, 4 now" in capsys.readouterr().err
    write(raw, range(11))
    assert prepare(raw, "--seed", "4") == 2 and "seed: 0 there, 4 now" in capsys.readouterr().err
    assert content(out) == before


@pytest.mark.parametrize("kind", ["csv", "jsonl.gz", "json"])
def test_other_files_of_text_grow_too(kind, tmp_path):
    import gzip

    def written(count):
        path = tmp_path / f"own.{kind}"
        if kind == "csv":
            path.write_text("question,answer\n" + "".join(f"{n}?,{n}\n" for n in range(count)))
        elif kind == "json":
            path.write_text(json.dumps([{"question": f"{n}?", "answer": str(n)} for n in range(count)]))
        else:
            lines = "".join(json.dumps({"question": f"{n}?", "answer": str(n)}) + "\n" for n in range(count))
            path.write_bytes(gzip.compress(lines.encode()))
        return path

    assert prepare(written(5)) == 0
    first = content(tmp_path / "out" / "own")
    assert prepare(written(7)) == 0
    assert numbers(tmp_path / "out" / "own") == list(range(7))
    after = content(tmp_path / "out" / "own")
    assert all(after[name] == first[name] for name in first if name.endswith(".tar"))


def test_a_set_of_an_older_version_is_taken_as_it_is(raw, tmp_path, capsys):
    out = tmp_path / "out" / "own"
    assert prepare(raw) == 0
    (out / LEDGER).unlink()
    before = content(out)
    (tmp_path / "pictures" / "3.png").write_bytes(png(3))
    capsys.readouterr()
    assert prepare(raw) == 0
    said = capsys.readouterr().out
    assert "is there already" in said and "older version: taken as it is" in said and content(out) == before
    write(raw, range(11))
    assert prepare(raw) == 2 and "has changed" in capsys.readouterr().err
    assert prepare(raw, "--overwrite") == 0 and (out / LEDGER).exists() and 3 in numbers(out)


def test_an_interrupted_set_whose_file_grew_goes_on(raw, tmp_path):
    """What was complete is kept, and the result is that of one call on the longer file."""
    from data_prep.own_files import find_rows
    from data_prep.prepare import Options, Progress, prepare_own

    class Stop(Progress):
        def step(self, rows, output):
            if output.items >= 8:
                raise KeyboardInterrupt

    out, options = tmp_path / "out" / "own", Options(records_per_shard=4, cache=tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        prepare_own(raw, out, options, Stop(), find_rows(raw))
    tar = out.with_name("own.partial") / "own-000000.tar"
    written = tar.stat().st_mtime_ns
    write(raw, range(12))
    prepare_own(raw, out, options)
    assert (out / tar.name).stat().st_mtime_ns == written
    prepare_own(raw, tmp_path / "once" / "own", options)
    assert content(tmp_path / "once" / "own") == content(out)


# --- kills -----------------------------------------------------------------------------------------------------------

STEPS = ("replace", "rename", "unlink", "rmdir", "fsync")


def killed_at(step, path):
    """Call `prepare` in a process that is killed right before its so many-th step on files; whether it ended first."""

    def work():
        count = 0

        def counted(real):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count > step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        os._exit(prepare(path))

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode == 0


def test_killed_at_any_step_the_old_or_the_new_set_is_there(raw, tmp_path, capsys):
    """A picture changes, one comes, a line is added; every place where files are moved, removed or synced is tried."""
    out = tmp_path / "out"
    assert prepare(raw) == 0
    (tmp_path / "pictures" / "1.png").write_bytes(png(101))
    (tmp_path / "pictures" / "3.png").write_bytes(png(3))
    (tmp_path / "pictures" / "10.png").write_bytes(png(10))
    write(raw, range(11))
    shutil.copytree(out, tmp_path / "start")
    old = numbers(out / "own")
    assert prepare(raw) == 0
    new, made = numbers(out / "own"), content(out / "own")
    seen = set()
    for step in range(1000):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "start", out)
        ended = killed_at(step, raw)
        found = numbers(out / "own")
        assert found in (old, new), step
        seen.add(tuple(found))
        assert prepare(raw) == 0
        assert content(out / "own") == made, step
        assert sorted(p.name for p in out.glob("own*")) == ["own"]
        if ended:
            break
    assert ended and step > 10 and seen == {tuple(old), tuple(new)}


def test_what_was_begun_is_not_written_again(raw, tmp_path):
    """Killed in the middle of many new lines: complete new shards are kept."""
    out = tmp_path / "out" / "own"
    assert prepare(raw) == 0
    for n in range(10, 40):
        (tmp_path / "pictures" / f"{n}.png").write_bytes(png(n))
    write(raw, range(40))
    whole = killed_at(20, raw)
    work = Addition.work_of(out)
    done = [path.name.replace(".journal.json", ".tar") for path in work.glob("*.journal.json")]
    kept = {name: (work / name).stat().st_mtime_ns for name in done}
    assert not whole and len(kept) > 1 and numbers(out) == [0, 1, 2, 4, 6, 8, 9]
    assert prepare(raw) == 0
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert numbers(out) == [0, 1, 2, 4, 6, 8, 9, *range(10, 40)] and check(out) == []
    assert len(list(read_lines(out / LEDGER))) == 40


def test_what_was_begun_for_other_changes_is_begun_anew(raw, tmp_path):
    out = tmp_path / "out" / "own"
    assert prepare(raw) == 0
    for n in range(10, 40):
        (tmp_path / "pictures" / f"{n}.png").write_bytes(png(n))
    write(raw, range(40))
    assert not killed_at(20, raw)
    (tmp_path / "pictures" / "0.png").write_bytes(png(100))
    assert prepare(raw) == 0
    assert numbers(out) == [1, 2, 4, 6, 8, 9, 0, *range(10, 40)] and pictures(out)["0"] == png(100)


def test_pictures_that_several_records_share_outlive_a_change_of_one_of_them(tmp_path):
    """Records of two pictures each, the second the same in all: the first record goes, what it shares stays."""
    (tmp_path / "pictures").mkdir()
    for n in range(10):
        (tmp_path / "pictures" / f"{n}.png").write_bytes(png(n))
    rows = [
        {"images": [f"pictures/{n}.png", "pictures/9.png"], "question": f"{n}?", "answer": str(n)} for n in range(9)
    ]
    path, out = tmp_path / "own.jsonl", tmp_path / "out" / "own"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    assert prepare(path) == 0
    (tmp_path / "pictures" / "0.png").write_bytes(png(100))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepare(path) == 0
    assert numbers(out) == [1, 2, 3, 4, 5, 6, 7, 0, 8] and check(out) == []
    dataset = ShardDataset(out)
    for i, n in enumerate([1, 2, 3, 4, 5, 6, 7, 100, 8]):
        assert parse_record(*dataset.read(i)).images == [png(n), png(9)]
    shutil.copytree(out, tmp_path / "tars")
    (tmp_path / "tars" / MANIFEST).unlink()
    assert index(tmp_path / "tars", "tars")["records"] == 9  # the tars alone say where the shared picture is
    for n in (1, 2, 3):  # of the first shard, all records
        (tmp_path / "pictures" / f"{n}.png").write_bytes(png(n + 100))
    assert prepare(path) == 0
    assert numbers(out) == [4, 5, 6, 7, 0, 8, 1, 2, 3] and check(out) == []
    dataset = ShardDataset(out)
    for i, n in enumerate([4, 5, 6, 7, 100, 8, 101, 102, 103]):
        assert parse_record(*dataset.read(i)).images == [png(n), png(9)]


def test_one_picture_of_several_records_is_one_medium(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(png(1))
    rows = [{**line(1), "question": f"question {n}?"} for n in range(3)]
    raw = tmp_path / "own.jsonl"
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepare(raw) == 0
    (tmp_path / "pictures" / "1.png").write_bytes(png(2))
    assert prepare(raw) == 0
    said = capsys.readouterr().out
    assert "1 media of records have changed (the first: pictures/1.png):" in said and "3 records prepared anew" in said
    (tmp_path / "pictures" / "1.png").unlink()
    assert prepare(raw) == 0
    assert "1 media are gone (the first: pictures/1.png)" in capsys.readouterr().out


def test_a_row_that_an_older_version_could_not_read_is_the_same_row():
    place = Place("a.jsonl", 2, mark="0123456789abcdef")
    before = Line(mark_of(Skip("line 2", "bad line", place=place)), "bad line")
    assert is_of(before, Sample("00000002", place=place)) and is_of(before, Skip("image 2", "bad line", place=place))
    other = Place("a.jsonl", 2, mark="fedcba9876543210")
    assert not is_of(before, Sample("00000002", place=other))
    assert not is_of(Line(before.mark), Sample("00000002", place=place)), "records had their own key"


@pytest.mark.parametrize("changed", [False, True])
def test_what_repair_removed_comes_back(raw, tmp_path, capsys, changed):
    """A bit of a record flips in its tar, its picture is as it was, or another now."""
    out = tmp_path / "out" / "own"
    assert prepare(raw) == 0
    before = numbers(out)
    tar = sorted(out.glob("*.tar"))[0]
    content = bytearray(tar.read_bytes())
    content[content.index(png(1)) + 60] ^= 1
    tar.write_bytes(content)
    assert [problem.key for problem in repair(out)] == ["00000002"]
    assert {entry["reason"] for entry in skipped(out)} >= {"removed by repair"}
    if changed:
        (tmp_path / "pictures" / "1.png").write_bytes(png(20))
    capsys.readouterr()
    assert prepare(raw) == 0
    said = capsys.readouterr().out
    assert "1 record that repair had removed prepared anew" in said and "7 of 10 records" in said
    assert sorted(numbers(out)) == before and pictures(out)["1"] == png(20 if changed else 1) and check(out) == []
    assert "removed by repair" not in read_head(out / MANIFEST)["skipped"]
    assert [entry["key"] for entry in skipped(out)] == ["00000004", "00000006", "00000008"]
    assert prepare(raw) == 0
    assert "nothing has changed" in capsys.readouterr().out


def test_a_joined_set_says_that_nothing_is_added_to_it(raw, tmp_path, capsys):
    for number in (1, 2):
        assert prepare(raw, "--part", f"{number}/2") == 0
    assert main(["shards", "join", str(tmp_path / "out" / "own")]) == 0
    (tmp_path / "pictures" / "3.png").write_bytes(png(3))
    capsys.readouterr()
    assert prepare(raw) == 0
    said = capsys.readouterr().out
    assert "is there already" in said and "joined of 2 parts: nothing is added to it" in said
    assert "older version" not in said and "the same command adds" not in said


def test_other_limits_are_told_in_words(raw, capsys):
    assert prepare(raw) == 0
    assert prepare(raw, "--for", "recipe=tiny", "stage=sft") == 2
    said = capsys.readouterr().err
    assert "the default limits there, limits of a run (--for: " in said and "more) now" in said and "{" not in said


def test_a_picture_that_cannot_be_read_any_more_leaves_its_record(raw, tmp_path, capsys):
    out = tmp_path / "out" / "own"
    assert prepare(raw) == 0
    before = pictures(out)
    (tmp_path / "pictures" / "1.png").write_bytes(b"")
    assert prepare(raw) == 0
    said = capsys.readouterr().out
    assert "0 records prepared anew" in said and "1 record stays as it was: their media cannot be read now" in said
    assert "is there already" in said and "fingerprint" not in said
    assert pictures(out) == before and check(out) == []
    (tmp_path / "pictures" / "1.png").write_bytes(png(20))
    assert prepare(raw) == 0
    assert "1 record prepared anew" in capsys.readouterr().out and pictures(out)["1"] == png(20)


def test_a_file_that_comes_beside_others_is_named(tmp_path, capsys, monkeypatch):
    from tests.data_prep.test_own_tars import tar

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tars").mkdir()
    picture = {"jpg": png(1), "txt": b"a picture"}
    tar(tmp_path / "tars" / "00000.tar", picture)
    call = ["prepare", "tars", "--out", "out", "--workers", "0"]
    assert main(call) == 0
    tar(tmp_path / "tars" / "00001.tar", picture)
    assert main(call) == 2
    assert "its files: 00000.tar there, 2 files of tars now; only lines added at the end" in capsys.readouterr().err
