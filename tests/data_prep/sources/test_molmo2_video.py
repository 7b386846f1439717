"""Rows of the Molmo2 sets of captions and questions about videos, in their published schema -> samples."""

import pytest

from data_prep.sources import find_source
from data_prep.sources.base import Context, SourceError, convert
from tests.support.source_rows import conversations, only, prepare, reasons

NO_KOALA = {"koala_meta/*.json": []}
CAPTION_ROW = {
    "video_id": "abc123",
    "video_start": 0.0,
    "video_end": 5.0,
    "annotation_score": 4.0,
    "merged_caption": "A rabbit leaves its burrow.",
    "video_caption": "A rabbit.",
    "video_frame_merged_caption": "A big grey rabbit crawls out of its burrow and yawns.",
    "clip_captions": [],
}


def test_captions():
    sample = only(prepare("molmo2_captions", [CAPTION_ROW], tables=NO_KOALA)[0])
    assert sample.key == "abc123" and sample.clip is None and sample.weight is None
    assert {a["style"]: a["text"] for a in sample.annotations} == {
        "video_merged_caption": "A rabbit leaves its burrow.",
        "video_short_caption": "A rabbit.",
        "video_long_caption": "A big grey rabbit crawls out of its burrow and yawns.",
    }
    paths = sample.video.paths
    assert "youtube-cc/youtube-cc-kw/abc123/" in paths and "kw_youtube/batch_1/abc123" in paths
    assert "LLaVA-Video-178K/30_60_s_academic_v0_1/academic_source/activitynet/v_abc123" in paths
    assert "LLaVA-Video-178K/2_3_m_youtube_v0_1/liwei_youtube_videos/videos/youtube_video_2024/ytb_abc123" in paths
    asked = {answer: question for ((question, answer),) in conversations(sample)}
    assert asked["A rabbit leaves its burrow."] == "video_merged_caption:"  # no template, as published
    assert "video" in asked["A rabbit."].lower()


def test_koala_names_of_videos():
    """Every file of koala_meta holds an object, which is read as one row per field."""
    fields = [{"field": "url", "value": "https://www.youtube.com/watch?v=abc123"}, {"field": "fps", "value": 30}]
    table = [{**field, "__table__": f"koala_meta/{name}.json"} for name in ("k_7_0", "k_8_0") for field in fields]
    sample = only(prepare("molmo2_captions", [CAPTION_ROW], tables={"koala_meta/*.json": table})[0])
    assert "koala/batch_1/k_7_0" in sample.video.paths and "koala/batch_1/k_8_0" not in sample.video.paths


def test_captions_left_out():
    rows = [
        {**CAPTION_ROW, "annotation_score": 2.9},
        {**CAPTION_ROW, "video_id": "a_"},
        {
            **CAPTION_ROW,
            "video_id": "none",
            "merged_caption": "",
            "video_caption": None,
            "video_frame_merged_caption": "",
        },
        {**CAPTION_ROW, "video_id": "one", "annotation_score": 3, "merged_caption": "", "video_caption": None},
        {**CAPTION_ROW, "video_id": "one"},
    ]
    samples, skips = prepare("molmo2_captions", rows, tables=NO_KOALA)
    assert [(s.key, len(s.annotations)) for s in samples] == [("one", 1), ("one~2", 3)]
    assert reasons(skips) == {
        "abc123": "annotation score below 3",
        "a_": "video known to be corrupt",
        "none": "no caption",
    }


def test_questions_people_asked():
    rows = [
        {"video_id": "v", "question": " Which animal? ", "answer": " a rabbit\n", "language": "en"},
        {"video_id": "w", "question": "Why?", "answer": "To wake up."},
        {"video_id": "v", "question": "What does it do?", "answer": "It yawns."},
        {"video_id": "v", "question": "And then?", "answer": "  "},
    ]
    samples, skips = prepare("molmo2_human_qa", rows)
    assert [(s.key, len(s.annotations)) for s in samples] == [("v", 2), ("w", 1)]
    assert reasons(skips) == {"v#2": "empty answer"}
    assert {turn for (turn,) in conversations(samples[0])} == {
        ("Which animal?", "a rabbit"),
        ("What does it do?", "It yawns."),
    }
    assert samples[0].video.paths[:2] == ("youtube-cc/youtube-cc-exist/v/", "youtube-cc/youtube-cc-kw/v/")


def choice_row(video: str, question: str) -> dict:
    wrong = ["a fox", "a cat", "a dog"]
    return {
        "video_id": video,
        "Question": question,
        "Answer": "a rabbit",
        "NegativeAnswers": wrong,
        "Category": "object",
    }


def test_choices_about_captions():
    rows = [choice_row(f"v{i % 20}", f"Which animal {i}?") for i in range(60)]
    samples, skips = prepare("molmo2_syn_captions_qa", rows)
    assert not skips and len(samples) == 20 and all(len(s.annotations) == 3 for s in samples)
    places = [a["answer_idx"] for s in samples for a in s.annotations]
    assert set(places) == {0, 1, 2, 3}
    for sample in samples:
        for a in sample.annotations:
            assert a["options"][a["answer_idx"]] == "a rabbit" and a["style"] == "video_multiple_choice"
            assert [o for o in a["options"] if o != "a rabbit"] == ["a fox", "a cat", "a dog"]
    again, _ = prepare("molmo2_syn_captions_qa", rows[::-1])  # order of the rows decides nothing but itself
    assert {s.key for s in again} == {s.key for s in samples}
    assert prepare("molmo2_syn_captions_qa", rows)[0] == samples
    assert prepare("molmo2_syn_captions_qa", rows, seed=1)[0] != samples


def test_choices_with_subtitles():
    lines = [
        {"start": 0.2, "end": 1.8, "text": "first try"},
        {"start": 0.2, "end": 1.8, "text": "The rabbit comes out."},
        {"start": 2.8, "end": 4.2, "text": "A long yawn."},
    ]
    rows = [{**choice_row("v", f"Which animal {i}?"), "subtitle": lines} for i in range(2)]
    sample = only(prepare("molmo2_syn_captions_subtitle_qa", rows)[0])
    assert list(sample.subtitles) == [(0.2, 1.8, "The rabbit comes out."), (2.8, 4.2, "A long yawn.")]
    assert {a["style"] for a in sample.annotations} == {"video_multiple_choice"} and len(sample.annotations) == 2
    assert len(conversations(sample)) == 2


@pytest.mark.parametrize(
    "name, field", [("molmo2_captions", "annotation_score"), ("molmo2_syn_captions_subtitle_qa", "subtitle")]
)
def test_another_schema_names_the_field(name, field):
    rows = [{"video_id": "v", "Question": "q", "Answer": "a", "NegativeAnswers": ["b"]}] * 3
    with pytest.raises(SourceError, match=field):
        list(convert(find_source(name), rows, Context.for_tests(tables=NO_KOALA)))
