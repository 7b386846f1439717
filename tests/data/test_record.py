"""The record parser: what it accepts, and that every refusal names the record and the reason."""

import json

import pytest

from molmo2_nemo.data.annotation_json import read_annotation
from molmo2_nemo.data.record import BadRecord, parse_record

QA = {"style": "user_qa", "question": "q", "answer": "a"}


def members(data=None, **media):
    data = {"annotations": [QA]} if data is None else data
    return {"json": json.dumps(data).encode(), **{k.replace("__", "."): v for k, v in media.items()}}


def test_full_record():
    data = {
        "video": "mp4",
        "subtitles": [{"start": 0, "end": 1.5, "text": "hi"}],
        "clip": [1, 4.5],
        "sampling": {"max_fps": 4},
        "weight": 0.2,
        "annotations": [QA, {"style": "video_point", "label": "x", "points": [[[1, 2]]], "timestamps": [0.5]}],
    }
    record = parse_record("s.tar:k", members(data, mp4=b"film"))
    assert (record.video, record.clip, record.weight, record.images) == (b"film", (1.0, 4.5), 0.2, [])
    assert record.subtitles[0].end == 1.5 and record.sampling == {"max_fps": 4} and len(record.annotations) == 2


def test_images_keep_their_order_and_suffix_case_is_folded():
    data = {"images": ["1.PNG", "0.jpg"], "annotations": [QA]}
    record = parse_record("s:k", members(data, **{"0__jpg": b"a", "1__png": b"b"}))
    assert record.images == [b"b", b"a"]


BAD = {
    "no json": ({"0.jpg": b"x"}, "no json", "no .json member"),
    "not json": ({"json": b"{"}, "bad json", "cannot be parsed"),
    "truncated": ({"json": members()["json"][:-3]}, "bad json", "cannot be parsed"),
    "not utf8": ({"json": b'{"annotations": "\xff"}'}, "bad json", "not UTF-8"),
    "nan": ({"json": b'{"weight": NaN}'}, "bad json", "NaN"),
    "deep": ({"json": b"[" * 100_000 + b"]" * 100_000}, "bad json", "deep"),
    "duplicate": ({"json": b'{"clip": 1, "clip": 2}'}, "bad json", "twice"),
    "a list": ({"json": b"[]"}, "bad json", "object"),
    "pickle": ({**members(), "pyd": b"x"}, "unsafe member", "pyd"),
    "inner pickle": ({**members(), "a.pkl": b"x"}, "unsafe member", "a.pkl"),
    "no picture": (members({"images": ["0.jpg"], "annotations": [QA]}), "missing member", "image .0.jpg is missing"),
    "empty picture": (
        members({"images": ["0.jpg"], "annotations": [QA]}, **{"0__jpg": b""}),
        "missing member",
        "empty",
    ),
    "no video": (members({"video": "mp4", "annotations": [QA]}), "missing member", "video .mp4"),
    "odd type": (
        members({"images": ["0.exe"], "annotations": [QA]}, **{"0__exe": b"x"}),
        "bad record",
        "no known type",
    ),
    "unknown field": (members({"image": ["0.jpg"], "annotations": [QA]}), "bad record", "'image'"),
    "no annotations": (members({"annotations": []}), "bad record", "at least one"),
    "no style": (members({"annotations": [{"text": "x"}]}), "bad record", "style"),
    "huge int": (members({"weight": 10**400, "annotations": [QA]}), "bad record", "weight"),
    "two weights": (
        members({"weight": 1, "weight_factor": 2, "annotations": [QA]}),
        "bad record",
        "give either weight or weight_factor",
    ),
    "factor": (members({"weight_factor": -1, "annotations": [QA]}), "bad record", "weight_factor must be"),
    "clip": (members({"clip": [3, 1], "annotations": [QA]}), "bad record", "clip"),
    "subtitle": (members({"subtitles": [{"start": 2, "end": 1, "text": ""}], "annotations": [QA]}), "bad record", "0"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(name):
    content, cause, words = BAD[name]
    with pytest.raises(BadRecord) as caught:
        parse_record("shard-7.tar:key9", content)
    assert caught.value.cause == cause
    assert words in str(caught.value) and "shard-7.tar:key9" in str(caught.value)


ANNOTATIONS = [
    ({"style": "a_okvqa_mc", "question": "q", "options": ["a"], "answer_idx": 1}, "answer_idx"),
    ({"style": "a_okvqa_mc", "question": "q", "options": [], "answer_idx": 0}, "options"),
    ({"style": "pointing", "label": "x", "points": [[1]]}, "point"),
    ({"style": "pointing", "label": "x", "points": [[1, "2"]]}, "point"),
    ({"style": "multi_image_pointing", "label": "x", "points": [[[1, 2]]]}, "per image"),
    ({"style": "video_point", "label": "x", "points": [[[1, 2]]], "timestamps": []}, "per timestamp"),
    ({"style": "video_point_track_per_frame", "label": "x", "points": [[1, 2]]}, "track"),
    ({"style": "text_sft", "messages": ["only one"]}, "messages"),
    ({"style": "text_sft", "messages": ["a", "b", "c"]}, "alternate"),
    ({"style": "user_qa", "question": 5, "answer": "a"}, "question"),
    ({"style": "pointing", "points": [[1, 2]]}, r"record s:k: annotation 1 \(pointing\): label is missing"),
    ({"style": "vqa2", "question": "q"}, r"annotation 1 \(vqa2\): answer is missing \(answer, answers or text\)"),
    ({**QA, "no_pointing": [1]}, "no_pointing must be a list of questions by index, 0 to 0"),
    ({"style": "text_sft", "messages": ["a", "b"] * 2, "no_pointing": [True]}, "0 to 1, not"),
]


@pytest.mark.parametrize("annotation, words", ANNOTATIONS)
def test_bad_annotations(annotation, words):
    with pytest.raises(BadRecord, match=words):
        parse_record("s:k", members({"annotations": [QA, annotation]}))


def test_variants_are_checked_like_annotations():
    other = {"style": "user_qa", "question": "q", "answer": "b"}
    record = parse_record("s:k", members({"variants": [[QA], [QA, other]], "variant_weights": [3, 1]}))
    first, second = (read_annotation(fields, 0, False) for fields in (QA, other))
    assert record.variants == [[first], [first, second]] and first != second
    assert record.variant_weights == [3.0, 1.0] and record.annotations == []
    for bad in (
        {"variants": [[QA]], "annotations": [QA]},
        {"variants": []},
        {"variants": [[]]},
        {"variants": [[{"text": "no style"}]]},
        {"variants": [[QA]], "variant_weights": [1, 2]},
        {"variants": [[QA]], "variant_weights": [0]},
        {"annotations": [QA], "variant_weights": [1]},
        {"annotations": [{"style": "video_point", "turns": []}]},
        {"annotations": [{"style": "user_qa", "turns": [{"question": 5}]}]},
    ):
        with pytest.raises(BadRecord):
            parse_record("s:k", members(bad))


def test_subtitles_may_be_one_text():
    assert parse_record("s:k", members({"subtitles": "all of it", "annotations": [QA]})).subtitles == "all of it"


def test_either_is_checked_as_it_will_be_laid_over():
    points = {"style": "pointing", "label": "cars", "points": [[1, 2]]}
    good = {**points, "either": [{"style": "point_count", "question": "How many?"}, {}]}
    (read,) = parse_record("s:k", members({"annotations": [good]})).annotations
    where = ("cars", None, ((1, 2),))
    said = [(form.content.style.name, form.content.question) for form in read.forms]
    assert said == [("point_count", "How many?"), ("pointing", None)]
    assert all((form.content.label, form.content.scale, form.content.points) == where for form in read.forms)
    for bad in ([], "x", [1], [{"style": 5}], [{"points": [[1]]}], [{"question": 3}], [{"either": []}]):
        with pytest.raises(BadRecord, match="annotation 0"):
            parse_record("s:k", members({"annotations": [{**points, "either": bad}]}))
