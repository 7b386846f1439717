"""One data set over several machines. Oracle: the same command without --part."""

import json
import os
import shutil
from dataclasses import replace

import pytest

from data_prep import demo
from data_prep.output import EMPTY, Output
from data_prep.parts import CHUNK, MOST, Part
from data_prep.parts import join as joined
from data_prep.prepare import Options
from data_prep.prepare import prepare as run
from data_prep.shard_tools import check
from data_prep.sources.base import File, Manual, Sample, Skip, Source, Table
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.manifest import MANIFEST, read_head
from molmo2_nemo.data.shards import ShardDataset

ROWS = 5 * CHUNK + 7


def prepare(*words):
    return main(["prepare", *map(str, words), "--workers", "0"])


def join(folder):
    return main(["shards", "join", str(folder)])


def records(folder):
    """Key -> members of every record, without the places of its media; a key that comes twice is an error."""
    data = ShardDataset(folder)
    read = [data.read(i) for i in range(len(data))]
    found = {label.partition(":")[2]: {**members, "json": json.loads(members["json"])} for label, members in read}
    for members in found.values():
        members["json"].pop("media_from", None)
    assert len(found) == len(read)
    return found


def skipped(folder):
    return sorted((folder / "skipped.jsonl").read_text().splitlines())


@pytest.fixture
def own(tmp_path):
    """A file with texts, pictures that several rows share, ids that come twice, and rows that cannot be used."""
    for name in ("cat.jpg", "horse.jpg"):
        shutil.copy(demo.MEDIA / name, tmp_path)
    with (tmp_path / "own.jsonl").open("w") as file:
        for i in range(ROWS):
            row = {"question": f"What is {i} + {i}?", "answer": f"{2 * i}"}
            if i % 17 == 3:
                row = {"question": f"What is {i}?", "answer": ""}
            elif i in (10, 11, 70, 200):
                row |= {"image": "horse.jpg" if i == 70 else "cat.jpg"}
            elif i % 50 == 9:
                row = {
                    "id": "same",
                    "conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "!"}],
                }
            file.write(json.dumps(row) + "\n")
    return tmp_path / "own.jsonl"


def whole(own, *words):
    out = own.parent / "whole"
    assert prepare(own, "--out", out, *words) == 0
    return out / "own"


@pytest.mark.parametrize(
    ("order", "words"), [((2, 1, 3), ()), ((3, 2, 1), ("--limit", 2 * CHUNK + 20, "--shard-records", 50))]
)
def test_the_parts_are_the_whole(order, words, own, capsys):
    expected = whole(own, *words)
    out = own.parent / "out"
    for number in order:
        assert prepare(own, "--out", out, "--part", f"{number}/3", *words) == 0
    parts = [records(out / f"own.part-{number}-of-3") for number in (1, 2, 3)]
    assert sum(map(len, parts)) == len(records(expected)) and all(parts)
    assert join(out / "own") == 0
    assert "of 3 parts" in capsys.readouterr().out
    assert records(out / "own") == records(expected)
    assert skipped(out / "own") == skipped(expected)
    mine, theirs = read_head(out / "own" / MANIFEST), read_head(expected / MANIFEST)
    for name in ("name", "records", "length", "skipped", "settings", "source", "licence", "kind"):
        assert mine[name] == theirs[name]
    assert {text: count for text, (count, _) in mine["notes"].items()} == {
        text: count for text, (count, _) in theirs["notes"].items()
    }
    assert check(out / "own") == []
    shutil.copytree(out / "own", out / "tars")
    (out / "tars" / MANIFEST).unlink()
    assert main(["shards", "index", str(out / "tars")]) == 0
    assert records(out / "tars") == records(expected), "media are found under the names of the parts' tars"
    capsys.readouterr()
    assert prepare(own, "--out", out, *words) == 0 and "is there already" in capsys.readouterr().out


def test_the_order_of_the_machines_changes_no_byte(own):
    for name, order in (("a", (1, 2, 3, 4)), ("b", (4, 2, 3, 1))):
        for number in order:
            assert prepare(own, "--out", own.parent / name, "--part", f"{number}/4") == 0
        assert join(own.parent / name) == 0  # the folder of all data sets
    files = [{path.name: path.read_bytes() for path in (own.parent / name / "own").iterdir()} for name in ("a", "b")]
    assert files[0] == files[1] and len(files[0]) >= 4


def test_shards_are_shared_not_copied(own):
    for number in (1, 2):
        assert prepare(own, "--out", own.parent / "out", "--part", f"{number}/2") == 0
    assert join(own.parent / "out" / "own") == 0
    tars = sorted((own.parent / "out" / "own").glob("*.tar"))
    assert len(tars) == 2 and all(os.stat(tar).st_nlink == 2 for tar in tars)


def test_without_hard_links_shards_are_moved_and_a_killed_join_goes_on(own, monkeypatch):
    out = own.parent / "out"
    for number in (1, 2, 3):
        assert prepare(own, "--out", out, "--part", f"{number}/3") == 0
    expected = [records(out / f"own.part-{number}-of-3") for number in (1, 2, 3)]

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    rename, moved = os.rename, []

    def second_fails(old, new):
        moved.append(new)
        if len(moved) == 2:
            raise KeyboardInterrupt
        rename(old, new)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "rename", second_fails)
    main(["shards", "join", str(out / "own")])
    assert not (out / "own").exists() and len(list(out.glob("own.joining/*.tar"))) == 1
    assert join(out / "own") == 0
    assert records(out / "own") == expected[0] | expected[1] | expected[2]
    assert not list(out.glob("own.part-*/*.tar")) and not (out / "own.joining").exists()


def test_an_interrupted_part_goes_on(own, monkeypatch):
    out, words = own.parent / "out", ("--shard-records", 20)
    assert prepare(own, "--out", out, "--part", "1/2", *words) == 0
    good = {path.name: path.read_bytes() for path in (out / "own.part-1-of-2").glob("*.tar")}
    shutil.rmtree(out)
    add, calls = Output.add, []

    def killed(self, *args, **options):
        calls.append(1)
        if len(calls) == 50:
            raise KeyboardInterrupt
        return add(self, *args, **options)

    monkeypatch.setattr(Output, "add", killed)
    prepare(own, "--out", out, "--part", "1/2", *words)
    assert (out / "own.part-1-of-2.partial").is_dir()
    assert join(out / "own") == 2
    assert prepare(own, "--out", out, "--part", "1/2", *words) == 0
    assert {path.name: path.read_bytes() for path in (out / "own.part-1-of-2").glob("*.tar")} == good
    assert len(calls) < 50 + 3 * CHUNK  # complete shards were not made again


def test_missing_unfinished_and_mixed_parts_are_named(own, capsys):
    out = own.parent / "out"
    assert prepare(own, "--out", out, "--part", "2/4") == 0
    assert prepare(own, "--out", out, "--part", "3/4", "--seed", 5) == 0
    assert join(out / "own") == 2
    assert "of its 4 parts 1, 4 are missing: run molmo2 prepare ... --part K/4" in capsys.readouterr().err
    for number in (1, 4):
        assert prepare(own, "--out", out, "--part", f"{number}/4") == 0
    assert join(out / "own") == 2
    error = capsys.readouterr().err
    assert "own.part-3-of-4 was prepared with other settings than part 1 (--seed: 0 in part 1, 5 in part 3)" in error
    assert prepare(own, "--out", out, "--part", "1/2") == 0
    assert join(out / "own") == 2
    assert "several divisions ([1] of 2 and [1, 2, 3, 4] of 4)" in capsys.readouterr().err
    assert join(out / "other") == 2 and "has no parts" in capsys.readouterr().err


def test_a_part_without_records(tmp_path, capsys):
    (tmp_path / "own.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    out = tmp_path / "out"
    for number in (1, 2):
        assert prepare(tmp_path / "own.jsonl", "--out", out, "--part", f"{number}/2") == 0
    said = capsys.readouterr().out
    assert "own.part-2-of-2: done, 0 records" in said and said.count("no sample fell to this part") == 1
    assert (out / "own.part-2-of-2" / EMPTY).is_file()
    assert prepare(tmp_path / "own.jsonl", "--out", out, "--part", "2/2") == 0
    assert join(out / "own") == 0 and len(records(out / "own")) == 1


def test_a_second_call_of_a_part_adds_what_has_come(own, capsys):
    out = own.parent / "out"
    (own.parent / "cat.jpg").rename(own.parent / "later.jpg")
    for number in (1, 2):
        assert prepare(own, "--out", out, "--part", f"{number}/2") == 0
    (own.parent / "later.jpg").rename(own.parent / "cat.jpg")
    for number in (1, 2):
        assert prepare(own, "--out", out, "--part", f"{number}/2") == 0
    assert join(out / "own") == 0
    assert records(out / "own") == records(whole(own))
    assert skipped(out / "own") == skipped(own.parent / "whole" / "own")


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4"])
def test_no_such_part(text, own, capsys):
    assert prepare(own, "--out", own.parent / "out", f"--part={text}") == 2
    assert "expected K/N" in capsys.readouterr().err


def test_neighbours_with_the_same_media_stay_together():
    def sample(i, film):
        return Sample(str(i), [{}], video=File(film))

    items = [sample(i, "a") for i in range(CHUNK - 2)] + [sample(i, "b") for i in range(10)] + [Skip("x", "bad")]
    items += [sample(i, "b") for i in range(5)] + [sample(i, "c") for i in range(5)]
    items += [sample(i, "d") for i in range(MOST + 100)]
    dealt = [list(Part(number, 3).select(items)) for number in (1, 2, 3)]
    assert sorted(map(id, items)) == sorted(id(item) for part in dealt for item in part)
    holders = [
        {i for i, part in enumerate(dealt) for s in part if isinstance(s, Sample) and s.video == File(f)} for f in "abc"
    ]
    assert [len(found) for found in holders] == [1, 1, 1] and holders[0] == holders[1] != holders[2]
    assert sum(any(isinstance(s, Sample) and s.video == File("d") for s in part) for part in dealt) == 2


def _choices(rows, ctx):
    """Samples of a published source: drawn from the seed and the key, some of them skipped."""
    for row in rows:
        key = f"k{row['n']}"
        if row["n"] % 13 == 5:
            yield Skip(key, "empty answer")
            continue
        options = [str(n) for n in ctx.rng(key).permutation(row["n"] + 4)[:4]]
        question = {"question": "Which?", "options": options, "answer_idx": row["n"] % 4}
        yield Sample(key, [{"style": "a_okvqa_mc", **question}])


def test_a_published_source(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"n": n}) + "\n" for n in range(ROWS)))
    source = Source(
        name="published",
        mixes={},
        kind="question",
        origin=Manual("by hand", (Table("rows.jsonl"),)),
        licence="CC0",
        fields={"n": int},
        records=_choices,
        counts_as=2,
    )
    options = Options(folders=(tmp_path,), cache=tmp_path / "cache", limit=3 * CHUNK)
    made = run(source, tmp_path / "whole" / "published", options).head
    for number in (3, 1, 2):
        run(source, tmp_path / "out" / "published", replace(options, part=Part(number, 3)))
    head, _ = joined(tmp_path / "out" / "published")
    assert records(tmp_path / "out" / "published") == records(tmp_path / "whole" / "published")
    assert {**head, "shards": [], "parts": 0, "notes": {}} == {**made, "shards": [], "parts": 0, "notes": {}} | {
        name: head[name] for name in ("format", "version") if name in head
    }


def test_held_out_samples_are_parted_alike(own):
    out, words = own.parent / "out", ("--hold-out", "10%")
    assert prepare(own, "--out", own.parent / "whole", *words) == 0
    for number in (2, 1):
        assert prepare(own, "--out", out, "--part", f"{number}/2", *words) == 0
    assert join(out) == 0  # both sides
    for name in ("own", "own-validation"):
        assert records(out / name) == records(own.parent / "whole" / name)
