"""Films for long contexts: made rows with columns of the publishers' pages, or that their code reads -> samples."""

import pytest

from data_prep.bringing.catalogue import load
from data_prep.sources import find_source
from data_prep.sources.base import File
from tests.support.source_rows import conversations, only, prepare, reasons

STORY = {
    "video": "a_0.mp4",
    "image_id": "a_0.mp4",
    "nvid": "a_0.mp4",
    "id": 7,
    "whole_caption": " A man opens a door and finds a garden. ",
    "whole_ASR": "Welcome back.",
    "video_names": ["a_0.0_1.mp4"],
    "audio_captions": ["a man speaks"],
    "captions": ["a door"],
    "ASR": ["Welcome back."],
    "__table__": "43k_human_train.json",
}
TAKE = {
    "key": "BlUTkf-_GTg.66_3",
    "video_id": "BlUTkf-_GTg",
    "video_time": 12.5,
    "url": "https://www.youtube.com/watch?v=BlUTkf-_GTg",
    "dataset_src": "panda70m",
    "refined_caption": "A cyclist rides down a ramp.",
    "rewritten_caption": "a cyclist",
    "span": "['0:01:00.000', '0:01:12.500']",
}


def test_shot2story():
    rows = [STORY, {**STORY, "__table__": "90k_gptv_train.json"}, {**STORY, "id": 8, "whole_caption": " "}]
    samples, skips = prepare("shot2story", rows)
    assert [sample.key for sample in samples] == ["43k-7", "90k-7"]
    assert samples[0].video == File("shot2story-videos/a_0.mp4", "videos/a_0.mp4", "a_0.mp4")
    assert "A man opens a door and finds a garden." in str(conversations(samples[0]))
    assert "Welcome back" not in str(conversations(samples[0]))
    assert reasons(skips) == {"43k-8#0": "no caption"}


def test_lvd_2m():
    samples, skips = prepare("lvd_2m", [TAKE, {**TAKE, "key": "other", "refined_caption": None}])
    assert only(samples).video.paths[0] == "lvd-2m/videos/BlUTkf-_GTg.66_3.mp4"
    assert "A cyclist rides down a ramp." in str(conversations(only(samples)))
    assert reasons(skips) == {"other#0": "no caption"}


def test_videomarathon():
    """One record a film, however its rows lie; the mark of the film is no part of a question."""

    def row(video: str, *turns: str) -> dict:
        said = [{"from": "human" if n % 2 == 0 else "gpt", "value": turn} for n, turn in enumerate(turns)]
        return {"id": 1, "video": video, "data_source": "VideoMarathon/videos/panda", "conversations": said}

    rows = [
        row("a.mp4", "<image>\nWhat burns?\nA. a barn\nB. a boat", "A", "Who comes?", "The village."),
        row("b.mp4", "<image>\nWhy?", " "),
        row("a.mp4", "Where is it?\n<image>", "By the river."),
    ]
    samples, skips = prepare("videomarathon", rows)
    found = conversations(only(samples))
    assert (
        len(found) == 3 and "<image>" not in str(found) and "B. a boat" in str(found) and "By the river." in str(found)
    )
    path = "VideoMarathon/videos/panda/a.mp4"
    assert only(samples).key == path and only(samples).video == File(path, "a.mp4")
    assert reasons(skips) == {"VideoMarathon/videos/panda/b.mp4#0.0": "empty answer"}
    many = [row("c.mp4", f"Question {n}?", "Yes.") for n in range(40)]
    assert [len(sample.annotations) for sample in prepare("videomarathon", many)[0]] == [14, 13, 13]


@pytest.mark.parametrize("name", ["shot2story", "lvd_2m", "videomarathon"])
def test_what_was_not_seen_whole_says_so(name):
    """Where a user chooses a data set, and where they read what to bring."""
    notes = find_source(name).notes.lower()
    assert "not seen whole" in notes and "made rows" in notes
    items = load().of([name])
    assert items and all("(not seen whole)" in item.what for item in items)
