"""Own data: a JSONL file becomes shards, and every mistake is named with its line."""

import json
from pathlib import Path

import pytest

from data_prep.jsonl import LineError, main, read_jsonl
from molmo2_nemo.data.record import parse_record
from molmo2_nemo.data.shards import ShardDataset

MEDIA = Path(__file__).parents[2] / "data_prep" / "demo_media"


def write(tmp_path, *lines):
    for name in ("cat.jpg", "horse.jpg", "bunny.mp4"):
        (tmp_path / name).write_bytes((MEDIA / name).read_bytes())
    path = tmp_path / "my.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_short_and_full_forms(tmp_path, capsys):
    full = {"key": "mine", "images": ["cat.jpg", "horse.jpg"], "weight": 0.5}
    full["annotations"] = [{"style": "user_qa", "question": "q", "answer": "a"}]
    path = write(
        tmp_path,
        {"image": "cat.jpg", "caption": "A cat."},
        "",
        {"video": "bunny.mp4", "question": "What?", "answer": "A rabbit.", "clip": [0, 2]},
        {"messages": ["hi", "hello"]},
        full,
    )
    assert main([str(path), str(tmp_path / "out"), "--per-shard", "2"]) == 0
    assert "4 records" in capsys.readouterr().out
    data = ShardDataset(tmp_path / "out")
    got = [parse_record(*data.read(i)) for i in range(4)]
    assert got[0].images == [(MEDIA / "cat.jpg").read_bytes()]
    assert got[0].annotations == [{"style": "long_caption", "text": "A cat."}]
    assert got[1].video == (MEDIA / "bunny.mp4").read_bytes() and got[1].clip == (0.0, 2.0)
    assert got[2].annotations[0]["messages"] == ["hi", "hello"]
    assert got[3].key.endswith(":mine") and len(got[3].images) == 2 and got[3].weight == 0.5


BAD = [
    ("{", ":2: cannot be parsed"),
    ({"image": "dog.jpg", "caption": "x"}, ":2: .*dog.jpg cannot be read"),
    ({"image": "cat.txt", "caption": "x"}, ":2: .*suffix 'txt'"),
    ({"image": "broken.jpg", "caption": "x"}, ":2: .*broken.jpg cannot be decoded"),
    ({"video": "broken.mp4", "caption": "x"}, ":2: .*broken.mp4 cannot be decoded"),
    ({"image": "cat.jpg"}, ":2: nothing to learn"),
    ({"image": "cat.jpg", "question": "x"}, ":2: question and answer belong together"),
    ({"image": "cat.jpg", "text": "x"}, ":2: unknown field 'text'"),
    ({"image": "cat.jpg", "caption": 5}, ":2: annotation 0 .*text must be a string"),
    ({"image": 5, "caption": "x"}, ":2: a path must be a string"),
    ({"messages": ["a"]}, ":2: .*messages"),
    ("[1]", ":2: must hold an object"),
]


@pytest.mark.parametrize("line, words", BAD)
def test_mistakes_name_the_line(tmp_path, line, words, capsys):
    path = write(tmp_path, {"image": "cat.jpg", "caption": "A cat."}, line)
    (tmp_path / "broken.jpg").write_bytes((MEDIA / "cat.jpg").read_bytes()[:10])
    (tmp_path / "broken.mp4").write_bytes((MEDIA / "bunny.mp4").read_bytes()[:3000])
    with pytest.raises(LineError, match=words):
        list(read_jsonl(path))
    assert main([str(path), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {path}:2: ")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_key_that_cannot_be_a_member_name(tmp_path, capsys):
    path = write(tmp_path, {"key": "../up", "messages": ["a", "b"]})
    assert main([str(path), str(tmp_path / "out")]) == 1 and "'../up'" in capsys.readouterr().err
    assert main([str(tmp_path / "none.jsonl"), str(tmp_path / "out")]) == 1
