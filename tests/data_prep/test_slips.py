"""Slips that a user of docs/data.md makes: each is named with its line and field, in words that say what to change."""

import json

import pytest

from data_prep import demo
from molmo2_nemo.cli.main import main

CHOICE = {"style": "a_okvqa_mc", "question": "Which?", "options": ["a cat", "a dog"]}
SLIPS = [
    ({"annotations": [{**CHOICE, "answer": "a cat"}]}, "annotations[0].answer_idx", "the index of the correct option"),
    ({"annotations": [{**CHOICE, "answer_idx": 1, "answer": "a cat"}]}, "annotations[0].answer", "options[1], 'a dog'"),
    ({"image": "bunny.mp4", "caption": "x"}, "image", "a video is named as video"),
    ({"image": None, "video": "cat.jpg", "caption": "x"}, "video", "an image is named as image"),
    ({"image": None, "images": [], "caption": "x"}, "annotations[0].style", "a task on an image or a video"),
    ({"question": "q", "answer": "a", "style": "vqa2"}, "style", '"annotations": [{"style": ...}]'),
    ({"question": "q", "answers": ["a"]}, "answers", '"annotations": [{"style": ..., "answers": ...}]'),
    ({"annotations": [{"style": "user_qa", "question": "q", "answer": "a", "weight": 2}]}, "annotations[0].weight",
     "write weight beside annotations"),
    ({"annotations": [{"style": "long_caption", "caption": "x"}]}, "annotations[0].caption", "an unknown field"),
    ({"annotations": [{"style": "pointing", "label": "eye", "points": [[5, 5]], "time": 3}]}, "annotations[0].time",
     "is not read by the style pointing"),
    ({"image": None, "video": "bunny.mp4", "sampling": {"sampling_fps": 1}, "caption": "x"}, "sampling.sampling_fps",
     "takes max_fps"),
    ({"annotations": [{**CHOICE, "answer_idx": "B"}]}, "annotations[0].answer_idx", "must be 0..1 for 2 options"),
]  # fmt: skip


@pytest.fixture(scope="module")
def skipped(tmp_path_factory):
    """All of them in one file after a good line: the lines of skipped.jsonl, and what was printed."""
    folder = tmp_path_factory.mktemp("slips")
    lines = [{"image": "cat.jpg", "caption": "good"}, *({"image": "cat.jpg", **slip} for slip, _, _ in SLIPS)]
    (folder / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    call = ["prepare", str(folder / "my.jsonl"), "--out", str(folder), "--workers", "0", "--source", str(demo.MEDIA)]
    assert main(call) == 0
    return [json.loads(line) for line in (folder / "my" / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", range(len(SLIPS)))
def test_the_slip_is_named(number, skipped):
    _, field, words = SLIPS[number]
    (line,) = [line for line in skipped if line["line"] == number + 2]
    assert line["field"] == field and words in line["detail"] and line["seen"] and line["expected"]


def test_the_summary_has_the_first_of_each_reason(tmp_path, capsys):
    lines = [{"image": "cat.jpg", "caption": "good"}, {"image": "gone.jpg", "caption": "x"}]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    call = ["prepare", str(tmp_path / "my.jsonl"), "--out", str(tmp_path), "--workers", "0"]
    assert main([*call, "--source", str(demo.MEDIA)]) == 0
    assert "1  media not found (the first: my.jsonl, line 2: gone.jpg below" in capsys.readouterr().out
    (tmp_path / "my.jsonl").write_text(json.dumps(lines[1]) + "\n")
    assert main([*call, "--overwrite"]) == 2
    assert "; the first: my.jsonl, line 1, image: media not found: gone.jpg" in capsys.readouterr().err
