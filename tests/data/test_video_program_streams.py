"""MPEG program streams, few of whose frames have a time stamp of their own: films, clips, and what prepare makes of
them."""

from __future__ import annotations

import io
from functools import cache

import av
import numpy as np
import pytest

from data_prep.probe import probe_video
from data_prep.transcode import Wanted, cut_packets, reencode
from molmo2_nemo.data.config import LimitsConfig, VideoConfig
from molmo2_nemo.data.video.film import look_at
from molmo2_nemo.data.video.read import read_video
from tests.support.films import film, numbers

COUNT = 200
LIMITS = LimitsConfig()
# Sizes of packets differ from film to film, so that in some of them a frame begins just at the end of a pack.
FILMS = {
    f"{codec} bf={bframes} q={quality}": (codec, bframes, quality)
    for codec in ("mpeg1video", "mpeg2video")
    for bframes in (0, 2)
    for quality in (2, 3, 5)
}


@cache
def data_of(name: str) -> bytes:
    codec, bframes, quality = FILMS[name]
    options = {"qmin": str(quality), "qmax": str(quality), "flags": "+qscale", "global_quality": str(118 * quality)}
    return film(COUNT, "mpeg", codec, fps=25, bframes=bframes, options=options)


def expected(start: float, end: float, fps: float) -> list[int]:
    times = np.append(np.arange(0, end - start, 1 / fps), end - start) + start
    return np.minimum(np.floor(times * 25 + 1e-4), COUNT - 1).astype(int).tolist()


@pytest.mark.parametrize("name", FILMS)
def test_the_n_th_frame_is_shown_n_25ths_of_a_second_after_the_first(name):
    index = look_at(data_of(name), LIMITS).index
    assert len(index.pts) == COUNT and np.array_equal(np.diff(index.pts), np.full(COUNT - 1, 3600))
    assert index.duration == 8 and index.fps == 25


@pytest.mark.parametrize("clip", [None, (3.1, 7.7), (0.5, 2.0)])
@pytest.mark.parametrize("name", FILMS)
def test_films_and_clips_show_the_same_frames_as_they_are_cut_and_encoded_again(name, clip):
    data, config = data_of(name), VideoConfig(max_frames=80, max_fps=2)
    shown = read_video(data, config, side=112, clip=clip)
    assert numbers(shown.frames) == expected(*(clip or (0.0, 8.0)), 2) and shown.decoding.replaced == 0
    whole = probe_video(data, None)
    for made, part in (
        cut_packets(whole, clip) if clip else (whole, None),
        reencode(whole, clip, Wanted(height=72), cut=clip is not None),
        reencode(whole, clip, Wanted(gop=5), cut=False),
    ):
        assert numbers(read_video(made.content(), config, side=112, clip=part).frames) == numbers(shown.frames)


def test_some_of_these_films_have_frames_with_the_stamp_of_another():
    """What FFmpeg computes is not what is shown; if it ever is, these tests say nothing."""
    uneven = 0
    for name in FILMS:
        with av.open(io.BytesIO(data_of(name))) as container:
            stamps = [packet.pts for packet in container.demux(video=0) if packet.size]
        uneven += len(set(stamps)) < COUNT
    assert uneven > 0


def test_a_film_that_is_tuned_in_to():
    """Frames before the first that can be decoded are replaced by it, and the others keep their times."""
    data = film(120, "mpeg", "mpeg2video", fps=25, gop=30, bframes=0)
    cut = data[len(data) // 3 // 2048 * 2048 :]
    clip = read_video(cut, VideoConfig(max_frames=128, max_fps=25), side=112)
    shown = numbers(clip.frames)
    first = shown[0]
    lost = shown.count(first) - 1
    assert lost > 0 and first % 30 == 0
    assert shown[lost : lost + 120 - first] == list(range(first, 120))
    assert clip.decoding.replaced == lost
