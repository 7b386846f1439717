"""Prepared shards train: a record of every kind goes through the loader, and the trainer makes a step of them."""

from __future__ import annotations

import json
import math

import pytest

from data_prep.demo import MEDIA
from data_prep.prepare import Options, prepare_own
from data_prep.shard_tools import check
from data_prep.sources.shapes import (
    caption,
    choice,
    conversation,
    either,
    image_points,
    no_pointing,
    points,
    qa,
    track,
    turns,
    video_points,
)
from molmo2_nemo.data.config import DataConfig, ImageConfig, PackingConfig, SourceConfig, VideoConfig
from molmo2_nemo.data.loader import PackStream
from tests.support.packs import tiny_run, train_on_packs

FRAMES = [{"time": t / 2, "points": {"0": {"point": [100 + 10 * t, 90], "occluded": False}}} for t in range(8)]
PICTURES = ["cat.jpg", "horse.jpg"]
FILM = {"video": "bunny.mp4", "clip": [0, 4]}
KINDS = {
    "text": {"annotations": [conversation(["Say a.", "a", "And b.", "b"])]},
    "caption": {"image": "cat.jpg", "annotations": [caption("A cat.")]},
    "question": {"image": "cat.jpg", "annotations": [qa("Which animal?", "a cat")]},
    "answers": {"image": "cat.jpg", "annotations": [qa("What?", ["cat", "cat", "dog"], "vqa2")]},
    "explained": {"image": "cat.jpg", "annotations": [qa("What?", "cat", "cosyn_chart_exp", explanation="It purrs.")]},
    "how many": {"image": "cat.jpg", "annotations": [no_pointing(qa("How many cats are there?", "one"))]},
    "either": {"image": "cat.jpg", "annotations": [either(qa("What?", "a cat"), {}, {"answer": "cat"})]},
    "choice": {"image": "cat.jpg", "annotations": [choice("Which?", ["dog", "cat"], 1, "a_okvqa_mc")]},
    "tree": {"image": "cat.jpg", "annotations": [caption("A cat."), qa("Fur?", "grey"), points("eye", [[38, 37]])]},
    "points": {"image": "cat.jpg", "annotations": [points("eyes", [[38, 37], [71, 45]], "point_count")]},
    "pixels": {"image": "cat.jpg", "annotations": [points("nose", [[200, 240]], scale=None)]},
    "counted": {
        "image": "cat.jpg",
        "variants": [[points("x", [[1, 2]], style)] for style in ("pointing", "point_count")],
    },
    "turns": {"image": "cat.jpg", "annotations": [turns([points("a", [[1, 2]]), points("b", [[3, 4]])], "pointing")]},
    "several": {"images": PICTURES, "annotations": [qa("What is in both?", "animals", "correction_qa")]},
    "several points": {"images": PICTURES, "annotations": [image_points("heads", [[[50, 40]], [[90, 20]]])]},
    "weighted": {"image": "cat.jpg", "weight_factor": 0.5, "annotations": [qa("What?", "cat", "chart_qa")]},
    "film": {**FILM, "annotations": [caption("A rabbit yawns.", "video_long_caption")]},
    "film question": {**FILM, "annotations": [qa("Which animal?", "a rabbit", "video_short_answer")]},
    "film choice": {
        **FILM,
        "subtitles": [{"start": 1, "end": 2, "text": "hello"}],
        "annotations": [choice("Who?", ["a cat", "a rabbit"], 1, "video_multiple_choice_w_subtitle")],
    },
    "said": {**FILM, "subtitles": "hello there", "annotations": [qa("What is said?", "hello", "video_short_answer")]},
    "film points": {**FILM, "annotations": [video_points("rabbit", [0.5, 1], [[[30, 40]], [[31, 40], [60, 60]]])]},
    "film count": {**FILM, "annotations": [video_points("rabbit", [0.5], [[[30, 40]]], "video_point_count")]},
    **{
        style: {
            **FILM,
            "sampling": {"frame_sample_mode": "fps", "candidate_sampling_fps": [1, 2]},
            "annotations": [track("rabbit", FRAMES, style, size=(480, 270), sampling_fps=2)],
        }
        for style in (
            "video_point_track_per_frame",
            "video_point_ground_start_end",
            "video_single_point_track_per_frame",
        )
    },
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    path = folder / "kinds.jsonl"
    path.write_text("".join(json.dumps({"key": key.replace(" ", "-"), **entry}) + "\n" for key, entry in KINDS.items()))
    options = Options(folders=(MEDIA,), cache=folder / "cache", records_per_shard=9, strict=True)
    prepare_own(path, folder / "kinds", options)
    return folder / "kinds"


def settings(shards):
    return DataConfig(
        sources={"kinds": SourceConfig(path=str(shards))},
        image=ImageConfig(crop_size=126, margin=2, max_crops=4, max_multi_image_crops=2),
        video=VideoConfig(max_frames=8),
        packing=PackingConfig(sequence_length=768, max_crops=24, buffer_size=4),
    )


def test_every_kind_reaches_training(shards, workers, tmp_path):
    assert check(shards) == []
    stream = PackStream(settings(shards), micro_batch_size=1, dp_rank=0, dp_size=1)
    seen, packs = set(), []
    for batch in stream:
        packs.append(batch)
        seen.update(key.split(":")[1] for pack in batch.keys for key in pack)
        if len(seen) == len(KINDS) or len(packs) > 40:
            break
    assert not stream.skipped and seen == {key.replace(" ", "-") for key in KINDS}
    assert any(len(batch.crops) == 0 or not batch.visual.all() for batch in packs)
    while len(packs) % 4:
        packs.append(packs[0])
    cfg = tiny_run(tmp_path, steps=1)
    cfg.stage.global_batch_size = len(packs)
    (metrics,) = workers.run(train_on_packs, cfg, packs, ranks=1, fit=True)
    assert [line["step"] for line in metrics] == [1] and math.isfinite(metrics[0]["loss"])
    assert all(metrics[0][f"grad_norm_{group}"] > 0 for group in ("vit", "connector", "llm"))
