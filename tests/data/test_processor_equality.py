"""Our pictures, videos and prompts against transformers' own Molmo2 processor (recorded by make_processor_fixtures.py).

Equal for every layout: bytes of all crops, pooling windows, token ids and which tokens are visual. The documented
differences have a test each: pictures with a side under the two margins, rounding of the normalised values, and how
frames of a video are chosen.
"""

import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig, ImageConfig, VideoConfig
from molmo2_nemo.data.resize import resize
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.data.video.read import Decoding, SampledVideo
from molmo2_nemo.data.video.sampling import TimeSampler
from molmo2_nemo.data.video.tokens import encode_video
from tests.support.pictures import encode_images

FIXTURES = Path(__file__).parents[1] / "fixtures"
sys.path.insert(0, str(FIXTURES))
from pictures import picture  # noqa: E402

torch.set_num_threads(1)
CASES = json.loads((FIXTURES / "processor" / "cases.json").read_text())
POOLING = np.load(FIXTURES / "processor" / "pooling.npz", allow_pickle=False)
TOKENIZER = Molmo2Tokenizer.load("tiny")


def expanded(runs):
    return np.concatenate([np.full(count, value) for value, count in runs])


def name(case):
    sizes = case.get("sizes") or [case["size"]]
    return "+".join(f"{w}x{h}" for w, h in sizes) + (f"x{case['frames']}" if "frames" in case else "")


def same_vision(crops, pooling, case):
    assert list(crops.shape) == case["shape"]
    places = np.random.RandomState(0).randint(0, crops.size, 64)
    assert crops.reshape(-1)[places].tolist() == case["samples"]
    assert hashlib.sha256(np.ascontiguousarray(crops).tobytes()).hexdigest() == case["crops"]
    np.testing.assert_array_equal(pooling, POOLING[case["pooling"]])


def png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=0)
    return out.getvalue()


def pixels_of(case):
    return [picture(w, h, seed) for (w, h), seed in zip(case["sizes"], case["seeds"], strict=True)]


@pytest.mark.parametrize("case", CASES["images"] + CASES["high_res"] + CASES["several"], ids=name)
def test_pictures(case):
    """Through the whole builder, from encoded bytes to the prompt's arrays."""
    image = ImageConfig(max_crops=case["max_crops"], max_multi_image_crops=case["max_crops"])
    builder = ExampleBuilder(DataConfig(image=image), TOKENIZER, training=False)
    example = builder.prompt([png(pixels) for pixels in pixels_of(case)], None, case["question"])
    same_vision(example.crops, example.pooling, case)
    np.testing.assert_array_equal(example.input_ids, expanded(case["input_ids"]))
    np.testing.assert_array_equal(example.visual, expanded(case["visual"]) == 1)
    assert example.unit_crops.tolist() == case["num_crops"]
    assert example.unit_pooled_tokens.tolist() == [a * b + c * d for a, b, c, d in case["grids"]]
    assert [info["token_grid"] for info in example.info["images"]] == [grid[2:] for grid in case["grids"]]


@pytest.mark.parametrize("case", CASES["videos"], ids=name)
def test_videos(case):
    frames = np.stack([resize(picture(*case["size"], seed), 378, 378) for seed in range(case["frames"])])
    times = np.arange(case["frames"]) / case["fps"]
    video = SampledVideo(
        frames, times, tuple(case["size"]), float(times[-1]), case["fps"], Decoding(case["frames"], 0, "pyav")
    )
    root = encode_video(video, ImageConfig(), VideoConfig(max_frames=384), TOKENIZER)
    same_vision(root.crops, root.pooling, case)
    ids = [TOKENIZER.bos_id, *root.token_ids, *TOKENIZER.user_turn(case["question"], first=True)]
    np.testing.assert_array_equal(ids, expanded(case["input_ids"]))
    np.testing.assert_array_equal(np.isin(ids, sorted(TOKENIZER.visual_ids)), expanded(case["visual"]) == 1)
    assert case["grids"] == [[case["frames"], 9, 9]]


def test_enough_cases():
    layouts = {json.dumps([case.get("grids"), case["shape"]]) for key in ("images", "high_res", "several", "videos")
               for case in CASES[key]}  # fmt: skip
    assert len(CASES["images"]) >= 60 and len(layouts) >= 30
    assert [int(part) for part in CASES["versions"]["transformers"].split(".")[:2]] >= [5, 23]


@pytest.mark.parametrize("case", CASES["small"], ids=name)
def test_difference_small_sides(case):
    """A side under 112 pixels: ours counts it as one pixel (as the released training code does), theirs goes negative.

    Theirs then always takes one tile; ours takes what the long side needs. The global view is the same.
    """
    root = encode_images(pixels_of(case), ImageConfig(max_crops=8), TOKENIZER)
    (width, height), (rows, cols) = case["sizes"][0], root.info["images"][0]["tiling"]
    assert case["num_crops"] == [2]
    long_side = max(1, -(-(max(width, height) - 112) // 266))
    assert (rows, cols) == ((1, min(long_side, 8)) if width > height else (min(long_side, 8), 1))
    np.testing.assert_array_equal(root.pooling[:196], POOLING[case["pooling"]][:196])
    if (rows, cols) == (1, 1):
        same_vision(root.crops, root.pooling, case)
    else:
        assert root.crops.shape[0] > case["shape"][0]


def test_small_sides_do_differ():
    tilings = [
        encode_images(pixels_of(c), ImageConfig(), TOKENIZER).info["images"][0]["tiling"] for c in CASES["small"]
    ]
    assert [1, 4] in tilings  # 1000 x 100, the reference's example


def test_difference_rounding():
    """Theirs folds x / 255 * 2 - 1 into one subtraction and division: other last bits, never more than 1.2e-7."""
    byte = torch.arange(256, dtype=torch.uint8)
    ours = (byte.float() / 255 * 2 - 1).numpy()
    theirs = np.array(CASES["levels"], np.float32)
    difference = np.abs(ours - theirs)
    assert 0 < np.count_nonzero(difference) and difference.max() <= 1.2e-7
    np.testing.assert_allclose(theirs, (np.arange(256, dtype=np.float32) - 127.5) / 127.5, rtol=0, atol=6e-8)


@pytest.mark.parametrize("case", CASES["sampling"], ids=lambda c: f"{c['frames']}at{c['fps']:g}")
def test_difference_frame_choice(case):
    """Theirs: evenly spaced frame numbers from 0, the end not among them. Ours: by time, the end always among them."""
    count, fps = case["frames"], case["fps"]
    duration, theirs = count / fps, case["chosen"]
    target = min(384, int(duration * 2)) if fps > 2 else 384
    target = max(min(target, count), 1)
    step = count / target
    assert theirs == [int(k * step) for k in range(len(theirs))] and len(theirs) in (target, target + 1)
    times = TimeSampler(max_frames=384, max_fps=2.0)(duration)
    assert times[0] == 0 and times[-1] == duration
    assert len(times) == (384 if 383 / 2 < duration else int(np.ceil(duration * 2)) + 1)
    if target < count:
        assert theirs[-1] < count - 1  # the last frame is not forced
