"""Rows: every kind of file, data sets of the Hub as local copies, and messages for what is not there."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.sources.base import Hub, Manual, Source, SourceError, Table
from data_prep.tables import Tables, read_file

ROWS = [{"a": 1, "b": ["x", "y"], "c": {"d": 2.5}}, {"a": 2, "b": [], "c": {"d": None}}]


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_formats(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    with (
        pa.OSFile(str(tmp_path / "t.arrow"), "wb") as file,
        pa.ipc.new_stream(file, pa.Table.from_pylist(ROWS).schema) as w,
    ):
        w.write_table(pa.Table.from_pylist(ROWS))
    write(tmp_path, "t.jsonl", "\n\n".join(map(json.dumps, ROWS)))
    write(tmp_path, "t.json", json.dumps(ROWS))
    for suffix in ("parquet", "arrow", "jsonl", "json"):
        assert list(read_file(tmp_path / f"t.{suffix}")) == ROWS, suffix
    assert list(read_file(tmp_path / "t.parquet", columns=("c", "none"))) == [{"c": row["c"]} for row in ROWS]
    write(tmp_path, "t.csv", '\ufeffa,b\n1,"x, y"\n2,\n')
    assert list(read_file(tmp_path / "t.csv")) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": ""}]
    write(tmp_path, "t.tsv", "1\tx\n")
    assert list(read_file(tmp_path / "t.tsv", Table("t.tsv", header=("a", "b")))) == [{"a": "1", "b": "x"}]
    write(tmp_path, "semi.csv", "a;b\n1;2\n")
    assert list(read_file(tmp_path / "semi.csv", Table("semi.csv", delimiter=";"))) == [{"a": "1", "b": "2"}]
    write(tmp_path, "t.txt", "one\n\ntwo\n")
    assert list(read_file(tmp_path / "t.txt")) == [{"line": "one"}, {"line": "two"}]
    write(tmp_path, "lists.jsonl", '["a", "b"]\n[1, 2]\n')
    assert list(read_file(tmp_path / "lists.jsonl")) == [{"a": 1, "b": 2}]


def test_inside_of_json(tmp_path):
    path = write(tmp_path, "deep.json", json.dumps({"x": {"data": {"k1": {"a": 1}, "k2": 5}}, "y": 3}))
    table = Table("deep.json", at=("x", "data"), key="id")
    assert list(read_file(path, table)) == [{"a": 1, "id": "k1"}, {"value": 5, "id": "k2"}]
    with pytest.raises(SourceError, match=r"no field 'x.no' \(there is: data\)"):
        list(read_file(path, Table("deep.json", at=("x", "no"))))
    with pytest.raises(SourceError, match="holds a int"):
        list(read_file(path, Table("deep.json", at=("y",))))


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.jsonl", '{"a": 1}\n{"a": ', r"a\.jsonl:2: cannot be parsed"),
        ("a.jsonl", "[]\n5", r"a\.jsonl:2: a row must be an object"),
        ("a.json", "{", "a.json cannot be read"),
        ("a.json", "[1]", "a row must be an object"),
        ("a.parquet", "no parquet", "a.parquet cannot be read"),
        ("a.xlsx", "", "rows are read from"),
        ("a.csv", 'a,b\n"x', r"a\.csv:2: cannot be read: unexpected end of data in the row that begins there"),
        ("a.csv", 'a,"b\nx', r"a\.csv:1: cannot be read"),
        ("a.csv", 'a,b\n1,2\n3,"x\n' + 9 * "3,4\n", r"a\.csv:3: cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, words):
    with pytest.raises(SourceError, match=words):
        list(read_file(write(tmp_path, name, text)))


@pytest.mark.parametrize("code, line, hint", [("latin1", 3002, "LATIN1"), ("utf-16", 1, "UTF-16")])
def test_a_csv_that_is_not_utf8_names_the_line(tmp_path, code, line, hint):
    path = tmp_path / "a.csv"
    path.write_bytes(("a,b\n" + 3000 * "1,2\n" + "3,ä\n" + 3000 * "1,2\n").encode(code))
    with pytest.raises(SourceError, match=rf"a\.csv:{line}: cannot be read: is not UTF-8; .*iconv -f {hint} -t UTF-8"):
        list(read_file(path))


CARD = """---
configs:
- config_name: cats
  data_files:
  - {split: train, path: cats/train-*}
  - {split: HumanQA, path: cats/people-*}
- config_name: dogs
  data_files:
  - {split: train, path: dogs/*.jsonl}
---
"""


def test_copy_of_a_repository(tmp_path):
    """Laid out and described like one on the Hub; `datasets` finds the files of configuration and split."""
    repo = tmp_path / "Molmo2-Pets"
    write(repo, "README.md", CARD)
    write(repo, "dogs/one.jsonl", '{"n": 3}\n')
    (repo / "cats").mkdir()
    for part in range(2):
        pq.write_table(pa.table({"n": [part + 1]}), repo / "cats" / f"train-{part:05d}-of-00002.parquet")
    pq.write_table(pa.table({"n": [9]}), repo / "cats" / "people-00000-of-00001.parquet")
    both = Hub("allenai/Molmo2-Pets", configs=("dogs", "cats"))
    for folders in ((tmp_path,), (repo,)):
        tables = Tables(folders)
        rows = list(tables.rows(both))
        assert [(row["n"], row["__config__"]) for row in rows] == [(3, "dogs"), (1, "cats"), (2, "cats")]
        assert tables.count(both) == 3
    assert [row["n"] for row in tables.rows(Hub("allenai/Molmo2-Pets", configs=("cats",), split="HumanQA"))] == [9]
    with pytest.raises(SourceError, match=r"no split 'val' \(there are: train, HumanQA\)"):
        list(tables.rows(Hub("allenai/Molmo2-Pets", configs=("cats",), split="val")))
    with pytest.raises(SourceError, match="'birds' not found"):
        list(tables.rows(Hub("allenai/Molmo2-Pets", configs=("birds",))))


def test_folder_without_a_card(tmp_path):
    write(tmp_path, "train/a.jsonl", '{"n": 1}\n')
    write(tmp_path, "val-0.jsonl", '{"n": 2}\n')
    write(tmp_path, "extra/rows.jsonl", '{"n": 3}\n')
    tables = Tables((tmp_path,))
    assert [row["n"] for row in tables.rows(Hub("x/y"))] == [1]
    assert [row["n"] for row in tables.rows(Hub("x/y", split="val"))] == [2]
    assert [row["n"] for row in tables.rows(Hub("x/y", configs=("extra",), split="val"))] == [3]
    (tmp_path / "extra" / "rows.jsonl").unlink()
    with pytest.raises(SourceError, match="no .parquet.*file for split 'test'"):
        list(tables.rows(Hub("x/y", split="test")))


def test_files_by_hand(tmp_path):
    origin = Manual("sign the form at the site", (Table("a/*.jsonl"), Table("b.jsonl")), media=("pictures/ID.jpg",))
    source = Source("s", {}, "kind", origin, "CC0", {}, lambda rows, ctx: iter(()))
    write(tmp_path, "a/1.jsonl", '{"n": 1}\n')
    write(tmp_path, "a/2.jsonl", '{"n": 2}\n{"n": 3}\n')
    with pytest.raises(SourceError, match=r"s: b\.jsonl not found below .*sign the form.*pictures/ID\.jpg"):
        Tables((tmp_path,)).check(source)
    assert Tables((tmp_path,)).count(origin) is None
    write(tmp_path, "b.jsonl", '{"n": 4}\n')
    tables = Tables((tmp_path / "none", tmp_path))
    tables.check(source)
    assert [(row["n"], row["__table__"]) for row in tables.rows(origin)] == [
        (1, "a/1.jsonl"),
        (2, "a/2.jsonl"),
        (3, "a/2.jsonl"),
        (4, "b.jsonl"),
    ]
    assert tables.count(origin) == 4
