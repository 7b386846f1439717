"""Rows of the video pointing sets in their published schema -> samples."""

import pytest

from tests.support.source_rows import conversations, only, prepare, reasons

ROW = {
    "video_id": "abc",
    "video_source": "youtube",
    "video_duration": 5.0,
    "label": "raised fists",
    "question": "How many raised fists are there?",
    "category": "object",
    "count": 2,
    "points": [[{"x": 42.9, "y": 6.7}, {"x": 19.6, "y": 13.3}]],
    "two_fps_timestamps": [2.0],
    "clip_start": None,
    "clip_end": None,
    "annotator_unsure": False,
}
LONG = {**ROW, "video_id": "long", "video_duration": 300.0}
SET = "molmo2_video_point_minmax_0_5"
TAG = '<points coords="2.0 1 196 133 2 429 067">raised fists</points>'


def points(count: int) -> list[dict]:
    return [{"x": float(i), "y": 50.0} for i in range(count)]


def test_one_label():
    sample = only(prepare(SET, [ROW])[0])
    assert sample.key == "abc/0" and sample.clip == (0.0, 5.0) and not sample.variants
    (annotation,) = sample.annotations
    assert annotation["timestamps"] == [2.0] and annotation["points"] == [[[19.6, 13.3], [42.9, 6.7]]]
    said = {only(only(conversations(sample, seed=seed))) for seed in range(8)}
    counted = (ROW["question"], f"Counting the {TAG} shows a total of 2.")
    assert counted in said and {answer for _, answer in said - {counted}} == {TAG}
    assert ROW["question"] not in {question for question, answer in said if answer == TAG}


def test_labels_of_a_short_video_are_one_tree_or_one_conversation():
    nothing = {
        **ROW,
        "label": "foxes",
        "count": 0,
        "points": [],
        "two_fps_timestamps": [],
        "question": "How many foxes?",
    }
    sample = only(prepare(SET, [ROW, nothing])[0])
    assert sample.key == "abc" and sample.clip == (0.0, 5.0) and list(sample.variant_weights) == [0.8, 0.2]
    branches, (together,) = sample.variants
    assert len(branches) == 2 and together == {"style": "video_point", "turns": list(branches)}
    shapes = [[len(c) for c in conversations(sample, seed=seed)] for seed in range(12)]
    assert shapes.count([1, 1]) > shapes.count([2]) > 0 and shapes.count([1, 1]) + shapes.count([2]) == 12
    answers = {answer for conversation in conversations(sample) for _, answer in conversation}
    assert "There are none." in answers


def test_numbers_of_points_divide_the_sets():
    rows = [{**ROW, "video_id": f"v{n}", "count": n, "points": [points(n)]} for n in (1, 5, 6, 25, 26, 60, 61)]
    found = {}
    for name in (SET, "molmo2_video_point_minmax_6_25", "molmo2_video_point_minmax_26_60"):
        samples, skips = prepare(name, rows)
        found[name.split("minmax_")[1]] = [s.key for s in samples]
        assert len(samples) + len(skips) == 7 and len(set(reasons(skips).values())) == 1
    assert found == {"0_5": ["v1/0", "v5/0"], "6_25": ["v6/0", "v25/0"], "26_60": ["v26/0", "v60/0"]}


def test_clips_of_long_videos():
    rows = [
        {**LONG, "clip_start": 10.5, "clip_end": 40.5, "two_fps_timestamps": [12.0]},
        {**LONG, "clip_start": 10.5, "clip_end": 40.5, "two_fps_timestamps": [41.0]},
        {**LONG, "clip_start": 0.0, "clip_end": 64.0},
        {**LONG},
        {**LONG, "clip_start": 0.0, "clip_end": 30.0, "two_fps_timestamps": [2.25]},
        {**LONG, "clip_start": 280.0, "clip_end": 310.0, "two_fps_timestamps": [290.0]},
        {**LONG, "clip_start": 0.0, "clip_end": 30.0, "two_fps_timestamps": [2.0, 3.0]},
        {**LONG, "clip_start": 0.0, "clip_end": 30.0, "annotator_unsure": True},
    ]
    samples, skips = prepare(SET, rows)
    sample = only(samples)
    assert sample.key == "long/0" and sample.clip == (10.5, 40.5)
    assert sample.annotations[0]["timestamps"] == [1.5]
    assert reasons(skips) == {
        "long#1": "annotation outside its clip",
        "long#2": "clip longer than 63 s",
        "long#3": "long video without a clip",
        "long#4": "timestamp off the grid of half seconds",
        "long#5": "annotation outside its clip",
        "long#6": "lists of different lengths",
        "long#7": "annotator was not sure",
    }


def test_zero_counts_of_long_videos_need_the_whole_minute():
    nothing = {**LONG, "count": 0, "points": [], "two_fps_timestamps": []}
    rows = [
        {**nothing, "clip_start": 0.0, "clip_end": 63.0},
        {**nothing, "clip_start": 0.0, "clip_end": 60.0},
        {**nothing, "clip_start": 5.0, "clip_end": 68.0},
    ]
    samples, skips = prepare(SET, rows)
    assert [s.clip for s in samples] == [(0.0, 63.0)] and samples[0].annotations[0]["points"] == []
    assert set(reasons(skips)) == {"long#1", "long#2"}


@pytest.mark.parametrize(
    "source, name, path",
    [
        ("youtube", "abc", "youtube-cc/youtube-cc-temporal-2fps/abc_2fps"),
        ("MammalNet", "m1", "MammalNet/trimmed_video-2fps/m1_2fps"),
        ("generated", "sora2/some_video", "generated_videos/sora2-2fps/some_video_2fps"),
        ("elsewhere", "x", "MammalNet/trimmed_video-2fps/x_2fps"),
    ],
)
def test_where_videos_are(source, name, path):
    assert path in only(prepare(SET, [{**ROW, "video_id": name, "video_source": source}])[0]).video.paths


ACADEMIC = {
    "subset": "mevis",
    "video_name": "05ce52751f5f",
    "dataset": None,
    "category": "Rabbit Ears",
    "count": 3,
    "timestamps": [12.0, 11.0],
    "points": [[{"x": 9.0, "y": 1.0}, {"x": 3.0, "y": 1.0}], [{"x": 50.0, "y": 50.0}]],
    "video_duration": 20.0,
    "clip_start_time": 10.0,
    "clip_end_time": 14.5,
}


def test_academic():
    sample = only(prepare("academic_video_points", [ACADEMIC])[0])
    assert sample.clip == (10.0, 14.5) and sample.video.paths == (
        "mevis/MeViS_release/train/videos-2fps/05ce52751f5f",
        "mevis/MeViS_release/train/videos/05ce52751f5f",
        "MeViS/train/videos/05ce52751f5f",
    )
    (annotation,) = sample.annotations
    assert annotation["label"] == "rabbit ears" and annotation["timestamps"] == [1.0, 2.0]
    assert annotation["points"] == [[[50.0, 50.0]], [[3.0, 1.0], [9.0, 1.0]]]
    assert annotation["either"] == [{"style": "video_point_count"}, {}]
    early = {**ACADEMIC, "clip_start_time": 0.0, "clip_end_time": 4.0, "timestamps": [1.5, 1.0]}
    question, answer = only(only(conversations(only(prepare("academic_video_points", [early])[0]), seed=1)))
    assert "rabbit ears" in question
    assert '<points coords="1.0 1 500 500;1.5 2 030 010 3 090 010">rabbit ears</points>' in answer


def test_academic_left_out():
    rows = [
        {**ACADEMIC, "count": 61},
        {**ACADEMIC, "timestamps": [0.0, 64.0], "video_duration": 100.0},
        {**ACADEMIC, "subset": "other"},
        {**ACADEMIC, "timestamps": []},
        {**ACADEMIC, "subset": "burst", "dataset": "YFCC100M", "video_name": "v_1", "clip_start_time": 11.5},
        {**ACADEMIC, "subset": "burst", "dataset": "YFCC100M", "video_name": "v_1"},
    ]
    samples, skips = prepare("academic_video_points", rows)
    assert only(samples).video.paths[0] == "TAO-Amodal/train/videos-2fps/YFCC100M/v_1"
    assert sorted(reasons(skips).values()) == [
        "annotation longer than 63 s",
        "annotation outside its clip",
        "more than 60 points",
        "no timestamps",
        "unknown subset",
    ]
