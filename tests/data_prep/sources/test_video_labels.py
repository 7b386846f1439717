"""Rows of the academic sets of labels and captions of videos and their parts, in their published schema -> samples."""

import pytest

from data_prep.sources.base import Cut, File, FirstOf
from molmo2_nemo.data.templates import ACTION_QUESTIONS, PERSON_QUESTIONS
from tests.support.source_rows import conversations, only, prepare, reasons


def label(answer: str, style: str, found: dict, questions=ACTION_QUESTIONS) -> None:
    assert found["question"] in questions
    assert found == {"style": style, "question": found["question"], "answer": answer}


def test_motion_captions():
    row = {"video_path": "a/b.mp4", "motion_caption": "It yawns."}
    samples, skips = prepare("motionbench_train", [row, row, {**row, "motion_caption": ""}])
    assert [s.key for s in samples] == ["a/b.mp4", "a/b.mp4~2"] and len(skips) == 1
    question, answer = only(only(conversations(samples[0])))
    assert question.startswith("video_motion_caption: ") and answer == "It yawns."


def test_captions_of_actors():
    row = {
        "id": 5,
        "video": "oops/oops_video/train/a.mp4",
        "captions": ["It yawns.", ""],
        "actor_names": ["Rabbit", "Fox"],
    }
    samples, skips = prepare("video_localized_narratives_caption", [row, {**row, "id": 6, "actor_names": ["Rabbit"]}])
    sample = only(samples)
    assert sample.video.paths[0] == "oops/oops_video/train/a.mp4"
    assert sample.annotations == [{"style": "video_object_caption", "text": "It yawns.", "object": "rabbit"}]
    assert "rabbit" in only(only(conversations(sample)))[0]
    assert reasons(skips) == {"5#0.1": "no caption", "6#0": "lists of different lengths"}


def test_moments():
    rows = [
        {"label": "yawning", "video_path": "yawning/a.mp4"},
        {"label": "adult+female+singing", "video_path": "s/b.mp4"},
        {"label": "playing+music", "video_path": "p/c.mp4"},
        {"label": "child", "video_path": "p/d.mp4"},
        *({"label": "yawning", "video_path": f"yawning/{i}.mp4"} for i in range(20)),
    ]
    samples, skips = prepare("moments_in_time_qa", rows)
    answers = [s.annotations[0]["answer"] for s in samples]
    assert answers[:3] == ["yawning", "playing music", "child"] and reasons(skips) == {
        "s/b.mp4#0": "label of who speaks"
    }
    label("yawning", "moments_in_time_label", samples[0].annotations[0])
    assert {s.annotations[0]["question"] for s in samples} == set(ACTION_QUESTIONS)
    assert only(only(conversations(samples[0])))[0].startswith("moments_in_time_label: ")
    assert "train-videos/yawning/a.mp4" in samples[0].video.paths


def test_kinetics():
    tables = {
        "kinetics710/k710_label_map.txt": [{"line": "riding a bike"}, {"line": "yawning"}],
        "kinetics_corrupt.parquet": [{"video": "kinetics600/train/yawning/c.mp4"}],
    }
    seven, six = ({"__table__": f"kinetics710/k{n}_train_list_videos.txt"} for n in (700, 600))
    rows = [
        {"line": "k700/train/a.mp4 0", **seven},
        {"line": "k600/train/b.mp4 0", **six},
        {"line": "k600/train/c.mp4 1", **six},
        {"line": "k600/train/d.mp4 2", **six},
    ]
    samples, skips = prepare("kinetics_qa", rows, tables=tables)
    assert [s.video for s in samples] == [
        File("kinetics700/train/riding a bike/a.mp4"),
        File("kinetics600/train/riding_a_bike/b.mp4"),
    ]
    label("riding a bike", "kinetics_label", samples[0].annotations[0], PERSON_QUESTIONS)
    assert reasons(skips) == {
        "kinetics600/train/yawning/c.mp4": "video known to be corrupt",
        "kinetics600/k600/train/d.mp4": "line without a known label",
    }


def test_charades():
    lines = [
        "AO8RW 0.0 4.9##a person yawns.",
        "AO8RW 0.0 4.9##a person sits.",
        "AO8RW 3.0 3.0##empty",
        "AO8RW x##broken",
    ]
    samples, skips = prepare("charades_sta_all_qa", [{"line": line} for line in lines])
    sample = only(samples)
    assert sample.clip == (0.0, 4.9) and sample.video.paths[0] == "Charades_v1/AO8RW"
    assert [a["answer"] for a in sample.annotations] == ["a person yawns.", "a person sits."]
    label("a person yawns.", "charades_sta", sample.annotations[0], PERSON_QUESTIONS)
    assert len(conversations(sample)) == 2 and set(reasons(skips).values()) == {"clip ends before it starts"}


def test_coin():
    corrupt = [{"video_id": "v", "metadata": {"clip_start_time": 8.0, "clip_end_time": 9.0}}]
    parts = [
        {"segment": [1.0, 4.0], "label": "yawn", "id": "1"},
        {"segment": [1.0, 4.0], "label": "wake up", "id": "2"},
        {"segment": [8.0, 9.0], "label": "corrupt", "id": "3"},
        {"segment": [5.0, 5.0], "label": "nothing", "id": "4"},
        {"segment": None, "label": "nowhere", "id": "5"},
    ]
    rows = [{"video_id": "v", "subset": "training", "annotation": parts, "class": "Wake"}]
    rows.append({**rows[0], "video_id": "t", "subset": "testing"})
    samples, skips = prepare("coin_all_qa", rows, tables={"coin_corrupt.parquet": corrupt})
    sample = only(samples)
    assert sample.key == "v_1.0_4.0" and sample.clip == (1.0, 4.0) and sample.video == File("videos/v")
    label("yawn", "coin_label", sample.annotations[0])
    assert sample.annotations[1]["answer"] == "wake up"
    assert sorted(reasons(skips).values()) == [
        "clip ends before it starts",
        "clip ends before it starts",
        "not in the training split",
        "video known to be corrupt",
    ]


def test_youcook2():
    parts = [
        {"segment": [1, 4], "id": 0, "sentence": "peel the carrot"},
        {"segment": [595, 613], "id": 1, "sentence": "slice it."},
        {"segment": [9, 9], "id": 2, "sentence": "nothing"},
    ]
    rows = [{"video_id": "UB1_MNpdvgs", "subset": "training", "duration": 700.0, "annotations": parts}]
    rows.append({**rows[0], "subset": "validation", "video_id": "v"})
    samples, skips = prepare("youcook2_all_qa", rows)
    clip, whole = samples
    assert clip.clip == (1.0, 4.0) and whole.clip is None and clip.video == whole.video == File("videos/UB1_MNpdvgs")
    label("peel the carrot.", "youcook2_label", only(clip.annotations))
    assert [(a["text"], a["start"], a["end"]) for a in whole.annotations] == [
        ("peel the carrot.", 1.0, 4.0),
        ("slice it.", 595.0, 613.0),
    ]
    assert {question for ((question, _),) in conversations(whole)} == {"video_clip_short_caption_start_end:"}
    assert sorted(reasons(skips).values()) == [
        "clip ends before it starts",
        "not in the training split",
        "video known to be corrupt",
    ]


def test_activitynet():
    parts = [
        {"segment": [0.5, 4.5], "label": "Yawning"},
        {"segment": [0.5, 4.5], "label": "Yawning"},
        {"segment": [float("nan"), 4.5], "label": "Sleeping"},
    ]
    rows = [{"video_id": "abc", "subset": "validation", "annotations": parts}, {"video_id": "def", "annotations": []}]
    questions = [
        {"video_name": "abc", "question": "which animal is it", "question_id": "abc_0"},
        {"video_name": "abc", "question": "is it awake?", "question_id": "abc_1"},
        {"video_name": "abc", "question": "why?", "question_id": "abc_2"},
    ]
    answers = [{"answer": "rabbit", "question_id": "abc_0", "type": 3}, {"answer": "yes", "question_id": "abc_1"}]
    samples, skips = prepare("activitynet_all_qa", rows, tables={"train_q.json": questions, "train_a.json": answers})
    clip, asked = samples
    assert clip.key == "abc_0.5_4.5" and clip.clip == (0.5, 4.5) and asked.key == "qa/abc" and asked.clip is None
    label("Yawning", "activitynet_label", only(clip.annotations))
    assert asked.annotations == [
        {"style": "video_short_answer", "question": "which animal is it?", "answer": "rabbit"},
        {"style": "video_short_answer", "question": "is it awake?", "answer": "yes"},
    ]
    assert clip.video.paths[0] == "all-videos/abc" and "all-videos/v_abc/v_abc" in clip.video.paths
    assert reasons(skips) == {"abc#1": "clip ends before it starts", "qa/abc#2.0": "empty answer"}


def test_ego4d():
    said = [
        {"question": "Label the clip.", "answer": "yawn", "style": "ego4d_mq_label_clip"},
        {"question": "Where is it?", "answer": "Start: 1.00, end: 2.00", "style": "ego4d_nlq_temporal_grounding"},
    ]
    row = {"clip": "dd08-58_1.000_3.500_custom_clip.mp4", "corrupt": False, "message_list": said, "metadata": None}
    samples, skips = prepare("ego4d_all", [row, {**row, "clip": "x_1_2_custom_clip.mp4", "corrupt": True}])
    sample = only(samples)
    assert sample.annotations == [{"style": s["style"], "question": s["question"], "answer": s["answer"]} for s in said]
    name = "dd08-58_1.000_3.500_custom_clip"
    whole = File(*(f"{root}full_scale/dd08-58" for root in ("Ego4d/ego4d_data/v2/", "v2/", "")))
    assert sample.video == FirstOf(File(f"ego4d-clips/{name}", name), Cut(whole, 1.0, 3.5))
    assert ("ego4d_mq_label_clip: Label the clip.", "yawn") in [turn for (turn,) in conversations(sample)]
    assert list(reasons(skips).values()) == ["video known to be corrupt"]


@pytest.mark.parametrize("corrupt", [False, True])
def test_epic_kitchens(corrupt):
    row = {"participant_id": "P01", "video_id": "P01_102", "narration": "open door", "verb": "open"}
    row |= {"start_timestamp": "00:01:30.24", "stop_timestamp": "00:01:33.49" if corrupt else "00:01:34.50"}
    samples, skips = prepare("epic_kitchens_qa", [row, {**row, "stop_timestamp": "00:01:30.24"}])
    if corrupt:
        assert not samples and sorted(reasons(skips).values())[1] == "video known to be corrupt"
        return
    sample = only(samples)
    label("open door", "epic_kitchens_label", only(sample.annotations))
    whole = File("epic-kitchens/P01/videos/P01_102", "P01/videos/P01_102")
    assert sample.video == FirstOf(
        File("epic-kitchens-clips/P01/videos/P01_102_90.240_94.500"), Cut(whole, pytest.approx(90.24), 94.5)
    )
