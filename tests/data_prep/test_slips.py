"""Slips that a user of docs/data.md makes: each is named with its line and field, in words that say what to change."""

import json
import tarfile

import pytest

from data_prep import demo
from molmo2_nemo.cli.main import main

CHOICE = {"style": "a_okvqa_mc", "question": "Which?", "options": ["a cat", "a dog"]}
POINTS = {"style": "pointing", "label": "eye", "points": [[0.25, 0.5], [1, 0]]}
TRACK = {"style": "video_point_track_per_frame", "label": "paw"}
FILM = {"image": None, "video": "bunny.mp4"}
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
    ({"annotations": [{**CHOICE, "answer_idx": 1, "shuffle_options": "false"}]}, "annotations[0].shuffle_options",
     "must be true or false, not 'false'"),
    ({"annotations": [{**CHOICE, "answer_idx": 1, "unlabelled_options": 0}]}, "annotations[0].unlabelled_options",
     "must be true or false, not 0"),
    ({**FILM, "annotations": [{**TRACK, "points": [{"time": 1, "points": {"1": {"point": [50, 5], "occluded": "false"},
      "2": {"point": [50, 50]}}}]}]}, "annotations[0].points[0].points.1.occluded", "true or false, not 'false'"),
    ({"annotations": [{"style": "user_qa", "turns": [
        {"either": [{**CHOICE, "answer_idx": 1, "shuffle_options": 1}]}]}]},
     "annotations[0].turns[0].either[0].shuffle_options", "true or false, not 1"),
    ({"annotations": [{"style": "video_object_caption", "text": "t", "object": 5}]}, "annotations[0].object", "a text"),
    ({"question": "q", "answer": "see <image>"}, "answer", "without <image>"),
    ({"annotations": [{"style": "user_qa", "question": "q", "answers": ["a", "<video>"]}]}, "annotations[0].answers[1]",
     "without <video>"),
    ({"annotations": [{**CHOICE, "options": ["a", "<image> b"], "answer_idx": 0}]}, "annotations[0].options[1]",
     "without <image>"),
    ({"messages": ["q", "a", "q", "<image>"]}, "messages[3]", "must hold no"),
    ({**FILM, "caption": "x", "subtitles": "1\n00:00:01,000 --> 00:00:02,000\nGood morning.\n"}, "subtitles",
     "a list of {start, end, text} in seconds, or the name of a file (.srt, .vtt)"),
    ({**FILM, "caption": "x", "subtitles": "a <image> b"}, "subtitles", "without <image>"),
    ({"image": None, "images": ["cat.jpg", "horse.jpg"], "annotations": [{**POINTS, "point_scale": 100}]},
     "annotations[0].style", "in which of the 2 images the points are: multi_image_pointing"),
    ({"annotations": [POINTS]}, "annotations[0].points", "with point_scale: 1"),
    ({**FILM, "annotations": [{**POINTS, "style": "video_point", "timestamps": [1.0], "points": [[[0.5, 0.5]]]}]},
     "annotations[0].points", "with point_scale: 1"),
    ({**FILM, "annotations": [{**TRACK, "points": [{"time": 1, "points": {"1": {"point": [0.5, 0.5]}}}]}]},
     "annotations[0].points", "with point_scale: 1"),
    ({"question": "q <image_1>", "answer": "a"}, "question", "without <image_1>"),
    ({"question": "q", "answer": "</Video>"}, "answer", "without </Video>"),
    ({"question": "<|vision_start|>q", "answer": "a"}, "question", "without <|vision_start|>"),
    ({"question": "q", "answer": "a\0b"}, "answer", "holds a NUL"),
    ({"images": ["horse.jpg"], "caption": "x"}, "images", "stands beside image"),
    ({"boxes": [[1, 2, 3, 4]], "caption": "x"}, "boxes", "is read through a map only"),
    ({"caption": "x", "variant_weights": [1, 2]}, "variant_weights", "there are none"),
    ({"variants": [[POINTS], [POINTS]], "variant_weights": [1e308, 1e308]}, "variant_weights", "a finite sum"),
    ({"annotations": [{"style": "pointing", "label": "eye"}]}, "annotations[0].points", "[] where there is none"),
    ({"annotations": [{**POINTS, "points": [{"x": 1, "y": 2}]}]}, "annotations[0].points[0]", "a point [x, y]"),
    ({**FILM, "annotations": [{**TRACK, "sampling_fps": 0,
      "points": [{"time": 1, "points": {"1": {"point": [50, 5]}}}]}]}, "annotations[0].sampling_fps", "at least 1"),
    ({"caption": "x", "weight": 1e30}, "weight", "above 0, at most 1000"),
    ({"caption": "x", "weight_factor": -1}, "weight_factor", "0"),
    ({"annotations": [{**POINTS, "style": "pointng"}]}, "annotations[0].style", "did you mean 'pointing'?"),
    ({"annotations": [{**POINTS, "style": "Pointing"}]}, "annotations[0].style", "did you mean 'pointing'?"),
    ({"annotations": [{"style": "long_caption", "caption": "b"}]}, "annotations[0].caption", "did you mean 'text'?"),
    ({**FILM, "annotations": [{**POINTS, "style": "video_point", "timestamps": [-0.5], "points": [[[50, 50]]]}]},
     "annotations[0].timestamps", "a list of seconds, 0 or later"),
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


def test_what_is_close_to_a_slip_is_taken(tmp_path, capsys):
    """Oracle: the stored JSON, which training reads as it is."""
    lines = [
        {"image": "cat.jpg", "annotations": [{**CHOICE, "answer_idx": 0, "shuffle_options": None}]},
        {"image": "cat.jpg", "annotations": [{**POINTS, "point_scale": 1}]},
        {"image": "cat.jpg", "annotations": [{**POINTS, "points": [[0, 0], [1, 1]]}]},
        {"image": "cat.jpg", "caption": " b \n", "weight": 1000},
        {**FILM, "annotations": [{**POINTS, "style": "video_point", "timestamps": [-0.03], "points": [[[50, 50]]]}]},
        {**FILM, "caption": "x", "subtitles": "The arrow --> points at 12:30."},
        {"text": "A document may say <image>.\n"},
    ]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    call = ["prepare", str(tmp_path / "my.jsonl"), "--out", str(tmp_path), "--workers", "0", "--strict"]
    assert main([*call, "--source", str(demo.MEDIA)]) == 0
    said = capsys.readouterr().out
    assert (
        "1  answers with blanks or line breaks at their start or end, trained as written (the first: 00000004)" in said
    )
    assert "1  times up to one frame outside what is shown" in said
    with tarfile.open(next((tmp_path / "my").glob("*.tar"))) as tar:
        stored = [json.load(tar.extractfile(name)) for name in sorted(tar.getnames()) if name.endswith(".json")]
    assert stored[3]["annotations"][0]["text"] == " b \n" and stored[4]["annotations"][0]["timestamps"] == [0.0]
    assert main(["shards", "check", str(tmp_path / "my")]) == 0
