"""A user's tables, lists and folders. Oracle: the same records written as JSON Lines in this project's own fields."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import random
import re
import shutil
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep import demo
from data_prep.own_coco import BOXES, GROUPS, KEYPOINTS, LEFT_OUT
from data_prep.own_files import END_BYTES, fingerprint
from data_prep.own_tables import SEVERAL_LINES
from data_prep.sources.own import SAME_ID
from data_prep.sources.own_boxes import OTHER_SIZE
from data_prep.sources.own_cells import taken_as_word
from data_prep.sources.own_shapes import not_read
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.manifest import MANIFEST, read_head
from molmo2_nemo.data.shards import ShardDataset

ZSTD = partial(pa.Codec("zstd").compress, asbytes=True)
CHAT = [{"role": "user", "content": "Which animal?"}, {"role": "assistant", "content": "a cat"}]
ROWS = [
    {"image": "cat.jpg", "question": 'Which "animal", exactly?', "answer": "a cat"},
    {"image": "horse.jpg", "question": "Two\nlines", "answer": "ein Pferd, ja"},
]


def prepare(*words):
    return main(["prepare", *map(str, words), "--workers", "0"])


def own(tmp_path, *lines):
    """The records that JSON Lines in our own fields become."""
    path = tmp_path / "oracle.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert prepare(path, "--out", tmp_path / "oracle", "--overwrite") == 0
    return records(tmp_path / "oracle" / "oracle")


def records(folder):
    """Members of every record, with its JSON parsed, without the places of its media."""
    data = ShardDataset(folder)
    read = [data.read(i)[1] for i in range(len(data))]
    parsed = [json.loads(members["json"]) for members in read]
    return [
        {**members, "json": {name: value for name, value in one.items() if name != "media_from"}}
        for members, one in zip(read, parsed, strict=True)
    ]


def skipped(folder):
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def notes(folder):
    return {text: count for text, (count, *_) in read_head(folder / MANIFEST)["notes"].items()}


@pytest.fixture
def place(tmp_path):
    for name in ("cat.jpg", "horse.jpg", "coffee.jpg", "bunny.mp4"):
        shutil.copy(demo.MEDIA / name, tmp_path)
    return tmp_path


def table(rows, delimiter=","):
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


# --- the same records in every kind of file --------------------------------------------------------------------------

LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FILES = {
    "a.csv": table(ROWS),
    "b.tsv": table(ROWS, "\t"),
    "c.csv": b"\xef\xbb\xbf" + table(ROWS, ";"),
    "d.csv.gz": gzip.compress(table(ROWS)),
    "e.jsonl.gz": gzip.compress(LINES),
    "f.jsonl.bz2": bz2.compress(LINES),
    "g.ndjson.xz": lzma.compress(LINES),
    "l.jsonl.zst": ZSTD(LINES),
    "m.csv.zst": ZSTD(table(ROWS[:1])) + ZSTD(table(ROWS[1:]).partition(b"\n")[2]),
    "h.json": json.dumps(ROWS, indent=1).encode(),
    "i.jsonlines": LINES,
    "j.json": LINES,
}


@pytest.mark.parametrize("name", [*FILES, "k.parquet"])
def test_every_kind_of_file_gives_the_same_records(name, place):
    if name == "k.parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), place / name)
    else:
        (place / name).write_bytes(FILES[name])
    assert prepare(place / name, "--out", place / "out", "--strict") == 0
    assert records(place / "out" / name[0]) == own(place, *ROWS)


def test_names_of_columns_and_what_is_not_read(place, capsys):
    rows = [
        {
            "ID": "x",
            "File Name": "bunny.mp4",
            "Start-Time": "1",
            "end_time": "4.5",
            "Description": "A rabbit.",
            "by": "me",
        },
        {"ID": "x", "File Name": "cat.jpg", "Start-Time": "", "end_time": "", "Description": "A cat.", "by": ""},
    ]
    (place / "t.csv").write_bytes(table(rows))
    assert prepare(place / "t.csv", "--out", place / "out") == 0
    said = capsys.readouterr().out
    words = [line.split() for line in said.split("its columns are taken for\n")[1].splitlines()[:6]]
    assert words == [
        ["ID", "key"],
        ["File", "Name", "file"],
        ["Description", "caption"],
        ["Start-Time", "start"],
        ["end_time", "end"],
        ["by", "not", "read"],
    ]
    film = {"key": "x", "video": "bunny.mp4", "clip": [1, 4.5], "caption": "A rabbit."}
    assert records(place / "out" / "t") == own(place, film, {"image": "cat.jpg", "caption": "A cat."})
    assert notes(place / "out" / "t") == {not_read("by"): 1, SAME_ID: 1} and not_read("by") in said
    data = ShardDataset(place / "out" / "t")
    assert [data.read(i)[0].rpartition(":")[2] for i in range(2)] == ["x", "x-3"]


MAP = """
image: photo
question: meta.frage
answer: antwort
weight:
style: vqa2
"""


def test_a_map_overrides_names(place, capsys):
    rows = [
        {"photo": "cat.jpg", "image": "gone.jpg", "meta": {"frage": "q"}, "antwort": 3, "weight": "high", "answer": "x"}
    ]
    (place / "m.yaml").write_text(MAP)
    pq.write_table(pa.Table.from_pylist(rows), place / "t.parquet")
    (place / "u.jsonl").write_text(json.dumps(rows[0]) + '\n{"photo": "cat.jpg", "late": 1}\n')
    expected = own(place, {"image": "cat.jpg", "annotations": [{"style": "vqa2", "question": "q", "answer": "3"}]})
    for name in ("t.parquet", "u.jsonl"):
        assert prepare(place / name, "--map", place / "m.yaml", "--out", place / "out") == 0
        assert records(place / "out" / name[0]) == expected
        assert re.search(r"photo +image \(--map\)", capsys.readouterr().out)
        unread = notes(place / "out" / name[0])
        assert {not_read("weight"): 1, not_read("image"): 1, not_read("answer"): 1}.items() <= unread.items()
    (line,) = skipped(place / "out" / "u")
    assert line["line"] == 2
    (place / "m.yaml").write_text(MAP.replace("vqa2", "user_qa"))
    assert prepare(place / "u.jsonl", "--map", place / "m.yaml", "--out", place / "out") == 2
    assert "--overwrite" in capsys.readouterr().err, "another map is another data set"


@pytest.mark.parametrize(
    "text, words",
    [
        ("image: pohto", "there is no column 'pohto'; did you mean 'photo'?"),
        ("imge: photo", "'imge' is no field; did you mean 'image'?"),
        ("image: [photo, words]", "image must be the name of a column, not"),
        ("- image", "must hold lines such as"),
        ("image: {a: b", "is not YAML"),
        ("image: photo", "none of the columns (photo, words) is known"),
        ("caption: photo.x", "there is no column 'photo.x'"),
    ],
)
def test_maps_that_do_not_fit(text, words, place, capsys):
    (place / "t.csv").write_bytes(table([{"photo": "cat.jpg", "words": "A cat."}]))
    (place / "m.yaml").write_text(text)
    assert prepare(place / "t.csv", "--map", place / "m.yaml", "--out", place / "out") == 2
    assert words in capsys.readouterr().err
    assert prepare("doc_qa", "--map", place / "m.yaml", "--out", place / "out") == 2
    assert "--map is for files of your own" in capsys.readouterr().err


# --- cells -----------------------------------------------------------------------------------------------------------


def test_columns_that_are_not_plain_texts(place):
    rows = [
        {
            "images": '["cat.jpg", "horse.jpg"]',
            "messages": json.dumps(CHAT),
            "weight": "0.5",
            "label": "kept out",
        }
    ]
    (place / "chat.csv").write_bytes(table(rows))
    assert prepare(place / "chat.csv", "--out", place / "out", "--strict") == 0
    line = {"images": ["cat.jpg", "horse.jpg"], "messages": ["Which animal?", "a cat"], "weight": 0.5}
    assert records(place / "out" / "chat") == own(place, line)
    points = [{"image": "cat.jpg", "label": "eyes", "points": "[[37.8, 36.8], [71.3, 45.1]]", "point_scale": "100"}]
    (place / "points.csv").write_bytes(table(points))
    assert prepare(place / "points.csv", "--out", place / "out", "--strict") == 0
    made = {"style": "pointing", "label": "eyes", "points": [[37.8, 36.8], [71.3, 45.1]], "point_scale": 100}
    assert records(place / "out" / "points") == own(place, {"image": "cat.jpg", "annotations": [made]})


@pytest.mark.parametrize(
    "options, answer, index",
    [
        ({"choices": '["dog", "cat"]'}, "cat", 1),
        ({"choices": '["dog", "cat"]'}, "A", 0),
        ({"A": "dog", "B": "cat", "C": ""}, "(b)", 1),
        ({"option_a": "dog", "option_b": "cat"}, "B.", 1),
        ({"A": "B", "B": "A"}, "A", 1),
    ],
)
def test_options(options, answer, index, place):
    row = {"image": "cat.jpg", "question": "Which animal?", **options, "answer": answer}
    (place / "t.csv").write_bytes(table([row]))
    assert prepare(place / "t.csv", "--out", place / "out", "--strict") == 0
    texts = json.loads(options["choices"]) if "choices" in options else [text for text in options.values() if text]
    made = {"style": "a_okvqa_mc", "question": "Which animal?", "options": texts, "answer_idx": index}
    assert records(place / "out" / "t") == own(place, {"image": "cat.jpg", "annotations": [made]})


BAD = [
    ({"image": "cat.jpg", "question": "q", "choices": '["a", "b"]', "answer": "1"}, "answer", "one of the options"),
    ({"image": "cat.jpg", "question": "q", "choices": "a;b", "answer": "a"}, "choices", "a list"),
    ({"image": "cat.jpg", "question": "q", "choices": '["a", "b"', "answer": "a"}, "choices", "a JSON list"),
    (
        {"image": "cat.jpg", "question": "q", "choices": '["a", "a"]', "answer": "a"},
        "choices[1]",
        "no other one equals",
    ),
    ({"photo": "gone.jpg", "caption": "x"}, "photo", "a file that is there"),
    ({"path": "cat.txt", "caption": "x"}, "path", "an image or a video"),
    ({"image": "", "caption": ""}, "caption", "nothing to learn from; no column is filled"),
    ({"image": "cat.jpg", "caption": ""}, "caption", "nothing to learn from; filled: image"),
    ({"image": "cat.jpg", "description": " "}, "description", "not blank"),
    ({"video": "bunny.mp4", "caption": "x", "start": "a", "end": "2"}, "start", "a number"),
    ({"video": "bunny.mp4", "caption": "x", "start": "1", "end": ""}, "end", "start and end"),
    ({"video": "bunny.mp4", "caption": "x", "start_time": "100", "end": "200"}, "start_time", "inside the film"),
    (
        {"conversation": '[{"from": "human", "value": "q"}, {"from": "tool", "value": "a"}]'},
        "conversation[1].from",
        "user",
    ),
]


GOOD = {
    **{"image": "cat.jpg", "photo": "cat.jpg", "path": "cat.jpg", "video": "bunny.mp4", "caption": "A cat."},
    **{"description": "A cat.", "question": "q", "answer": "a", "choices": '["a", "b"]', "start": "1", "end": "2"},
    **{"start_time": "1", "conversation": '[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]'},
}


@pytest.mark.parametrize("row, column, words", BAD)
def test_what_cannot_be_used_names_the_column(row, column, words, place):
    (place / "t.csv").write_bytes(table([row, {name: GOOD[name] for name in row}]))
    assert prepare(place / "t.csv", "--out", place / "out") == 0
    (line,) = skipped(place / "out" / "t")
    assert (line["file"], line["line"], line["field"]) == ("t.csv", 2, column)
    assert words in f"{line['expected']} {line['detail']}"


def test_rows_of_another_length_spoil_no_other(place, capsys):
    (place / "t.csv").write_bytes(
        b"image,caption\ncat.jpg,A cat.\ncat.jpg\n\ncat.jpg,A,B\n" + b'horse.jpg,"A\nhorse."\n'
    )
    assert prepare(place / "t.csv", "--out", place / "out") == 0
    assert [(line["line"], line["seen"]) for line in skipped(place / "out" / "t")] == [(3, "1 cell"), (5, "3 cells")]
    assert len(records(place / "out" / "t")) == 2
    for text, words in (
        (b"image,image\nx,y\n", "each once"),
        (b"", "each once"),
        (
            b'image,caption\n"cat.jpg,A\ncat.\n',
            "line 2: the row that begins there cannot be read: a quote opened in it",
        ),
        (b'image,caption\ncat.jpg,A cat.\ncat.jpg,"A\n' + 9 * b"long cat.\n", "bad.csv, line 3: the row that"),
        (b'text\nA cat.\n"A long\ncat.\n', "bad.csv, line 3: the row that"),
        (b'image,"caption\ncat.jpg,A cat.\n', "bad.csv, line 1: the row that"),
        (b'image,"cap"tion\ncat.jpg,A cat.\n', "bad.csv, line 1: holds a row that cannot be read"),
        ("image,Büld\ncat.jpg,A cat\n".encode("latin1"), "bad.csv, line 1: is not UTF-8; it may be Latin-1: iconv -f"),
        ("image,caption\ncat.jpg,A cat\n".encode("utf-16"), "line 1: is not UTF-8; it may be UTF-16: iconv -f UTF-16"),
        ("image,caption\ncat.jpg,A cat\n".encode("utf-16-le"), "it may be UTF-16: iconv -f UTF-16 -t UTF-8"),
    ):
        (place / "bad.csv").write_bytes(text)
        assert prepare(place / "bad.csv", "--out", place / "out") == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, ZSTD])
@pytest.mark.parametrize("part", [slice(0, -12), slice(40, None), slice(0, 0)])
def test_a_packed_file_that_is_damaged_is_named(kind, pack, part, place, capsys):
    """Cut short, without its beginning, or changed in the middle."""
    whole = pack((LINES if kind == "jsonl" else table(ROWS)) + random.Random(1).randbytes(2000).hex().encode())
    end = {gzip.compress: "gz", bz2.compress: "bz2", lzma.compress: "xz", ZSTD: "zst"}[pack]
    changed = whole[:20] + bytes(byte ^ 255 for byte in whole[20:60]) + whole[60:]
    path = place / f"bad.{kind}.{end}"
    path.write_bytes(whole[part] or changed)
    assert prepare(path, "--out", place / "out") == 2
    said = capsys.readouterr().err
    assert str(path) in said and ("damaged" in said or "cannot be read" in said) and "Traceback" not in said


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
@pytest.mark.parametrize("number", [2, 3, 5])
def test_a_quote_that_is_never_closed_costs_its_line(number, name, place):
    """What comes after it are rows as before."""
    rows = ["image,caption", "cat.jpg,A cat.", "horse.jpg,A horse.", "", "coffee.jpg,Coffee.\r"]
    text = "\n".join(row.replace(",", ',"') if n == number else row for n, row in enumerate(rows, 1)).encode()
    (place / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert prepare(place / name, "--out", place / "out") == 0
    (line,) = skipped(place / "out" / "t")
    assert (line["line"], line["seen"]) == (number, "a quote that is opened and never closed")
    assert len(records(place / "out" / "t")) == 2


def test_rows_that_an_open_quote_swallows_are_named(place):
    text = 'image,caption\ncat.jpg,"A cat.\nhorse.jpg,A horse.\ncat.jpg,"A"\ncoffee.jpg,Coffee.\n'
    (place / "t.csv").write_text(text)
    assert prepare(place / "t.csv", "--out", place / "out") == 0
    (line,) = skipped(place / "out" / "t")
    assert line["line"] == 2 and line["seen"].endswith(", with the lines to 4")
    assert len(records(place / "out" / "t")) == 1


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz"])
def test_a_row_that_is_not_utf8_is_left_out_by_itself(name, place):
    rows = [{"image": "cat.jpg", "caption": "A cat."}, {"image": "horse.jpg", "caption": "Ein Gäul"}]
    good = table([rows[0], {"image": "coffee.jpg", "caption": "Käse"}], "\t" if name == "t.tsv" else ",")
    text = good + table([rows[1]], "\t" if name == "t.tsv" else ",").decode().splitlines()[1].encode("latin1") + b"\n"
    (place / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert prepare(place / name, "--out", place / "out") == 0
    assert len(records(place / "out" / "t")) == 2
    (line,) = skipped(place / "out" / "t")
    assert (line["line"], line["field"], line["seen"]) == (4, "caption", "'Ein G\\xe4ul'")
    assert line["expected"] == "UTF-8; it may be Latin-1: iconv -f LATIN1 -t UTF-8"


def test_a_row_that_cannot_be_read_is_left_out_by_itself(place):
    long = "A cat. " * 30_000  # more than a cell may have unless the csv module is told otherwise
    rows = ["image,caption", 'cat.jpg,"A" cat', "horse.jpg,A horse.", f"cat.jpg,{long}", ""]
    rows += ['cat.jpg,"said "me"."', "cat.jpg,cat"]
    (place / "t.csv").write_text("\n".join(rows))
    assert prepare(place / "t.csv", "--out", place / "out") == 0
    assert [line["line"] for line in skipped(place / "out" / "t")] == [2, 6]
    assert "a quote in them" in skipped(place / "out" / "t")[0]["expected"]
    assert len(records(place / "out" / "t")) == 3


def test_words_that_other_programs_write_for_nothing_are_counted(place):
    (place / "t.csv").write_text(
        "image,question,answer\ncat.jpg,What?,NaN\ncat.jpg,Who?,null\ncat.jpg,Why?,NaN\ncat.jpg,,A\n"
    )
    prepare(place / "t.csv", "--out", place / "out")
    seen = {note: count for note, count in notes(place / "out" / "t").items() if "for the word" in note}
    assert seen == {taken_as_word("answer", "NaN"): 2, taken_as_word("answer", "null"): 1}


def test_rows_that_a_quote_swallows_are_said(place, capsys):
    """A quote opened in one line and closed lines later is valid CSV, and takes the rows between for text."""
    text = b'image,caption\nhorse.jpg,"A\n"\ncat.jpg,"A cat\nhorse.jpg,A horse\ncoffee.jpg,cup"\nhorse.jpg,"A\nB"\n'
    (place / "t.csv").write_bytes(text)
    assert prepare(place / "t.csv", "--out", place / "out") == 0
    assert len(records(place / "out" / "t")) == 3
    assert notes(place / "out" / "t")[SEVERAL_LINES.format(4)] == 2
    assert "2  rows with a cell over several lines, the first begins in line 4: " in capsys.readouterr().out
    (place / "u.csv").write_bytes(b'image,caption,by\ncat.jpg,"A cat,me\nhorse.jpg,A horse",me,you\ncat.jpg,A,me\n')
    assert prepare(place / "u.csv", "--out", place / "out") == 0
    (line,) = skipped(place / "out" / "u")
    assert line["seen"] == "4 cells, in a row over several lines that begins in line 2"


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def hub_rows():
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(buffer, "PNG")
    parts = [{"type": "image", "index": 0, "text": None}, {"type": "text", "index": None, "text": "Which animal?"}]
    return [
        {
            "images": [{"bytes": buffer.getvalue(), "path": "r.png"}],
            "messages": [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": [{**parts[1], "text": "a cat"}]},
            ],
            "source": "made",
        }
    ] * 2


def test_folders_of_datasets(place):
    """Written by the library itself: one split, several, and Parquet as on the Hub."""
    datasets = pytest.importorskip("datasets")
    rows, red = hub_rows(), place / "r.png"
    red.write_bytes(rows[0]["images"][0]["bytes"])
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(place / "one")
    datasets.DatasetDict({"test": made.select([0]), "train": made}).save_to_disk(place / "two")
    (place / "three" / "data").mkdir(parents=True)
    made.to_parquet(place / "three" / "data" / "train-00000-of-00001.parquet")
    made.to_parquet(place / "three" / "data" / "test-00000-of-00001.parquet")
    expected = own(place, *[{"images": ["r.png"], "messages": ["Which animal?", "a cat"]}] * 2)
    for name in ("one", "two", "three"):
        assert prepare(place / name, "--out", place / "out", "--strict") == 0
        assert records(place / "out" / name) == expected
        assert notes(place / "out" / name)[not_read("source")] == 2


def test_fingerprints_of_large_tables(tmp_path):
    """Large tables are not read whole for it, and yet another size, beginning or end gives another."""
    body = bytes(3 * END_BYTES)
    contents = [body, body + b"x", b"x" + body[1:], body[:-1] + b"x"]
    found = []
    for i, content in enumerate(contents):
        path = tmp_path / f"{i}.parquet"
        path.write_bytes(content)
        found.append(fingerprint(path, large=1000))
        assert fingerprint(path) == hashlib.sha256(content).hexdigest()
    assert len(set(found)) == len(contents)
    (tmp_path / "a.jsonl").write_bytes(body)
    assert fingerprint(tmp_path / "a.jsonl", large=1000) == hashlib.sha256(body).hexdigest()


def test_other_splits_are_said(place, capsys):
    (place / "set").mkdir()
    for name in ("train", "test"):
        pq.write_table(pa.Table.from_pylist([{"question": "q", "answer": "a"}]), place / "set" / f"{name}.parquet")
    assert prepare(place / "set", "--out", place / "out") == 0
    assert "not read: the file" in (said := capsys.readouterr().out) and "test.parquet" in said
    (place / "empty").mkdir()
    assert prepare(place / "empty", "--out", place / "out") == 2
    assert "a folder without tars or a data set of Hugging Face's in it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
@pytest.mark.parametrize("split", ["", "train"])
def test_image_folders(name, split, place, capsys):
    folder = place / "set" / split
    (folder / "more").mkdir(parents=True)
    shutil.copy(demo.MEDIA / "cat.jpg", folder)
    for other in ("more/dog.jpg", "zebra.png"):
        shutil.copy(demo.MEDIA / "cat.jpg", folder / other)
    rows = [{"file_name": "cat.jpg", "text": "A cat.", "label": 1}]
    if name.endswith("csv"):
        (folder / name).write_bytes(table(rows))
    elif name.endswith("jsonl"):
        (folder / name).write_text(json.dumps(rows[0]))
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    assert prepare(place / "set", "--out", place / "out", "--strict") == 0
    assert (
        f"  not read: 2 pictures or films that {name} does not name, such as more/dog.jpg\n" in capsys.readouterr().out
    )
    assert records(place / "out" / "set") == own(place, {"image": "cat.jpg", "caption": "A cat."})


def test_a_row_of_an_image_folder_is_said_to_be_in_its_metadata(place):
    (place / "set").mkdir()
    shutil.copy(demo.MEDIA / "cat.jpg", place / "set")
    rows = [{"file_name": "cat.jpg", "text": "A cat."}, {"file_name": "gone.jpg", "text": "A dog."}]
    (place / "set" / "metadata.csv").write_bytes(table(rows))
    assert prepare(place / "set", "--out", place / "out") == 0
    (line,) = skipped(place / "out" / "set")
    assert (line["file"], line["line"], line["seen"]) == ("metadata.csv", 3, "gone.jpg")


def test_names_of_classes_and_messages_as_columns(place):
    """A ClassLabel is a number with a name; a Sequence of objects is stored as an object of lists."""
    features = {"animal": {"names": ["dog", "cat"], "_type": "ClassLabel"}}
    meta = {"huggingface": json.dumps({"info": {"features": features}})}
    rows = pa.Table.from_pylist([{"image": "cat.jpg", "question": "Which?", "animal": 1}]).replace_schema_metadata(meta)
    pq.write_table(rows, place / "t.parquet")
    (place / "m.yaml").write_text("answer: animal")
    assert prepare(place / "t.parquet", "--map", place / "m.yaml", "--out", place / "out", "--strict") == 0
    assert records(place / "out" / "t") == own(place, {"image": "cat.jpg", "question": "Which?", "answer": "cat"})
    columns = {"role": ["user", "assistant"], "content": ["q", "a"]}
    pq.write_table(pa.Table.from_pylist([{"messages": columns}]), place / "u.parquet")
    assert prepare(place / "u.parquet", "--out", place / "out", "--strict") == 0
    assert records(place / "out" / "u") == own(place, {"messages": ["q", "a"]})


def test_folders_and_objects_that_are_none(place, capsys):
    (place / "set").mkdir()
    for name, text, words in (
        ("set/dataset_dict.json", "{", "not what save_to_disk writes"),
        ("set/dataset_dict.json", '{"splits": []}', "splits is []"),
        ("set/dataset_dict.json", '{"splits": ["train"]}', "state.json is not what save_to_disk writes"),
        ("x.json", '{\n"data": [],\n"version": 1}', "x.json is one object (data, version)"),
        ("y.json", "[1, 2", "y.json cannot be parsed after entry"),
        ("z.parquet", "no table", "z.parquet cannot be read"),
        ("z.arrow", "no table", "z.arrow cannot be read"),
    ):
        (place / name).write_text(text)
        assert prepare(place / name.partition("/")[0], "--out", place / "out") == 2
        assert words in capsys.readouterr().err


def test_lines_with_fields_of_their_own_under_a_map(place):
    """A map adds to what is read without one: lines may differ in image and images, points and boxes."""
    lines = [
        {"image": "cat.jpg", "caption": "A cat."},
        {"images": ["cat.jpg", "horse.jpg"], "caption": "Two."},
        {"image": "cat.jpg", "label": "eye", "points": [[10, 20]]},
        {"image": "cat.jpg", "label": "eye", "bbox": [[10, 20, 30, 40]]},
        {"image": "cat.jpg", "label": "eye", "points": [[10, 20]], "bbox": [[10, 20, 30, 40]]},
        {"image": "cat.jpg", "images": ["horse.jpg"], "caption": "Both."},
    ]
    (place / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (place / "map.yaml").write_text("box_format: xyxy\n")
    assert prepare(place / "t.jsonl", "--map", place / "map.yaml", "--out", place / "out", "--strict") == 0
    eye, other = ([{"style": "pointing", "label": "eye", "points": [point]}] for point in ([10, 20], [20.0, 30.0]))
    pointed = [{"image": "cat.jpg", "annotations": made} for made in (eye, other, eye)]
    expected = [*lines[:2], *pointed, {"images": ["horse.jpg"], "caption": "Both."}]
    assert records(place / "out" / "t") == own(place, *expected)
    said = notes(place / "out" / "t")
    assert said[not_read("bbox")] == 1 and said[not_read("image")] == 1


def test_an_entry_of_a_list_that_is_no_record(place):
    (place / "t.json").write_text(json.dumps([[1, 2], {"image": "cat.jpg", "caption": "A cat."}]))
    assert prepare(place / "t.json", "--out", place / "out") == 0
    (line,) = skipped(place / "out" / "t")
    assert (line["line"], line["seen"], line["expected"]) == (1, "[1, 2]", "an object, a record")


def test_messages_with_names_and_parts_with_rates(place):
    """OpenAI's `name` of a speaker and Qwen's `fps` of a part are left out, and counted."""
    parts = [{"type": "video", "video": "bunny.mp4", "fps": 1.0, "max_pixels": 9}, {"type": "text", "text": "Who?"}]
    asked, said = {"role": "user", "content": parts, "name": "me"}, {"role": "assistant", "content": "A rabbit."}
    lines = [{"messages": [asked, said]}, {"messages": [{"role": "developer", "content": "Be nice."}, asked, said]}]
    lines += [{"text": "A.", "url": "x"}, {"text": "A.", "image": "cat.jpg"}]
    (place / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert prepare(place / "t.jsonl", "--out", place / "out") == 0
    assert records(place / "out" / "t") == own(place, {"video": "bunny.mp4", "messages": ["Who?", "A rabbit."]})
    assert {not_read(name) for name in ("fps", "max_pixels", "name")} <= set(notes(place / "out" / "t"))
    told, unknown, beside = skipped(place / "out" / "t")
    assert "developer messages cannot be trained" in told["expected"] and told["field"] == "messages[0].role"
    assert unknown["field"] == "url" and " text" in unknown["expected"]
    assert beside["field"] == "text" and beside["expected"].startswith("caption")


def test_a_folder_that_is_not_read_says_what_to_name(place, capsys):
    (place / "both" / ".hidden").mkdir(parents=True)
    for name in ("b.csv", "a.jsonl", "notes.txt"):
        (place / "both" / name).write_text("x\n")
    (place / "classes" / "cat").mkdir(parents=True)
    shutil.copy(place / "cat.jpg", place / "classes" / "cat")
    for folder, words in (
        ("both", f"name one of its files: {place / 'both' / 'a.jsonl'}, {place / 'both' / 'b.csv'}\n"),
        ("classes", "folders (cat) say nothing that can be trained: write a file with a line for each picture"),
        ("classes/cat", "name a file (.jsonl"),
    ):
        assert prepare(place / folder, "--out", place / "out") == 2
        assert words in capsys.readouterr().err
    (place / "classes" / "metadata.csv").write_text("file_name,caption\ncat/cat.jpg,A cat.\n")
    assert prepare(place / "classes", "--out", place / "out") == 0, "as the message says"


# --- COCO ------------------------------------------------------------------------------------------------------------

BOX = {"image_id": 7, "category_id": 1, "bbox": [10, 20, 30, 40], "iscrowd": 0}


def coco(**changes):
    return {
        "info": {},
        "images": [{"id": 7, "file_name": "cat.jpg", "width": 400, "height": 300}, {"id": 8, "file_name": "horse.jpg"}],
        "annotations": [
            BOX,
            {**BOX, "bbox": [0, 0, 5, 5], "keypoints": [1, 2, 2]},
            {**BOX, "category_id": 2},
            {**BOX, "iscrowd": 1},
        ],
        "categories": [{"id": 1, "name": "eye"}, {"id": 2, "name": "nose"}],
        **changes,
    }


@pytest.mark.parametrize("indent", [None, 1])
def test_coco(indent, place):
    (place / "c.json").write_text(json.dumps(coco(), indent=indent))
    assert prepare(place / "c.json", "--out", place / "out") == 0
    size = {"width": 400, "height": 300}
    eyes = {"style": "pointing", "label": "eye", "points": [[25.0, 40.0], [2.5, 2.5]], **size}
    nose = {"style": "pointing", "label": "nose", "points": [[25.0, 40.0]], **size}
    assert records(place / "out" / "c") == own(place, {"image": "cat.jpg", "annotations": [eyes, nose]})
    assert notes(place / "out" / "c") == {BOXES: 1, GROUPS: 1, KEYPOINTS: 1, OTHER_SIZE: 1}
    (line,) = skipped(place / "out" / "c")
    assert (line["line"], line["unit"], line["field"], line["seen"]) == (2, "image", "annotations", "no box of image 8")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"images": {}}, "images must be a list"),
        ({"images": [3]}, "images[0] must be an object"),
        ({"images": [{"id": 7}, {"id": 7, "file_name": "cat.jpg"}]}, "images[1].id is 7, as of another one before it"),
        ({"categories": [{"name": "x"}]}, "categories[0].id must be a number"),
        ({"categories": [{"id": 1, "name": "eye"}, {"id": 1, "name": "nose"}]}, "categories[1].id is 1, as of another"),
        ({"annotations": {}}, "annotations must be a list"),
        (
            {"annotations": [{**BOX, "bbox": [1, 2, 3]}]},
            "annotations[0].bbox holds [1, 2, 3], not [x, y, w",
        ),
    ],
)
def test_coco_that_is_none(changes, words, place, capsys):
    (place / "c.json").write_text(json.dumps(coco(**changes)))
    assert prepare(place / "c.json", "--out", place / "out") == 2
    listed = place / "out" / "c.skipped.jsonl"
    assert words in capsys.readouterr().err + (listed.read_text() if listed.is_file() else "")


@pytest.mark.parametrize(
    "changes, field, seen",
    [
        ({"image_id": 9}, "image_id", "9"),
        ({"image_id": "7"}, "image_id", "'7'"),
        ({"image_id": None}, "image_id", "None"),
        ({"category_id": 9}, "category_id", "9"),
        ({"category_id": [1]}, "category_id", "[1]"),
        ({"bbox": None}, "bbox", "None"),
        ({"bbox": []}, "bbox", "[]"),
        ({"bbox": [1, 2, 0, 4]}, "bbox", "[1, 2, 0, 4]"),
        ({"bbox": [1, 2, 3, -4]}, "bbox", "[1, 2, 3, -4]"),
        ({"bbox": [500, 2, 3, 4]}, "bbox", "left, top, right, bottom [500, 2, 503, 6]"),
    ],
)
def test_a_coco_annotation_of_nothing_is_left_out_by_itself(changes, field, seen, place, capsys):
    stray = {**BOX, "id": 55, **changes}
    (place / "good.json").write_text(json.dumps(coco()))
    (place / "c.json").write_text(json.dumps(coco(annotations=[stray, *coco()["annotations"]])))
    assert prepare(place / "good.json", place / "c.json", "--out", place / "out") == 0
    assert records(place / "out" / "c") == records(place / "out" / "good")
    line, image = skipped(place / "out" / "c")
    assert image["unit"] == "image"
    assert [image] == [{**one, "file": "c.json"} for one in skipped(place / "out" / "good")]
    assert (line["key"], line["file"], line["unit"], line["line"]) == ("annotation 55", "c.json", "annotation", 1)
    assert (line["field"], line["seen"]) == (f"annotations[0].{field}", seen)
    assert "(of annotation 55)" in line["expected"]
    assert read_head(place / "out" / "c" / MANIFEST)["skipped"][LEFT_OUT] == 1
    said = capsys.readouterr().out
    assert "c.json, annotation 1: annotations[0]." in said and "skipped 1 and 1 annotation, listed in" in said
    assert prepare(place / "c.json", "--out", place / "strict", "--strict") == 2
    assert f"c.json, annotation 1, annotations[0].{field}: {LEFT_OUT}" in capsys.readouterr().err


def test_a_coco_annotation_that_is_no_object_is_left_out(place):
    (place / "c.json").write_text(json.dumps(coco(annotations=[*coco()["annotations"], 3])))
    assert prepare(place / "c.json", "--out", place / "out") == 0
    line = skipped(place / "out" / "c")[0]
    assert (line["key"], line["line"], line["field"], line["seen"]) == ("annotations[4]", 5, "annotations[4]", "3")


@pytest.mark.parametrize("indent", [None, 1])
def test_coco_captions(indent, place):
    images = [{"id": 7, "file_name": "cat.jpg", "width": 1, "height": 1}, {"id": 8, "file_name": "horse.jpg"}]
    said = [(7, "A cat.\n"), (8, "A horse."), (7, "An animal."), (9, "Nobody."), (7, " "), (7, 3)]
    annotations = [{"id": i, "image_id": image, "caption": text} for i, (image, text) in enumerate(said)]
    (place / "c.json").write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}, indent=indent))
    assert prepare(place / "c.json", "--out", place / "out") == 0
    cat, horse, animal = ({"style": "short_caption", "text": text} for text in ("A cat.", "A horse.", "An animal."))
    made = own(
        place, {"image": "cat.jpg", "annotations": [cat, animal]}, {"image": "horse.jpg", "annotations": [horse]}
    )
    assert records(place / "out" / "c") == made
    fields = ["annotations[3].image_id", "annotations[4].caption", "annotations[5].caption"]
    assert [line["field"] for line in skipped(place / "out" / "c")] == fields
    assert read_head(place / "out" / "c" / MANIFEST)["skipped"] == {LEFT_OUT: 3}


def test_a_record_with_images_and_annotations_is_no_coco(place):
    line = {"images": ["cat.jpg"], "annotations": [{"style": "long_caption", "text": "A cat."}]}
    (place / "c.json").write_text(json.dumps(line) + "\n")
    assert prepare(place / "c.json", "--out", place / "out") == 0
    assert records(place / "out" / "c") == own(place, line)


# --- docs/own_files.md -----------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "own_files.md").read_text()


def test_the_page_prints_what_the_command_does(place, capsys, monkeypatch):
    """The page's table and map, and what it says that the command prints of them."""
    monkeypatch.chdir(place)
    block = PAGE
    for name, text in re.findall(r"^cat > (\S+) <<'END'\n(.*?)^END\n", block, re.M | re.S):
        (place / name).write_text(text)
    command = re.search(r"^molmo2 (prepare films\.csv .*)$", block, re.M)[1]
    assert main([*command.split(), "--workers", "0", "--strict"]) == 0
    printed = block.split("prints\n\n```\n")[1].split("\n```")[0]
    assert capsys.readouterr().out.startswith(printed + "\n")
    film = {"video": "bunny.mp4", "question": "Which animal is it?", "answer": "a rabbit"}
    assert records(place / "shards" / "films") == own(place, {**film, "clip": [1, 4]}, {**film, "answer": "a bunny"})
