"""What the rotary range has room for, against examples that are built of films and images."""

from __future__ import annotations

from dataclasses import replace

import pytest

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig, ImageConfig, VideoConfig
from molmo2_nemo.data.image import images_layout
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.evaluation.needles.needle import Needle
from molmo2_nemo.inference.limits import Room, tokens_of_tiles
from molmo2_nemo.inference.prompt import Shown

IMAGE = ImageConfig(crop_size=126, margin=2)
TOKENIZER = Molmo2Tokenizer.load("tiny")


def end_of_film(frames: int, video: VideoConfig) -> int:
    """Positions that the start of a sequence and a film of so many frames take."""
    video = replace(video, max_frames=frames)
    film = Needle(0, frames, 0.5).film(video)
    example = ExampleBuilder(DataConfig(image=IMAGE, video=video), TOKENIZER, training=False).prompt((), film, "?")
    assert len(example.crops) == frames
    return int(example.visual.nonzero()[0][-1]) + 1


@pytest.mark.parametrize("positions", [200, 333])
@pytest.mark.parametrize(
    "video",
    [VideoConfig(), VideoConfig(per_frame_markers=False, pool=2), VideoConfig(time_mode="none", max_fps=10.0)],
    ids=["published", "one pair of markers", "no times"],
)
def test_one_frame_more_leaves_the_range(positions, video):
    most = Room(DataConfig(image=IMAGE, video=video), TOKENIZER, positions).frames()
    assert end_of_film(most, video) <= positions < end_of_film(most + 1, video)


@pytest.mark.parametrize(("tiles", "size"), [(4, (2000, 2000)), (12, (4000, 3000)), (49, (5000, 5000))])
def test_tokens_of_an_image_of_many_tiles(tiles, size):
    layout = images_layout([size], replace(IMAGE, max_crops=tiles), TOKENIZER)
    assert layout.info["images"][0]["tiling"][0] * layout.info["images"][0]["tiling"][1] == tiles
    assert tokens_of_tiles(tiles, IMAGE) == len(layout.token_ids)


def test_what_fits_is_refused_by_one_more():
    room = Room(DataConfig(image=IMAGE), TOKENIZER, 1000)
    frames, tiles = room.frames(), room.tiles()
    assert not list(room.problems(Shown(frames=frames, max_crops=tiles), longest=999))
    (said,) = room.problems(Shown(frames=frames + 1))
    assert said.startswith(f"--frames {frames + 1}: ") and "1,000 positions that the model's rotary range has" in said
    assert f"ask for {frames} or fewer, or see with --beyond-range" in said
    assert not list(room.problems(Shown(frames=10**12, fps=1e9), beyond=True))
    (said,) = room.problems(Shown(max_crops=tiles + 1))
    assert said.startswith(f"--max-crops {tiles + 1}: ") and f"room for {tiles} tiles" in said
    many = Room(DataConfig(image=replace(IMAGE, high_res_max_crops=tiles + 1)), TOKENIZER, 1000)
    (said,) = many.problems(Shown(high_res=True), beyond=True)
    assert said.startswith(f"--high-res ({tiles + 1} tiles): ")
    (said,) = room.problems(Shown(), longest=1000)
    assert said.startswith("--max-new-tokens 1000: ")
    assert [p.split(":")[0] for p in room.problems(Shown(frames=10**12), longest=10**9, training=True)] == [
        "evaluation.frames=1000000000000",
        "evaluation.max_new_tokens=1000000000",
    ]
