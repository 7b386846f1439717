"""Times of frames: one rounding, so that a frame is found at the very time at which it begins."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from molmo2_nemo.data.config import VideoConfig
from molmo2_nemo.data.video.index import VideoIndex, seconds_of
from molmo2_nemo.data.video.read import read_video
from molmo2_nemo.data.video.sampling import TimeSampler
from tests.support.films import film, numbers


def index(pts, end, base):
    pts = np.asarray(pts, np.int64)
    return VideoIndex(pts, pts[:1], pts[:1], Fraction(base), int(end))


@pytest.mark.parametrize("begin", [0, 7])
def test_frames_at_half_seconds_for_all_timescales(begin):
    """Ten minutes with a frame at every half second and at every quarter, of each timescale up to 20,000."""
    marks, wrong = np.arange(1199), []
    for scale in range(4, 20_001, 4):
        pts = begin * scale + np.arange(2 * len(marks)) * (scale // 4)
        if not np.array_equal(index(pts, pts[-1] + scale // 4, Fraction(1, scale)).frame_at(marks / 2), 2 * marks):
            wrong.append(scale)
    assert not wrong


def test_frames_at_whole_seconds_for_all_timescales():
    """As above for the timescales that have no half or quarter seconds: a frame a second and one just before it."""
    wrong = []
    for scale in range(3, 20_001):
        pts = np.concatenate([[0], (np.arange(1, 600)[:, None] * scale + [-1, 0]).ravel()])
        if not np.array_equal(
            index(pts, pts[-1] + scale, Fraction(1, scale)).frame_at(np.arange(600)), 2 * np.arange(600)
        ):
            wrong.append(scale)
    assert not wrong


@pytest.mark.parametrize("fps", [24, 25, 30, 60])
def test_durations_for_all_timescales(fps):
    """7 s last 7.0 s (15 frames at 2 a second), wherever the clock begins."""
    for scale in range(fps, 20_001, fps):
        begin = scale // 3
        pts = begin + np.arange(7 * fps) * (scale // fps)
        film = index(pts, begin + 7 * scale, Fraction(1, scale))
        assert film.duration == 7.0 and len(TimeSampler(128)(film.duration)) == 15, scale


def test_seconds_are_rounded_once():
    ticks = np.arange(0, 40_000, 7)
    for base in (Fraction(1, 600), Fraction(1001, 30_000), Fraction(1001, 24_000), Fraction(1, 90_000)):
        exact = [float(int(t) * base) for t in ticks]  # a Fraction, rounded once
        assert np.array_equal(seconds_of(ticks, base), exact)
        assert float(seconds_of(int(ticks[-1]), base)) == exact[-1]


@pytest.mark.parametrize(
    "timescale, fps", [(600, 30), (1000, 25), (12_800, 25), (15_360, 30), (19_200, 30), (30_000, 30), (90_000, 30)]
)
def test_real_files_of_many_timescales(timescale, fps):
    """A mark that lies between two frames shows the one begun before it."""
    data = film(7 * fps, fps=fps, timescale=timescale, size=(64, 48))
    clip = read_video(data, VideoConfig(), side=42)
    assert clip.duration == 7.0 and clip.times.tolist() == [k / 2 for k in range(15)]
    assert numbers(clip.frames) == [*(k * fps // 2 for k in range(14)), 7 * fps - 1]
    part = read_video(data, VideoConfig(), side=42, clip=(1.0, 5.0))
    assert numbers(part.frames) == [fps + k * fps // 2 for k in range(9)]
