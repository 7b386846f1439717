"""MPEG program streams, few of whose frames have a time stamp of their own: films, clips, and what prepare makes of
them."""

from __future__ import annotations

import io
import shutil
import subprocess
from fractions import Fraction
from functools import cache
from itertools import product

import av
import numpy as np
import pytest

from data_prep.probe import probe_video
from data_prep.transcode import Wanted, cut_packets, reencode
from molmo2_nemo.data.config import LimitsConfig, VideoConfig
from molmo2_nemo.data.video.film import look_at
from molmo2_nemo.data.video.index import Packets, program_stream_index
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


# --- low bitrates ----------------------------------------------------------------------------------------------------

FFMPEG = shutil.which("ffmpeg")
SMALL = [  # codec, B frames, GOP, frames: some 50 frames come in a pack, and some films end inside one
    *product(("mpeg1video", "mpeg2video"), (0, 1, 2, 3), (12, 18), (1500,)),
    *product(("mpeg2video",), (0,), (12,), (183, 200, 226, 228, 300)),
    *product(("mpeg1video",), (1, 3), (12, 18), (500, 115)),
]


def encoded(path, source: str, *options: str) -> None:
    """A film made by the ffmpeg program."""
    assert FFMPEG is not None
    command = [FFMPEG, "-loglevel", "error", "-y", "-f", "lavfi", "-i", source, *options, str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


@pytest.mark.skipif(FFMPEG is None, reason="needs the ffmpeg program")
@pytest.mark.parametrize("container", ["mpeg", "vob"])
def test_films_of_the_ffmpeg_program_with_many_frames_in_a_pack(container, tmp_path):
    wrong, uneven = {}, 0
    for codec, bframes, gop, count in SMALL:
        path = tmp_path / "x.mpg"
        options = ("-c:v", codec, "-q:v", "3", "-g", str(gop), "-bf", str(bframes), "-f", container)
        encoded(path, f"color=gray:s=64x48:r=25:d={count / 25}", *options)
        index = look_at(path, LIMITS).index
        if len(index.pts) != count or not np.array_equal(np.diff(index.pts), np.full(count - 1, 3600)):
            wrong[codec, bframes, gop, count] = np.flatnonzero(np.diff(index.pts) != 3600).tolist()
        with av.open(str(path)) as made:
            stamps = np.array([packet.dts for packet in made.demux(video=0) if packet.size])
        uneven += bool((np.diff(stamps) != 3600).any())
    assert not wrong and uneven > 3


@pytest.mark.skipif(FFMPEG is None, reason="needs the ffmpeg program")
@pytest.mark.parametrize("bframes", [0, 2])
def test_the_frames_of_such_a_film_are_those_that_the_ffmpeg_program_decodes(bframes, tmp_path):
    """Its pictures are black or white at random, 25 a second."""
    path, count = tmp_path / "x.mpg", 600
    flicker = r"geq=lum='if(gt(mod(floor(N*N/7)\,5)\,2)\,235\,16)':cb=128:cr=128"
    options = ("-c:v", "mpeg2video", "-q:v", "3", "-g", "12", "-bf", str(bframes), "-f", "mpeg")
    encoded(path, f"color=gray:s=64x48:r=25:d={count / 25},{flicker}", *options)
    assert FFMPEG is not None
    command = [FFMPEG, "-loglevel", "error", "-i", str(path), "-vsync", "passthrough", "-f", "rawvideo"]
    raw = subprocess.run([*command, "-pix_fmt", "gray", "-"], check=True, capture_output=True).stdout
    frames = np.frombuffer(raw, np.uint8).reshape(-1, 48 * 64).mean(1) > 100
    assert len(frames) == count and 0.2 < frames.mean() < 0.8
    shown = read_video(path, VideoConfig(max_frames=128, max_fps=5), side=28)
    bright = shown.frames.reshape(len(shown.frames), -1).mean(1) > 100
    assert bright.tolist() == frames[np.minimum(np.round(shown.times * 25).astype(int), count - 1)].tolist()


def stamped(dts: list[int], *, reordered: bool = False) -> list[int]:
    """Times of the frames and the end, in frames, of a film at 25 a second whose packets have these dts, in frames."""
    stamps = np.array(dts, np.int64) * 3600
    pts = stamps + (3 * 3600 * (np.arange(len(dts)) % 3 == 0) if reordered else 0)
    keys = np.arange(len(dts)) % 12 == 0
    index = program_stream_index(Packets(pts, stamps, np.full(len(dts), 3600), keys), Fraction(1, 90000), None)
    return ((np.append(index.pts, index.end) - index.pts[0]) // 3600).tolist()


@pytest.mark.parametrize("reordered", [False, True])
def test_frames_that_are_missing_leave_a_gap(reordered):
    """A clock that goes ahead and never back."""
    for gap in (1, 2, 9, 40):
        dts = [*range(300), *range(300 + gap, 600 + gap)]
        assert stamped(dts, reordered=reordered) == [*dts, 600 + gap]
    gaps = [*range(100), *range(101, 300), *range(302, 500)]
    assert stamped(gaps, reordered=reordered) == [*gaps, 500]
