"""Records to examples: every kind end to end on the tiny settings, repeatability, limits, and hostile input."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from molmo2_nemo.data.annotation_json import read_annotation
from molmo2_nemo.data.annotations import Annotation, Points
from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig, ImageConfig, LimitsConfig, TextFormatConfig, VideoConfig
from molmo2_nemo.data.points import parse
from molmo2_nemo.data.record import BadRecord, Record, Subtitle
from molmo2_nemo.data.styles import style_of
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer

from .test_video import make_clip

torch.set_num_threads(1)
TOKENIZER = Molmo2Tokenizer.load("tiny")
STAGE1 = TextFormatConfig("none", "style_and_length_v2", "html-v1", False, False)
CLIP = make_clip(120)


def png(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def builder(text=None, training=True, **image):
    config = DataConfig(
        image=ImageConfig(crop_size=126, margin=2, **image),
        video=VideoConfig(max_frames=8, max_fps=2),
        text=text or TextFormatConfig(),
    )
    return ExampleBuilder(config, TOKENIZER, training=training)


def rng(seed=0):
    return np.random.default_rng(seed)


PICTURE = [
    {"style": "long_caption", "text": "A grey cat."},
    {"style": "user_qa", "question": "What <im_patch>?", "answer": "A <|im_end|> cat."},
    {"style": "a_okvqa_mc", "question": "Which?", "options": ["a", "b"], "answer_idx": 1},
    {"style": "pointing", "label": "Cars", "points": [[1, 2], [50, 50]], "point_scale": 100},
    {"style": "point_count", "label": "Cars", "points": [[1, 2]], "point_scale": 100},
]
MOVING = [
    {"style": "video_long_caption", "text": "A grey screen."},
    {
        "style": "video_point",
        "label": "mark",
        "points": [[[1, 2]], [[3, 4], [5, 6]]],
        "timestamps": [0.5, 1.0],
        "point_scale": 100,
    },
    {"style": "video_point_count", "label": "mark", "points": [[[1, 2]]], "timestamps": [0.5], "point_scale": 100},
    {
        "style": "video_point_track_per_frame",
        "label": "mark",
        "sampling_fps": 2,
        "width": 64,
        "height": 48,
        "points": [{"time": t / 2, "points": {"0": {"point": [t, 5], "occluded": False}}} for t in range(8)],
    },
]
SEVERAL = [
    {"style": "multi_image_pointing", "label": "Dog", "points": [[[1, 2]], []], "point_scale": 100},
    {"style": "correction_qa", "question": "Which?", "answer": "The first."},
]


def made(key, images=(), video=None, annotations=(), variants=(), **fields):
    """A record whose annotations are read from the form they have on disk."""

    def read(tree):
        return [read_annotation(entry, len(images), video is not None) for entry in tree]

    return Record(
        key, list(images), video, annotations=read(annotations), variants=[read(v) for v in variants], **fields
    )


RECORDS = {
    "picture": made("s:picture", [png(200, 300)], annotations=PICTURE),
    "single": made("s:single", [png(64, 64)], annotations=PICTURE[:1]),
    "several": made("s:several", [png(64, 64), png(100, 200)], annotations=SEVERAL),
    "video": made(
        "s:video",
        video=CLIP,
        subtitles=[Subtitle(0, 1, "hello")],
        annotations=MOVING,
        sampling={"frame_sample_mode": "fps", "candidate_sampling_fps": [1, 2]},
    ),
    "text": made("s:text", annotations=[{"style": "text_sft", "messages": ["u1", "a1", "u2", "a2"]}]),
}


def check(example):
    """What every part of the trainer relies on."""
    count = example.num_tokens
    for name in ("labels", "loss_weights", "position_ids", "branch_ids", "visual"):
        assert getattr(example, name).shape == (count,), name
    assert example.input_ids.dtype == example.labels.dtype == example.position_ids.dtype == np.int64
    assert example.loss_weights.dtype == np.float32 and example.visual.dtype == bool
    assert example.crops.dtype == np.uint8 and example.crops.shape[1:] == (81, 588)
    assert example.pooling.dtype == np.int64 and example.pooling.max(initial=-1) < 81 * example.num_crops
    assert np.count_nonzero(example.input_ids == TOKENIZER.special.im_patch) == len(example.pooling)
    assert example.unit_crops.sum() == example.num_crops and example.unit_pooled_tokens.sum() == len(example.pooling)
    assert example.input_ids[0] == TOKENIZER.bos_id
    learned = example.loss_weights > 0
    assert learned.any() and example.labels[learned].max() < TOKENIZER.vocab_size
    assert not example.visual[learned].any()
    assert np.array_equal(example.visual, np.isin(example.input_ids, list(TOKENIZER.visual_ids)))
    root = example.branch_ids == -1
    if not root.all():
        assert not example.visual[~root].any()
        for branch in range(example.branch_ids.max() + 1):
            rows = np.flatnonzero(example.branch_ids == branch)
            assert np.array_equal(example.position_ids[rows], root.sum() + np.arange(len(rows)))
            assert example.labels[rows[-1]] == TOKENIZER.eos_id
    assert np.array_equal(example.position_ids[root], np.arange(root.sum()))


def answers(example):
    return [answer for turns in example.info["conversations"] for _, answer in turns]


@pytest.mark.parametrize("text", [None, STAGE1], ids=["stage2", "stage1"])
@pytest.mark.parametrize("name", RECORDS)
def test_every_kind_of_record(name, text):
    record = RECORDS[name]
    example = builder(text).build(record, rng(), max_tokens=2048)
    check(example)
    assert example.key == record.key
    branches = len(record.annotations)
    assert set(example.branch_ids.tolist()) == ({-1} if branches == 1 else set(range(-1, branches)))
    assert example.info["branches_kept"] == branches and example.info["branches_dropped"] == 0
    if text:
        assert set(example.loss_weights[example.loss_weights > 0].tolist()) == {1.0}


@pytest.mark.parametrize("name", RECORDS)
def test_same_generator_same_example(name):
    first, again = (builder().build(RECORDS[name], rng(7)) for _ in range(2))
    np.random.seed(3)
    assert np.array_equal(first.input_ids, again.input_ids) and np.array_equal(first.crops, again.crops)
    assert first.info == again.info
    others = [builder().build(RECORDS[name], rng(s)).input_ids.tolist() for s in range(4)]
    if name != "text":
        assert any(other != first.input_ids.tolist() for other in others)


def test_sequence_of_a_single_picture():
    example = builder().build(RECORDS["single"], rng())
    ((user, answer),) = example.info["conversations"][0]
    root = example.info["root_tokens"]
    wrapped = TOKENIZER.encode_chat(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n")
    tail = TOKENIZER.encode(answer)
    assert example.input_ids[root:].tolist() == wrapped + tail
    assert example.labels[root + len(wrapped) - 1 :].tolist() == [*tail, TOKENIZER.eos_id]
    assert example.visual[1:root].all() and not example.visual[root:].any()


def test_several_turns_have_two_ends_between_them():
    ids = builder().build(RECORDS["text"], rng()).input_ids.tolist()
    text = TOKENIZER.decode(ids)
    assert text == (
        "<|im_end|><|im_start|>user\nu1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>"
        "<|im_end|>\n<|im_start|>user\nu2<|im_end|>\n<|im_start|>assistant\na2"
    )


def test_special_strings_of_users_stay_text():
    example = builder().build(RECORDS["picture"], rng())
    outside = example.branch_ids >= 0
    assert not np.any(example.input_ids[outside] >= TOKENIZER.vocab_size)
    ends = np.count_nonzero(example.input_ids[outside] == TOKENIZER.chat_end_id)
    assert ends == len(PICTURE)  # one per user turn


def test_video_example():
    example = builder().build(RECORDS["video"], rng())
    assert example.info["frame_times"] == [i / 2 for i in range(8)]
    assert example.unit_crops.tolist() == [1] * 8 and example.unit_pooled_tokens.tolist() == [9] * 8
    assert "subtitle\n0.0 - 1.0 hello\n" in TOKENIZER.decode(example.input_ids[: example.info["root_tokens"]])
    (track,) = [a for a in answers(example) if a.startswith("<tracks")]
    assert [g.frame for g in parse(track)[0].groups] == [str(i / 2) for i in range(8)]


def test_weights():
    flat = builder().build(RECORDS["picture"], rng(), weight=0.2).loss_weights
    assert set(flat.tolist()) == {0.0, np.float32(0.2)}
    own = made("s:k", [png(64, 64)], annotations=PICTURE, weight=0.1)
    assert set(builder().build(own, rng()).loss_weights.tolist()) == {0.0, np.float32(0.1)}
    assert set(builder().build(own, rng(), weight=0.3).loss_weights.tolist()) == {0.0, np.float32(0.3)}
    generic = builder().build(RECORDS["picture"], rng())
    for branch in range(5):
        weights = generic.loss_weights[generic.branch_ids == branch]
        learned = weights[weights > 0]
        np.testing.assert_allclose(learned, 2 / np.sqrt(len(learned) - 1) / np.sqrt(5), rtol=1e-6)
    plain = builder().build(RECORDS["single"], rng()).loss_weights
    np.testing.assert_allclose(plain.max(), 2 / np.sqrt(np.count_nonzero(plain)), rtol=1e-6)


def test_a_weight_factor_keeps_the_generic_rule():
    """As published for ChartQA: human questions 1.4772, machine-made ones 0.5228 times 2 / sqrt(n)."""
    plain = builder().build(made("s:k", [png(64, 64)], annotations=PICTURE), rng()).loss_weights
    scaled = builder().build(made("s:k", [png(64, 64)], annotations=PICTURE, weight_factor=1.4772), rng())
    np.testing.assert_allclose(scaled.loss_weights, plain * 1.4772, rtol=1e-6)
    flat = builder().build(made("s:k", [png(64, 64)], annotations=PICTURE, weight_factor=2.0), rng(), weight=0.2)
    assert set(flat.loss_weights.tolist()) == {0.0, np.float32(0.2)}  # the data set's goes before it


def test_high_resolution_is_drawn():
    record = made("s:k", [png(400, 600)], annotations=PICTURE[:1])
    crops = [builder().build(record, rng(s), p_high_res=0.5).num_crops for s in range(30)]
    assert set(crops) == {7, 25} or len(set(crops)) == 2
    assert 0.2 < np.mean([c == max(crops) for c in crops]) < 0.8
    assert builder(training=False).build(record, rng(), p_high_res=1.0).num_crops == min(crops)
    pair = made("s:k", [png(400, 600)] * 2, annotations=PICTURE[:1])
    assert len({builder().build(pair, rng(s), p_high_res=0.5).num_crops for s in range(10)}) == 1


def test_branches_beyond_the_limit_are_dropped():
    many = made("s:many", [png(64, 64)], annotations=PICTURE[:2] * 1000)
    example = builder().build(many, rng(), max_tokens=512)
    check_prefix = example.info
    assert example.num_tokens <= 512
    assert check_prefix["branches_kept"] + check_prefix["branches_dropped"] == 2000
    assert example.branch_ids.max() + 1 == check_prefix["branches_kept"] < 20


def test_pictures_are_never_cut():
    root = builder().build(RECORDS["single"], rng()).info["root_tokens"]
    with pytest.raises(BadRecord, match=f"s:single: the images or frames take {root} tokens, more than the 40"):
        builder().build(RECORDS["single"], rng(), max_tokens=40)
    with pytest.raises(BadRecord, match="no answer begins within"):
        builder().build(RECORDS["single"], rng(), max_tokens=root + 2)


def test_pictures_beyond_the_maximum_are_counted():
    record = made("s:k", [png(64, 64)] * 4, annotations=[{"style": "user_qa", "question": "q", "answer": "a"}])
    example = builder(max_images=3).build(record, rng())
    assert example.num_crops == 6 and example.info["ignored"] == 1


# --- inference ------------------------------------------------------------------------------------------------------


def test_prompt_is_the_beginning_of_a_training_example():
    record = made("s:k", [png(100, 200)], annotations=[{"style": "user_qa", "question": "Why?", "answer": "So."}])
    example = builder().build(record, rng())
    prompt = builder().prompt([png(100, 200)], question="Why?")
    assert np.array_equal(prompt.input_ids, example.input_ids[: prompt.num_tokens])
    assert prompt.num_tokens == np.flatnonzero(example.loss_weights)[0] + 1
    assert np.array_equal(prompt.crops, example.crops) and np.array_equal(prompt.pooling, example.pooling)
    assert set(prompt.labels.tolist()) == {-1} and not prompt.loss_weights.any()
    assert np.array_equal(prompt.visual, example.visual[: prompt.num_tokens])


def test_prompt_variants():
    make = builder().prompt
    assert TOKENIZER.decode(make(question="Q", style="vqa2").input_ids).count("vqa2: Q") == 1
    assert "A. x\nB. y" in TOKENIZER.decode(make(question="Q", style="a_okvqa_mc", options=["x", "y"]).input_ids)
    again = make(question="And?", history=[("u1", "a1")])
    assert TOKENIZER.decode(again.input_ids).count("<|im_end|>") == 1 + 1 + 2 + 1
    moving = make(video=CLIP, question="Q", subtitles=[Subtitle(0, 1, "hello")], clip=(0.0, 2.0))
    assert moving.info["frame_times"] == [0.0, 0.5, 1.0, 1.5, 2.0] and moving.num_crops == 5
    assert "long_caption 65: " in TOKENIZER.decode(builder(STAGE1).prompt(question="Q", style="long_caption").input_ids)
    with pytest.raises(ValueError, match="either images or one video"):
        make([png(9, 9)], CLIP, "Q")


# --- hostile input --------------------------------------------------------------------------------------------------

QA = {"style": "user_qa", "question": "q", "answer": "a"}
NOWHERE = Annotation(Points(style_of("pointing"), None, "x", None, ((float("nan"), 1.0),)))


@pytest.mark.parametrize(
    "record, cause, message",
    [
        (made("s:k", [png(64, 64)[:30]], annotations=[QA]), "bad media", "s:k: cannot read image of 30 bytes"),
        (made("s:k", video=CLIP[:500], annotations=[QA]), "bad media", "cannot read video of 500 bytes"),
        (made("s:k", [png(9, 9)], CLIP, annotations=[QA]), "bad media", "either images or one video"),
        (made("s:k", annotations=[]), "bad annotation", "1 to 4096 annotations, got 0"),
        (made("s:k", annotations=[{**QA, "answer": ""}]), "bad annotation", "'user_qa' has an empty answer"),
        (made("s:k", annotations=[{**QA, "answer": "\ud800"}]), "bad annotation", "not valid Unicode"),
        (made("s:k", annotations=[{**QA, "question": "x" * 10**8}]), "bad annotation", "100000000 characters"),
        (
            Record("s:k", [png(9, 9)], annotations=[NOWHERE]),
            "bad annotation",
            "two finite numbers",
        ),
        (made("s:k", video=CLIP, clip=(50.0, 60.0), annotations=[QA]), "bad media", "does not lie in a video"),
        (made("s:k", video=CLIP, sampling={"mode": "x"}, annotations=[QA]), "bad media", "unknown video sampling"),
    ],
)
def test_bad_records_name_themselves(record, cause, message):
    with pytest.raises(BadRecord, match=message) as caught:
        builder().build(record, rng(), max_tokens=2048)
    assert caught.value.cause == cause and caught.value.key == "s:k"


@pytest.mark.parametrize(
    "limits, record, message",
    [
        (LimitsConfig(pixels=80), made("s:k", [png(9, 9)], annotations=[QA]), "data.limits.pixels"),
        (LimitsConfig(decode_seconds=0), made("s:k", video=CLIP, annotations=[QA]), "data.limits.decode_seconds"),
        (LimitsConfig(annotations=1), made("s:k", annotations=[QA, QA]), "data.limits.annotations"),
        (LimitsConfig(text_chars=2), made("s:k", annotations=[{**QA, "answer": "abc"}]), "data.limits.text_chars"),
    ],
)
def test_limits_of_the_config_are_used(limits, record, message):
    data = DataConfig(image=ImageConfig(crop_size=126, margin=2, max_crops=2))
    ExampleBuilder(data, TOKENIZER).build(record, rng())
    with pytest.raises(BadRecord, match=message):
        ExampleBuilder(dataclasses.replace(data, limits=limits), TOKENIZER).build(record, rng())


def test_bad_settings_fail_before_any_record():
    with pytest.raises(ValueError, match="unknown text.system_prompt"):
        builder(TextFormatConfig(system_prompt="none"))
    with pytest.raises(ValueError, match="multiple of patch_size"):
        ExampleBuilder(DataConfig(image=ImageConfig(crop_size=127)), TOKENIZER)


def test_variants_are_drawn_by_weight():
    """Every access draws one; over many accesses each comes as often as its weight says."""
    trees = [[{"style": "user_qa", "question": "q", "answer": text}] for text in ("one", "two", "never")]
    record = made("s:k", variants=trees, variant_weights=[3, 1, 0])
    build = builder()
    said = [build.build(record, rng(i)).info["conversations"][0][0][1] for i in range(200)]
    assert 120 <= said.count("one") <= 180 and said.count("one") + said.count("two") == 200
    record = made("s:k", variants=trees)
    assert {build.build(record, rng(i)).info["conversations"][0][0][1] for i in range(30)} == {"one", "two", "never"}


def test_annotations_as_turns_of_one_conversation():
    turns = [PICTURE[4], {**PICTURE[3], "label": "Trees"}]
    record = made("s:k", [png(64, 64)], annotations=[{"style": "point_count", "turns": turns}])
    example = builder().build(record, rng())
    (conversation,) = example.info["conversations"]
    assert len(conversation) == 2 and "cars" in conversation[0][0].lower() and "trees" in conversation[1][0].lower()
    assert example.info["branches_kept"] == 1
