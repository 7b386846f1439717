"""Own data: null, common shapes of other projects, names of files, and when prepare gives up."""

import base64
import json

import pytest

from data_prep import demo
from data_prep.giving_up import ABSENT_AFTER, GIVE_UP_AFTER
from data_prep.sources.own import SAME_ID, entry_sample
from data_prep.sources.own_shapes import NUMBER_NOTE, not_read
from data_prep.sources.references import File, Inline
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.json_values import FieldError
from molmo2_nemo.data.manifest import MANIFEST, read_head
from molmo2_nemo.data.record import BadRecord, parse_record
from molmo2_nemo.data.shards import ShardDataset

QA = {"style": "user_qa", "question": "q", "answer": "a"}


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def prepare(*words):
    return main(["prepare", *map(str, words), "--workers", "0"])


def skipped(folder):
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


# --- null ------------------------------------------------------------------------------------------------------------

FULL = {
    "messages": None,
    "images": None,
    "video": None,
    "clip": None,
    "sampling": {"max_fps": None},
    "subtitles": None,
    "weight": None,
    "annotations": [
        {**QA, "label": None, "explanation": None},
        {"style": "text_sft", "turns": [{**QA, "prompt": None}]},
    ],
}


def test_null_means_left_out_at_every_depth(tmp_path):
    bare = {"annotations": [QA, {"style": "text_sft", "turns": [QA]}], "sampling": {}}
    path = write(tmp_path / "own.jsonl", FULL, bare)
    assert prepare(path, "--out", tmp_path / "out") == 0
    data = ShardDataset(tmp_path / "out" / "own")
    first, second = (data.read(i)[1]["json"] for i in range(2))
    assert first == second
    foreign = parse_record("s:k", {"json": json.dumps({n: v for n, v in FULL.items() if n != "messages"}).encode()})
    assert foreign == parse_record("s:k", {"json": json.dumps(bare).encode()})


@pytest.mark.parametrize(
    "change, field",
    [
        ({"messages": ["q", None]}, "messages[1]"),
        ({"annotations": [None]}, "annotations[0]"),
        ({"annotations": [{**QA, "answers": ["a", None]}]}, "annotations[0].answers[1]"),
        (
            {"annotations": [QA, {"style": "pointing", "label": "x", "points": [[1, None]]}]},
            "annotations[1].points[0][1]",
        ),
        ({"annotations": [QA], "subtitles": [None]}, "subtitles[0]"),
    ],
)
def test_null_in_a_list_is_named(tmp_path, change, field):
    path = write(tmp_path / "own.jsonl", change, {"annotations": [QA]})
    assert prepare(path, "--out", tmp_path / "out") == 0
    (line,) = skipped(tmp_path / "out" / "own")
    assert (line["file"], line["line"], line["field"], line["seen"]) == ("own.jsonl", 1, field, "null")
    if "annotations" in change:
        with pytest.raises(BadRecord) as caught:
            parse_record("s:k", {"json": json.dumps(change).encode()})
        assert caught.value.fault.field == field


# --- shapes of other projects ----------------------------------------------------------------------------------------


def made(entry):
    return entry_sample(entry, "k").annotations


def role(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_numbers_and_lists_as_answers(tmp_path):
    assert made({"question": "q", "answer": 3})[0]["answer"] == "3"
    assert made({"question": "q", "answer": [2.5, "two"]})[0] == {
        "style": "user_qa",
        "question": "q",
        "answers": ["2.5", "two"],
    }
    turns = {"style": "user_qa", "turns": [{"question": "q", "answer": 1}], "either": [{"answer": 2}]}
    (read,) = made({"annotations": [turns]})
    assert read["turns"][0]["answer"] == "1" and read["either"][0]["answer"] == "2"
    path = write(tmp_path / "own.jsonl", {"question": "q", "answer": 3}, {"question": "q", "answer": [1, 1, 2]})
    assert prepare(path, "--out", tmp_path / "out") == 0
    assert read_head(tmp_path / "out" / "own" / MANIFEST)["notes"] == {NUMBER_NOTE: [2, "00000001"]}
    assert made({"question": "q", "answer": True})[0]["answer"] is True, "left for the reader, which refuses it"


def test_roles_and_conversations():
    plain = [{"style": "text_sft", "messages": ["q", "a"]}]
    assert made({"messages": role("q", "a")}) == plain
    parts = [{"type": "image"}, {"type": "text", "text": "q"}]
    assert made({"image": "a.jpg", "messages": role(parts, "a")}) == plain
    llava = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    sample = entry_sample({"id": 7, "image": "a.jpg", "conversations": llava}, "k")
    assert sample.annotations == plain and sample.key == "7"
    llava[0]["value"] = "q\n<image>"
    assert made({"image": "a.jpg", "conversations": llava}) == plain


def llava(question, answer="a"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
IMAGE_PARTS = [
    {"type": "image_url", "image_url": {"url": "a.jpg", "detail": "low"}},
    {"type": "image_url", "image_url": "a.jpg"},
    {"type": "image", "image": "a.jpg"},
    {"type": "image", "url": "a.jpg"},
    {"type": "image", "path": "a.jpg"},
    {"type": "input_image", "image_url": "a.jpg"},
]


@pytest.mark.parametrize("part", IMAGE_PARTS)
def test_parts_that_name_media(part):
    text = {"type": "text", "text": "q"}
    for order in ([part, text], [text, part]):
        sample = entry_sample({"messages": role(order, "a")}, "k")
        assert sample.images == [File("a.jpg")] and sample.annotations == [
            {"style": "text_sft", "messages": ["q", "a"]}
        ]
        assert sample.notes == ((not_read("detail"),) if "detail" in str(part) else ())


def test_the_order_of_media_is_that_of_the_parts():
    parts = [{"type": "image", "image": name} for name in ("b.jpg", "a.jpg", f"data:image/png;base64,{PNG}")]
    sample = entry_sample({"messages": role([*parts, {"type": "text", "text": "q"}], "a")}, "k")
    assert sample.images == [File("b.jpg"), File("a.jpg"), Inline(base64.b64decode(PNG))]
    film = entry_sample({"messages": role([{"type": "video", "video": "c.mp4"}, "q"], "a")}, "k")
    assert film.video == File("c.mp4") and film.annotations[0]["messages"] == ["q", "a"]


def test_lists_of_media_and_fields_that_nothing_reads(tmp_path, capsys):
    two = entry_sample({"image": ["a.jpg", "b.jpg"], "conversations": llava("<image><image>\nq")}, "k")
    assert two.images == [File("a.jpg"), File("b.jpg")] and two.annotations[0]["messages"] == ["q", "a"]
    film = entry_sample({"images": [], "videos": ["c.mp4"], "messages": role("<video>q", "a")}, "k")
    assert film.video == File("c.mp4") and not film.images
    swapped = {"conversations": role("q", "a")}, {"messages": llava("q")}
    assert [made(entry) for entry in swapped] == [[{"style": "text_sft", "messages": ["q", "a"]}]] * 2
    line = {"id": "x1", "conversations": llava("q"), "model": "m", "width": 3}
    path = write(tmp_path / "own.jsonl", line, {**line, "id": "x2"}, {"conversations": llava("q", " ")})
    assert prepare(path, "--out", tmp_path / "out") == 0
    notes = read_head(tmp_path / "out" / "own" / MANIFEST)["notes"]
    assert notes == {not_read("model"): [2, "x1"], not_read("width"): [2, "x1"]}
    assert not_read("model") in capsys.readouterr().out
    (bad,) = skipped(tmp_path / "out" / "own")
    assert bad["field"] == "conversations[1]"
    gone = {"image": ["gone.jpg", "lost.jpg"], "messages": role("q", "a")}
    assert prepare(write(tmp_path / "two.jsonl", gone, {"messages": ["q", "a"]}), "--out", tmp_path / "out") == 0
    assert skipped(tmp_path / "out" / "two")[0]["field"] == "image[0]"


@pytest.mark.parametrize(
    "entry, field",
    [
        ({"messages": [{"role": "system", "content": "s"}, *role("q", "a")]}, "messages[0].role"),
        ({"messages": role("q", "a")[::-1]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "q", "tool_calls": []}]}, "messages[0]"),
        ({"messages": role("<image> q", "a")}, "messages[0].content"),
        ({"image": "a.jpg", "messages": role("look at <image> here", "a")}, "messages[0].content"),
        ({"image": "a.jpg", "messages": role("q", "a", "<image> q", "a")}, "messages[2].content"),
        ({"messages": role([{"type": "audio", "audio": "a.wav"}], "a")}, "messages[0].content[0]"),
        ({"messages": role([{"type": "image", "image": "a.jpg", "crop": 4}], "a")}, "messages[0].content[0]"),
        ({"messages": role("q", "a", [{"type": "image", "image": "a.jpg"}], "a")}, "messages[2].content[0]"),
        ({"messages": role(["q ", {"type": "image", "path": "a.jpg"}, " r"], "a")}, "messages[0].content"),
        ({"image": "a.jpg", "messages": role([{"type": "image", "url": "b.jpg"}], "a")}, "image"),
        ({"image": "a.jpg", "messages": role([{"type": "image", "index": 1}], "a")}, "messages[0].content[0].index"),
        ({"messages": role([{"type": "video", "video": v} for v in ("a.mp4", "b.mp4")], "a")}, "messages"),
        (
            {"annotations": [{"style": "text_sft", "messages": role([{"type": "image", "url": "b.jpg"}], "a")}]},
            "annotations[0].messages",
        ),
        ({"messages": role([{"type": "image", "image": "data:image/png;base64,?"}], "a")}, "images[0]"),
        ({"images": ["a.jpg", "b.jpg"], "conversations": llava("<image>q")}, "conversations[0].value"),
        ({"image": "a.jpg", "conversations": llava("<image>\n<image>\nq")}, "conversations[0].value"),
        ({"conversations": llava("q"), "system": "Be brief."}, "system"),
        ({"conversations": llava("q"), "imagee": "a.jpg"}, "imagee"),
        ({"conversations": llava("q"), "points": []}, "points"),
        ({"videos": ["a.mp4", "b.mp4"], "conversations": llava("q")}, "videos"),
        ({"conversations": [{"from": "human", "value": "q"}] * 2}, "conversations[1].from"),
        ({"conversations": [], "messages": ["q", "a"]}, "conversations"),
        ({"id": 7, "messages": ["q", "a"]}, "id"),
        ({"messages": ["a <image> b", "c"]}, "messages[0]"),
        ({"messages": ["<image>\nq", "a"]}, "messages[0]"),
        ({"image": "a.jpg", "messages": ["<image><image>\nq", "a"]}, "messages[0]"),
        ({"image": "a.jpg", "messages": ["q", "a", "<image>\nq", "a"]}, "messages[2]"),
        ({"image": "a.jpg", "question": "left of <image>, what?", "answer": "a"}, "question"),
        ({"question": "<video> q", "answer": "a"}, "question"),
        (
            {
                "image": "a.jpg",
                "annotations": [
                    {
                        "style": "user_qa",
                        "turns": [{"question": "q", "answer": "a"}, {"question": "<image> q", "answer": "a"}],
                    }
                ],
            },
            "annotations[0].turns[1].question",
        ),
        (
            {"image": "a.jpg", "annotations": [{"style": "long_caption", "text": "t", "prompt": "<image> <image>"}]},
            "annotations[0].prompt",
        ),
    ],
)
def test_shapes_with_more_than_one_reading_are_refused(entry, field):
    with pytest.raises(FieldError) as caught:
        entry_sample(entry, "k")
    assert caught.value.fault.field == field


@pytest.mark.parametrize("text", ["<image>\nWhat?", "What? <image>", "What?"])
def test_marks_around_the_first_question_stand_for_the_media(text):
    for asked in ({"question": text, "answer": "a"}, {"messages": [text, "a"]}):
        (made,) = entry_sample({"image": "a.jpg", **asked}, "k").annotations
        assert made.get("question", made.get("messages", [""])[0]) == "What?"
    two = {"images": ["a.jpg", "b.jpg"], "question": "<image> <image>\nWhat?", "answer": "a"}
    assert entry_sample(two, "k").annotations[0]["question"] == "What?"


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tab.xlsx", "z.jsonl.lz4", "d.parquet.gz", "words.txt", "w.yaml"])
def test_other_files_are_told_what_is_read(name, tmp_path, capsys):
    (tmp_path / name).write_text('[{"messages": ["a", "b"]}]')
    assert prepare(tmp_path / name, "--out", tmp_path / "out") == 2
    assert "own data is read from .jsonl" in capsys.readouterr().err


def test_a_changed_or_an_empty_file_is_called_so(tmp_path, capsys):
    path = write(tmp_path / "my.jsonl", {"messages": ["q", "a"]})
    assert prepare(path, "--out", tmp_path / "out") == 0
    write(path, {"messages": ["q", "b"]})
    assert prepare(path, "--out", tmp_path / "out") == 2
    assert "my.jsonl has changed since" in capsys.readouterr().err
    path.write_text("")
    assert prepare(path, "--out", tmp_path / "new") == 2
    assert "has no rows" in capsys.readouterr().err and not list((tmp_path / "new").glob("*skipped*"))


@pytest.mark.parametrize(
    "content, words",
    [
        (b'{"messages": ["q", "a"]}\r{"messages": ["q", "b"]}\r', "two records in one line, or lines that do not end"),
        ('{"messages": ["q", "a"]}\n'.encode("utf-16"), "iconv -f UTF-16"),
    ],
)
def test_another_encoding_is_guessed(tmp_path, content, words, capsys):
    (tmp_path / "my.jsonl").write_bytes(content)
    assert prepare(tmp_path / "my.jsonl", "--out", tmp_path / "out") == 2
    assert words in capsys.readouterr().err


def test_names_of_files(tmp_path, capsys, monkeypatch):
    entry = {"messages": ["a", "b"]}
    one, two = (write(tmp_path / folder / "data.jsonl", entry) for folder in "ab")
    out = tmp_path / "out"
    assert prepare(one, two, "--out", out) == 2
    said = capsys.readouterr().err
    assert str(one) in said and str(two) in said and "NAME=FILE" in said
    assert prepare(one, one, f"other={two}", "--out", out) == 0
    assert sorted(path.name for path in out.iterdir() if path.is_dir() and path.name[0] != ".") == ["data", "other"]
    assert prepare(write(tmp_path / "doc_qa.jsonl", entry), "doc_qa", "--out", out) == 2
    assert "the published doc_qa" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doc_qa").mkdir()
    assert prepare("doc_qa", "--out", out) == 2
    assert "Download by hand" in capsys.readouterr().err, "a folder of that name does not stand for the published set"
    write(tmp_path / "UP.JSONL", entry)
    assert prepare("UP.JSONL", "--out", out) == 0 and (out / "UP").is_dir()


def test_an_id_that_comes_twice_loses_no_line(tmp_path):
    lines = [{"id": name, "conversations": llava("q")} for name in ("x", "x-3", "x", "x")]
    assert prepare(write(tmp_path / "own.jsonl", *lines), "--out", tmp_path / "out", "--strict") == 0
    data = ShardDataset(tmp_path / "out" / "own")
    keys = [data.read(i)[0].rpartition(":")[2] for i in range(len(data))]
    assert keys == ["x", "x-3", "x-3-3", "x-4"]
    assert read_head(tmp_path / "out" / "own" / MANIFEST)["notes"][SAME_ID][0] == 2


def test_a_key_that_comes_twice_names_both_lines(tmp_path):
    lines = [{"messages": ["a", "b"]}, {"key": "k", "messages": ["a", "b"]}] * 2
    path = write(tmp_path / "own.jsonl", *lines)
    assert prepare(path, "--out", tmp_path / "out") == 0
    (line,) = skipped(tmp_path / "out" / "own")
    assert line["reason"] == "duplicate key" and line["line"] == 4 and "line 2" in line["detail"]


# --- giving up -------------------------------------------------------------------------------------------------------


def test_one_missing_picture_refuses_no_set(tmp_path):
    (tmp_path / "cat.jpg").write_bytes((demo.MEDIA / "cat.jpg").read_bytes())
    texts = [{"messages": ["q", "a"]} for _ in range(GIVE_UP_AFTER)]
    bad_lines = [{"oops": 1}] * GIVE_UP_AFTER
    path = write(tmp_path / "own.jsonl", *bad_lines, {"image": "gone.jpg", "caption": "x"}, *texts)
    assert prepare(path, "--out", tmp_path / "out") == 0
    assert read_head(tmp_path / "out" / "own" / MANIFEST)["records"] == GIVE_UP_AFTER


def test_giving_up_keeps_the_list_and_keep_going_goes_on(tmp_path, capsys):
    broken = [{"image": f"{i}.jpg", "caption": "x"} for i in range(GIVE_UP_AFTER + 50)]
    for line in broken:
        (tmp_path / line["image"]).write_bytes(b"no picture")
    path, out = write(tmp_path / "own.jsonl", *broken, {"messages": ["q", "a"]}), tmp_path / "out"
    for _ in range(2):
        assert prepare(path, "--out", out) == 2
        said = capsys.readouterr().err
        assert f"none of the first {GIVE_UP_AFTER} samples" in said and "--keep-going" in said
        assert str(out / "own.partial" / "skipped.jsonl") in said
        assert [line["line"] for line in skipped(out / "own.partial")] == list(range(1, GIVE_UP_AFTER + 1))
    assert prepare(path, "--out", out, "--keep-going") == 0
    assert len(skipped(out / "own")) == len(broken) and sorted(p.name for p in out.glob("own*")) == ["own"]


def test_many_rows_of_one_broken_picture_are_one_failure(tmp_path):
    (tmp_path / "0.jpg").write_bytes(b"no picture")
    rows = [{"image": "0.jpg", "question": f"{i}?", "answer": "a"} for i in range(GIVE_UP_AFTER + 1)]
    path = write(tmp_path / "own.jsonl", *rows, {"messages": ["q", "a"]})
    assert prepare(path, "--out", tmp_path / "out") == 0


def test_a_small_part_of_the_media(tmp_path, capsys):
    """The first files that the samples name are not there: no reason to stop, until so many are gone that a wrong
    folder is likelier; rows of the same missing picture count once."""
    (tmp_path / "cat.jpg").write_bytes((demo.MEDIA / "cat.jpg").read_bytes())
    some = [{"image": f"{i // 2}.jpg", "caption": "x"} for i in range(2 * ABSENT_AFTER - 2)]
    path, out = write(tmp_path / "own.jsonl", *some, {"image": "cat.jpg", "caption": "x"}), tmp_path / "out"
    assert prepare(path, "--out", out) == 0
    said = capsys.readouterr().out
    assert f"1 of {len(some) + 1:,} records; media of {len(some):,} not found" in said
    listed = (out / "own" / "missing.txt").read_text().splitlines()
    assert listed == sorted({line["image"] for line in some})
    more = [{"image": f"{i}.jpg", "caption": "x"} for i in range(ABSENT_AFTER)]
    path = write(tmp_path / "more.jsonl", *more, {"image": "cat.jpg", "caption": "x"})
    assert prepare(path, "--out", out) == 2
    said = capsys.readouterr().err
    assert f"none of the first {ABSENT_AFTER:,} files" in said and "--keep-going" in said
    assert len((out / "more.partial" / "missing.txt").read_text().splitlines()) == ABSENT_AFTER
    assert prepare(path, "--out", out, "--keep-going") == 0
    assert read_head(out / "more" / MANIFEST)["records"] == 1


@pytest.mark.parametrize("given, right", [("raw", "raw/pictures"), ("raw/pictures/deep", "raw/pictures")])
def test_a_wrong_source_is_told_the_right_one(given, right, tmp_path, capsys):
    (tmp_path / "raw" / "pictures" / "deep").mkdir(parents=True)
    (tmp_path / "raw" / "pictures" / "cat.jpg").write_bytes((demo.MEDIA / "cat.jpg").read_bytes())
    path = write(tmp_path / "rows" / "own.jsonl", {"image": "cat.jpg", "caption": "x"})
    assert prepare(path, "--source", tmp_path / given, "--out", tmp_path / "out") == 2
    assert f"give --source {tmp_path / right}." in capsys.readouterr().err
    assert prepare(path, "--source", tmp_path / right, "--out", tmp_path / "out") == 0


def test_two_files_of_one_name(tmp_path, capsys):
    first = write(tmp_path / "a" / "data.jsonl", {"messages": ["q", "a"]})
    second = write(tmp_path / "b" / "data.jsonl", {"messages": ["q", "b"]})
    out = tmp_path / "out"
    assert prepare(first, "--out", out) == 0
    assert prepare(second, "--out", out) == 2 and "--name NAME" in capsys.readouterr().err
    assert prepare(second, "--out", out, "--name", "other") == 0
    assert sorted(p.name for p in out.iterdir()) == ["data", "other"]
    assert prepare(first, second, "--out", out, "--name", "x") == 2
    assert "NAME=FILE" in capsys.readouterr().err
    for name in ("a/b", "..", ""):
        assert prepare(first, "--out", out, "--name", name) == 2


def test_samples_that_fail_for_several_reasons_are_no_general_cause(tmp_path):
    gone = [{"image": f"{i}.jpg", "caption": "x"} for i in range(GIVE_UP_AFTER)]
    path = write(tmp_path / "own.jsonl", {"video": "gone.mp4", "caption": 5}, *gone, {"messages": ["q", "a"]})
    (tmp_path / "0.jpg").write_bytes(b"no picture")
    assert prepare(path, "--out", tmp_path / "out") == 0
