"""Own data: a JSONL file becomes shards through the command, and every mistake is named with its line."""

import json

import pytest

from data_prep import demo
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.annotation_json import read_annotation
from molmo2_nemo.data.record import parse_record
from molmo2_nemo.data.shards import ShardDataset


def write(tmp_path, *lines):
    for name in ("cat.jpg", "horse.jpg", "bunny.mp4"):
        (tmp_path / name).write_bytes((demo.MEDIA / name).read_bytes())
    path = tmp_path / "my.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def prepare(path, *options):
    return main(["prepare", str(path), "--out", str(path.parent / "out"), "--workers", "0", *options])


def records(tmp_path):
    data = ShardDataset(tmp_path / "out" / "my")
    return [parse_record(*data.read(i)) for i in range(len(data))]


def test_short_and_full_forms(tmp_path, capsys):
    full = {"key": "mine", "images": ["cat.jpg", "horse.jpg", "cat.jpg"], "weight": 0.5}
    full["annotations"] = [{"style": "user_qa", "question": "q", "answer": "a"}]
    film = {"video": "bunny.mp4", "question": "What?", "answer": "A rabbit.", "clip": [1, 3]}
    film["subtitles"] = [{"start": 0.5, "end": 1.5, "text": "hello"}, {"start": 3.5, "end": 4, "text": "too late"}]
    path = write(
        tmp_path,
        {"image": "cat.jpg", "caption": "A cat."},
        "",
        film,
        {"messages": ["hi", "hello"]},
        full,
        {"image": "cat.jpg", "variants": [full["annotations"], full["annotations"] * 2], "variant_weights": [1, 2]},
    )
    assert prepare(path, "--shard-records", "2") == 0
    assert "5 records, 3 shards" in capsys.readouterr().out
    got = records(tmp_path)
    cat, horse = ((demo.MEDIA / name).read_bytes() for name in ("cat.jpg", "horse.jpg"))
    caption = read_annotation({"style": "long_caption", "text": "A cat."}, num_images=1, has_video=False)
    assert got[0].images == [cat] and got[0].annotations == [caption]
    assert got[1].video == (demo.MEDIA / "bunny.mp4").read_bytes() and got[1].clip == (1.0, 3.0)
    assert [(line.start, line.end, line.text) for line in got[1].subtitles] == [(0.0, 0.5, "hello")]
    assert got[2].annotations[0].content.turns == (("hi", "hello"),)
    assert got[3].key.endswith(":mine") and got[3].images == [cat, horse, cat] and got[3].weight == 0.5
    assert [len(tree) for tree in got[4].variants] == [1, 2] and got[4].variant_weights == [1.0, 2.0]
    _, members = ShardDataset(tmp_path / "out" / "my").read(3)
    assert sorted(members) == ["0.jpg", "1.jpg", "json"], "a picture that comes twice is stored once"


BAD = [
    ("{", "line 2", "cannot be parsed"),
    ({"image": "dog.jpg", "caption": "x"}, "00000002", "dog.jpg below"),
    ({"image": "../cat.jpg", "caption": "x"}, "00000002", "../cat.jpg below"),
    ({"image": "cat.txt", "caption": "x"}, "line 2", "suffix 'txt'"),
    ({"image": "http://host/cat.jpg", "caption": "x"}, "line 2", "only https"),
    ({"image": "broken.jpg", "caption": "x"}, "00000002", "image cannot be decoded"),
    ({"image": "page.jpg", "caption": "x"}, "00000002", "it is an HTML page"),
    ({"video": "broken.mp4", "caption": "x"}, "00000002", "video cannot be decoded"),
    ({"video": "bunny.mp4", "caption": "x", "clip": [9, 12]}, "00000002", "inside the film of"),
    ({"image": "cat.jpg"}, "line 2", "nothing to train on"),
    ({"image": "cat.jpg", "question": "x"}, "line 2", "question and answer belong together"),
    ({"image": "cat.jpg", "text": "x"}, "line 2", "text stands beside image: write caption"),
    ({"image": "cat.jpg", "caption": 5}, "00000002", "text must be a string"),
    ({"image": 5, "caption": "x"}, "line 2", "image must be a path, a string, not 5"),
    ({"images": "cat.jpg", "caption": "x"}, "line 2", "images must be a list"),
    ({"messages": ["a"]}, "00000002", "messages"),
    ({"image": "cat.jpg", "video": "bunny.mp4", "caption": "x"}, "00000002", "both images and a video"),
    ({"messages": ["a", "b"], "subtitles": [{"start": "x"}]}, "line 2", "subtitles[0] must be"),
    ({"messages": ["a", "b"], "weight": "x"}, "line 2", "weight must be a number"),
    ({"messages": ["a", "b"], "weight": 10**400}, "line 2", "weight must be a number"),
    ({"annotations": [{"style": "pointing", "points": []}]}, "00000002", "annotation 0 (pointing): label is missing"),
    ({"key": "00000001", "messages": ["a", "b"]}, "00000001", "duplicate key"),
    ("[1]", "line 2", "must hold an object"),
    ({"image": "cat.jpg", "caption": " "}, "00000002", "text must be a text that is not blank"),
    ({"messages": ["a", ""]}, "00000002", "messages[1] must be a text that is not blank"),
    ({"annotations": [{"style": "long_captoin", "text": "x"}]}, "00000002", "did you mean 'long_caption'?"),
    ({"video": "bunny.mp4", "caption": "x", "sampling": {"fps": 2}}, "00000002", "sampling.fps is an unknown field"),
    ({"video": "bunny.mp4", "caption": "x", "sampling": {"max_fps": "2"}}, "00000002", "sampling.max_fps must be"),
    ({"video": "bunny.mp4", "caption": "x", "sampling": {"max_fps": 0}}, "00000002", "sampling.max_fps must be"),
    ({"video": "bunny.mp4", "caption": "x", "subtitles": "talk.lrc"}, "00000002", "name of a file: talk.lrc"),
    ({"messages": ["a", "b"], "clip": [0, 1]}, "00000002", "clip belongs to a video"),
    ({"messages": ["a", "b"], "weight": 0}, "00000002", "weight must be a number above 0"),
]


def test_no_data_set_is_made_inside_another(tmp_path, capsys):
    """As by the folder that an earlier call printed, given as --out."""
    (tmp_path / "my.jsonl").write_text('{"question": "How many?", "answer": "Two"}\n')
    assert prepare(tmp_path / "my.jsonl") == 0
    made = tmp_path / "out" / "my"
    before = sorted(made.iterdir())
    assert main(["prepare", str(tmp_path / "my.jsonl"), "--out", str(made)]) == 2
    said = capsys.readouterr().err
    assert f"--out {made}: that is a data set" in said and f"sets lie in: --out {tmp_path / 'out'}\n" in said
    assert sorted(made.iterdir()) == before


@pytest.mark.parametrize(
    "line, field, seen, detail",
    [
        (
            '{"image": "cat.jpg" "caption": "x"}',
            "",
            '\'"caption": "x"}\' after \'{"image": "cat.jpg" \'',
            "at character 21",
        ),
        ('{"image": "cat.jpg", "caption": "x"', "", "the end of the text", "at character 36"),
        (
            '{"image": "cat.jpg", "caption": "x}',
            "",
            "'\"x}' after 'at.jpg\", \"caption\": '",
            "Unterminated string starting at character 33",
        ),
        ('{"image": "broken.jpg", "caption": "x"}', "image", "broken.jpg", "image cannot be decoded"),
        ('{"video": "broken.mp4", "caption": "x"}', "video", "broken.mp4", "cut off: download it again"),
        ('{"images": ["cat.jpg", "dog.jpg"], "caption": "x"}', "images[1]", "dog.jpg", "dog.jpg below"),
    ],
)
def test_what_was_seen_is_no_sentence(tmp_path, line, field, seen, detail):
    path = write(tmp_path, {"image": "cat.jpg", "caption": "A cat."}, line)
    (tmp_path / "broken.jpg").write_bytes((demo.MEDIA / "cat.jpg").read_bytes()[:10])
    (tmp_path / "broken.mp4").write_bytes((demo.MEDIA / "bunny.mp4").read_bytes()[:3000])
    assert prepare(path) == 0
    (skipped,) = map(json.loads, (tmp_path / "out" / "my" / "skipped.jsonl").read_text().splitlines())
    assert (skipped["field"], skipped["seen"]) == (field, seen) and str(tmp_path) not in skipped["seen"]
    assert detail in f"{skipped['reason']}: {skipped['detail']}" and f"video {tmp_path}" not in skipped["detail"]


@pytest.mark.parametrize("line, place, words", BAD)
def test_mistakes_name_the_line_and_spoil_no_other(tmp_path, line, place, words, capsys):
    path = write(tmp_path, {"image": "cat.jpg", "caption": "A cat."}, line, {"messages": ["last", "one"]})
    (tmp_path / "broken.jpg").write_bytes((demo.MEDIA / "cat.jpg").read_bytes()[:10])
    (tmp_path / "page.jpg").write_bytes(b"<!DOCTYPE html><html><body>404 Not Found</body></html>")
    (tmp_path / "broken.mp4").write_bytes((demo.MEDIA / "bunny.mp4").read_bytes()[:3000])
    assert prepare(path) == 0
    assert "2 records" in capsys.readouterr().out
    (skipped,) = map(json.loads, (tmp_path / "out" / "my" / "skipped.jsonl").read_text().splitlines())
    assert skipped["key"] == place and words in f"{skipped['reason']}: {skipped['detail']}"
    assert (skipped["file"], skipped["line"]) == ("my.jsonl", 2)
    assert prepare(path, "--strict", "--overwrite") == 2
    said = capsys.readouterr().err
    assert words in said and "my.jsonl, line 2" in said
    assert len(records(tmp_path)) == 2, "what was there stays until something better is complete"


def test_the_field_is_named_as_the_line_has_it(tmp_path):
    lines = [
        {"image": "cat.jpg", "caption": " "},
        {"question": "q", "answer": ""},
        {"question": "q", "answer": ["", "a", "a"]},
        {"annotations": [{"style": "user_qa", "question": "q", "answer": "a"}], "messages": ["q", ""]},
        {"annotations": [{"style": "user_qa", "question": "q", "answer": ""}]},
    ]
    assert prepare(write(tmp_path, *lines, {"messages": ["a", "b"]})) == 0
    skipped = map(json.loads, (tmp_path / "out" / "my" / "skipped.jsonl").read_text().splitlines())
    fields = ["caption", "answer", "answer[0]", "messages[1]", "annotations[0].answer"]
    assert [(line["line"], line["field"]) for line in skipped] == list(enumerate(fields, 1))


def test_a_style_of_ones_own_is_written_own(tmp_path):
    own = {"style": "own:mood", "question": "Which mood?", "answer": "calm"}
    path = write(tmp_path, {"annotations": [own]}, {"annotations": [{**own, "style": "mood"}]})
    assert prepare(path) == 0
    (line,) = map(json.loads, (tmp_path / "out" / "my" / "skipped.jsonl").read_text().splitlines())
    assert line["field"] == "annotations[0].style" and "own:mood" in line["detail"]
    (record,) = records(tmp_path)
    assert record.annotations[0].content.style.name == "mood"
    assert main(["shards", "check", str(tmp_path / "out" / "my")]) == 0


def test_errors_of_the_command(tmp_path, capsys):
    path = write(tmp_path, {"messages": ["a", "b"]})
    for words, message in (
        ([str(tmp_path / "none.jsonl"), "--out", str(tmp_path)], "none.jsonl does not exist"),
        (["nodataset", "--out", str(tmp_path)], "no data set 'nodataset'"),
        ([str(path)], "--out DIR is missing"),
        (["--out", str(tmp_path)], "nothing to prepare"),
        ([str(path), "--out", str(tmp_path), "--limit", "-1"], "--limit -1"),
        ([str(path), "--out", str(tmp_path), "--source", str(tmp_path / "no")], "no such folder"),
        (["recipe=nope", "--out", str(tmp_path)], "nope"),
    ):
        assert main(["prepare", *words]) == 2
        assert message in capsys.readouterr().err
    path.write_text("{\n{\n")
    assert prepare(path) == 2
    assert "no record came out" in capsys.readouterr().err
    assert not (tmp_path / "out" / "my").exists() and (tmp_path / "out" / "my.skipped.jsonl").is_file()
    path.write_text("")
    assert prepare(path) == 2 and "no rows" in capsys.readouterr().err
    path.write_text('{"messages": ["a", "b"]}')
    assert prepare(path) == 0


def test_key_of_any_text_becomes_a_member_name(tmp_path):
    path = write(tmp_path, *({"key": key, "messages": ["a", "b"]} for key in ("../up", "a.b/c", "é" * 200, "é" * 201)))
    assert prepare(path) == 0
    assert len({record.key for record in records(tmp_path)}) == 4


def test_media_elsewhere(tmp_path):
    """Paths that leave the JSONL file's folder are found only below a folder given by --source."""
    path = write(
        tmp_path, {"image": str(demo.MEDIA / "rocket.jpg"), "caption": "x"}, {"image": "coins.jpg", "caption": "x"}
    )
    assert prepare(path) == 2
    assert prepare(path, "--source", "/", "--source", str(demo.MEDIA)) == 0
    assert len(records(tmp_path)) == 2
