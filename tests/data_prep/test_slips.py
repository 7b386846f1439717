"""Slips that a user of docs/data.md makes: each is named with its line and field, in words that say what to change."""

import json
import os
import re
import tarfile

import pytest

from data_prep import demo
from data_prep.no_file import is_file, why_not
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.record import BadRecord, load_json

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
    ({"annotations": [{**POINTS, "points": [[0, 1], [1, 1]]}]}, "annotations[0].points", "0 and 1 may be either"),
    ({**FILM, "annotations": [{**POINTS, "style": "video_point", "timestamps": [1.0], "points": [[[1, 0]]]}]},
     "annotations[0].points", "0 and 1 may be either"),
    ({**FILM, "annotations": [{**TRACK, "points": [{"time": 1, "points": {"1": {"point": [1, 1]}}}]}]},
     "annotations[0].points", "0 and 1 may be either"),
    *(({"annotations": [{"style": name, "question": "q", "answer": "a"}]}, "annotations[0].style", "written own:NAME")
      for name in ("own:", "own: ", "own: mine", "Own:mine")),
    ({"question": "q", "answer": "half \ud83d"}, "", "half a character after"),
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
    *(({"caption": text}, "caption", "a text that is not blank")
      for text in ("\u200b", "\ufeff", "\u00a0 \u2060", "\u00ad", "\u3164", "\u202e\u202c", "\x07")),
    ({"annotations": [{**POINTS, "label": "\u200b", "points": [[50, 50]], "point_scale": 100}]}, "annotations[0].label",
     "a text that is not blank"),
    ({"annotations": [{**CHOICE, "options": ["a cat"], "answer_idx": 0}]}, "annotations[0].options",
     "at least two options"),
    *(({**FILM, "annotations": [{**TRACK, "style": f"video_single_point_track_{end}", "points": [
        {"time": 1, "points": {"1": {"point": [50, 50]}}},
        {"time": 2, "points": {"1": {"point": [60, 50]}, "2": {"point": [90, 50]}}}]}]},
       "annotations[0].points", "2 objects ['1', '2']; one object, or a style of several (video_point_track_per_frame")
      for end in ("per_frame", "start_end")),
    *(({**FILM, "caption": "x", "subtitles": name}, "subtitles", "is the name of a file")
      for name in ("cat.jpg", "bunny.mp4", "talk.sbv", "talk.xml")),
    ({" caption": "x"}, " caption", "unknown field, ' caption'; did you mean 'caption'?"),
    ({"": "x", "caption": "y"}, "", "unknown field, ''; known:"),
    ({"image": "file:///cat.jpg", "caption": "x"}, "image", "only https"),
    ({"image": "x" * 5000 + ".jpg", "caption": "x"}, "image", "(5004 characters) below"),
    ({"image": "x" * 300 + ".jpg", "caption": "x"}, "image", "the system says: File name too long"),
    ({"image": "data:image/png;base64,AAAA", "caption": "x"}, "image", "of no known format"),
    ({"image": "CAT.jpg", "caption": "x"}, "image", "there is 'cat.jpg': write the name as the file has it"),
    ({"image": "cat.JPG", "caption": "x"}, "image", "there is 'cat.jpg': write the name as the file has it"),
]  # fmt: skip
# Lines that are no JSON object: what was seen is what stands there, not a sentence.
LINES = [
    ("null", "None", "must hold an object, not None"),
    ('["a"]', "['a']", "named .json"),
    ('{"caption": NaN}', "NaN is not a JSON number", "NaN is not a JSON number"),
    ('{"caption": "a", "caption": "b"}', "the name 'caption' appears twice in one object", "appears twice"),
    (
        '{"weight": ' + "9" * 5000 + "}",
        "a whole number of more digits than are read (4300)",
        "more digits than are read",
    ),
    ('{"caption": ' + "[" * 3000 + "]" * 3000 + "}", '\'{"caption": [[[', "nested too deeply"),
    (b'{"caption": "Gr\xfc"}', r"""b'{"caption": "Gr\xfc'""", "is not UTF-8 (byte 15)"),
]


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
    assert not field or line["seen"] != line["detail"]  # a fault of the whole line may be all that can be said


@pytest.mark.parametrize("line, seen, words", LINES)
def test_what_was_seen_of_a_line_that_is_no_object(line, seen, words):
    with pytest.raises(BadRecord, match=re.escape(words)) as raised:
        load_json("line 2", {"json": line if isinstance(line, bytes) else line.encode()})
    fault = raised.value.fault
    assert fault is not None and fault.seen.startswith(seen) and fault.expected and ".json" not in fault.seen


def test_a_variant_that_is_never_drawn_is_counted(tmp_path, capsys):
    trees = [[{"style": "long_caption", "text": text}] for text in ("A cat.", "A dog.")]
    lines = [{"image": "cat.jpg", "variants": trees, "variant_weights": weights} for weights in ([1, 0], [1, 2])]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    call = ["prepare", str(tmp_path / "my.jsonl"), "--out", str(tmp_path), "--workers", "0"]
    assert main([*call, "--source", str(demo.MEDIA)]) == 0
    assert "1  variants of weight 0, never drawn (the first: 00000001)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "action, words", [("check", "call it for each, or the folder that holds"), ("repair", "for each")]
)
def test_a_second_folder_is_named(action, words, tmp_path, capsys):
    assert main(["shards", action, str(tmp_path), "second"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"shards {action} takes one folder, not also second" in said and words in said


def test_why_a_file_is_not_there(tmp_path):
    (tmp_path / "e\u0301.jpg").write_bytes(b"x")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "there is 'e\\u0301.jpg'" in why_not(tmp_path / "\u00e9.jpg")
    assert why_not(tmp_path / "folder.jpg") == "; it is a folder"
    assert why_not(tmp_path / "link.jpg") == "; it is a link to nowhere.jpg, which does not exist"
    assert why_not(tmp_path / "pipe.jpg") == "; it is no regular file"
    assert why_not(tmp_path / "gone.jpg") == "" and not is_file(tmp_path / ("x" * 300))


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
        {"image": "cat.jpg", "annotations": [{**POINTS, "points": [[0, 0], [1, 1]], "width": 451, "height": 300}]},
        {"image": "cat.jpg", "caption": " b \n", "weight": 1000},
        {**FILM, "annotations": [{**POINTS, "style": "video_point", "timestamps": [-0.03], "points": [[[50, 50]]]}]},
        {**FILM, "caption": "x", "subtitles": "The arrow --> points at 12:30."},
        {"text": "A document may say <image>.\n"},
        {"image": "cat.jpg", "annotations": [{**POINTS, "points": [[4.9, 0], [1, 2]], "point_scale": 100}]},
        {"image": "cat.jpg", "annotations": [{**POINTS, "points": [[4.9, 0], [5, 2]], "point_scale": 100}]},
        {"image": "cat.jpg", "annotations": [{**POINTS, "points": [[0, 0]], "point_scale": 100}]},
    ]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    call = ["prepare", str(tmp_path / "my.jsonl"), "--out", str(tmp_path), "--workers", "0", "--strict"]
    assert main([*call, "--source", str(demo.MEDIA)]) == 0
    said = capsys.readouterr().out
    assert (
        "1  answers with blanks or line breaks at their start or end, trained as written (the first: 00000004)" in said
    )
    assert "1  times up to one frame outside what is shown" in said
    assert "2  points that all lie in the first twentieth of width and height: is the unit right" in said  # 1/451 too
    with tarfile.open(next((tmp_path / "my").glob("*.tar"))) as tar:
        stored = [json.load(tar.extractfile(name)) for name in sorted(tar.getnames()) if name.endswith(".json")]
    assert stored[3]["annotations"][0]["text"] == " b \n" and stored[4]["annotations"][0]["timestamps"] == [0.0]
    assert main(["shards", "check", str(tmp_path / "my")]) == 0
