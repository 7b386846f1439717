"""Estimates against what the real builder makes of the same record."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data_prep.demo import MEDIA
from data_prep.estimate import image_cost, text_cost, video_cost
from molmo2_nemo.data.config import DataConfig, ImageConfig, VideoConfig
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.data.video.read import read_video
from molmo2_nemo.data.video.tokens import encode_video
from tests.support.pictures import encode_images

TOKENIZER = Molmo2Tokenizer.load("tiny")


@pytest.mark.parametrize("sizes", [[(300, 300)], [(1900, 400)], [(250, 900)], [(100, 100), (500, 300), (640, 640)]])
def test_pictures_are_exact(sizes):
    """Crops and visual tokens of the published preprocessing; several pictures are announced by a few text tokens."""
    pixels = [np.zeros((height, width, 3), np.uint8) for width, height in sizes]
    made = encode_images(pixels, ImageConfig(), TOKENIZER)
    announced = sum(len(TOKENIZER.encode(f"Image {i + 1}")) for i in range(len(sizes))) if len(sizes) > 1 else 0
    assert image_cost(sizes) == (len(made.token_ids) - announced, len(made.crops))


@pytest.mark.parametrize(
    "clip, sampling", [((0.0, 5.0), {}), ((1.0, 1.7), {}), ((0.0, 5.0), {"mode": "fps", "max_fps": 1})]
)
def test_frames_are_exact_and_timestamps_close(clip, sampling):
    data = (MEDIA / "bunny.mp4").read_bytes()
    video = read_video(data, VideoConfig(), side=378, clip=clip, sampling=sampling)
    made = encode_video(video, ImageConfig(), VideoConfig(), TOKENIZER)
    tokens, crops = video_cost(clip[1] - clip[0], 25.0, sampling)
    assert crops == len(made.crops) and tokens == pytest.approx(len(made.token_ids), rel=0.02)


def test_text_counts_the_longest_variant():
    short = [{"style": "user_qa", "question": "Why?", "answer": "So."}]
    long = [{"style": "user_qa", "question": "Why?", "answer": "word " * 100}]
    assert text_cost([short, long]) == text_cost([long]) > 100 > text_cost([short]) > 5
    turns = [{"style": "x", "turns": short * 3}]
    assert text_cost([turns]) == 3 * text_cost([short])
    assert text_cost([short], "word " * 100) >= text_cost([short]) + 100
    points = [{"style": "pointing", "label": "x", "points": [[1, 2]] * 10}]
    groups = [{"style": "video_point", "label": "x", "points": [[[1, 2]] * 5] * 2, "timestamps": [0, 1]}]
    frame = {"time": 0.5, "points": {"0": {"point": [1, 2]}, "1": {"point": [1, 2]}}}
    track = [{"style": "video_point_track_per_frame", "label": "x", "points": [frame] * 5}]
    base = text_cost([[{"style": "pointing", "label": "x", "points": []}]])
    assert text_cost([points]) == text_cost([groups]) == base + 100
    assert text_cost([track]) == base + 5 * (6 + 20)
    assert DataConfig().image.max_crops == ImageConfig().max_crops  # what the estimate assumes is what training takes


def test_sizes_are_those_of_the_upright_picture():
    from data_prep.probe import probe_image

    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (1900, 400)).save(file, "JPEG", exif=exif)
    made = probe_image(file.getvalue())
    assert image_cost([(made.width, made.height)]) == image_cost([(400, 1900)]) != image_cost([(1900, 400)])
