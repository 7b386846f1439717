"""A video record's frames in two steps: a plan (which frames, at which times), and their decoding.

Times are seconds from the start of the clip, which is counted from the start of the film's first frame. A plan needs
the packets of the file and its first frame only; what an example's tokens and sizes are follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from molmo2_nemo.data.config import LimitsConfig, VideoConfig
from molmo2_nemo.data.image import resize
from molmo2_nemo.data.video.container import Source
from molmo2_nemo.data.video.decoders import Frames, frames_of
from molmo2_nemo.data.video.film import Film, look_at
from molmo2_nemo.data.video.frames_pyav import PyAVFrames, ScrambledStamps
from molmo2_nemo.data.video.sampling import TimeSampler
from molmo2_nemo.errors import DataError


@dataclass(frozen=True, slots=True)
class VideoPlan:
    """Which frames of a video, or of a clip of it, are shown, and when. Holds no pixels."""

    times: np.ndarray  # float64 [C], requested seconds from the clip's start
    numbers: np.ndarray  # int64 [C], of the film's frames; not descending
    size: tuple[int, int]  # width and height of the upright image, pixels
    duration: float  # seconds of the clip
    fps: float  # of the file, averaged
    film: Film


@dataclass(slots=True)
class SampledVideo:
    """The sampled frames of a video, stretched to crops."""

    frames: np.ndarray  # uint8 [C, side, side, 3]
    times: np.ndarray  # float64 [C], requested seconds from the clip's start
    size: tuple[int, int]  # width and height of the upright image, pixels
    duration: float  # seconds of the clip
    fps: float  # of the file, averaged
    decoded: int  # frames decoded to get these
    replaced: int = 0  # frames that could not be decoded, so that the one shown before stands in
    decoder: str = "pyav"  # what decoded them


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """Properties of a video file, found by scanning its packets and decoding its first frame."""

    duration: float  # seconds of the content
    fps: float  # averaged
    frames: int
    size: tuple[int, int]  # width and height of the upright image, pixels
    suffix: str  # the usual file suffix of this kind of container


def inspect_video(source: Source, limits: LimitsConfig | None = None) -> VideoInfo:
    """Scan a video without decoding more than its first frame.

    Raises:
        DataError: not a video, broken at the start, or beyond the limits.
    """
    film = look_at(source, limits or LimitsConfig())
    index = film.index
    return VideoInfo(index.duration, index.fps, len(index.pts), film.size, film.suffix)


def plan_video(
    source: Source,
    config: VideoConfig,
    *,
    clip: tuple[float, float] | None = None,
    sampling: Mapping[str, Any] | None = None,
    limits: LimitsConfig | None = None,
) -> VideoPlan:
    """Choose the frames of a video, or of its `clip` (seconds), from its packets and first frame.

    Raises:
        DataError: not a video, broken at the start, beyond the limits, or a clip that lies outside it.
    """
    film = look_at(source, limits or LimitsConfig())
    index = film.index
    start, end = 0.0, index.duration
    if clip is not None:
        start, end = float(clip[0]), min(float(clip[1]), index.duration)
        if not 0 <= start <= end or (start == end and index.duration > 0):
            raise DataError(f"clip {clip[0]} - {clip[1]} s does not lie in a video of {index.duration:.3f} s")
    times = TimeSampler.of(config, sampling or {}, index.fps)(end - start)
    return VideoPlan(times, index.frame_at(times + start), film.size, end - start, index.fps, film)


def decode_video(
    source: Source, plan: VideoPlan, *, side: int, decoder: str = "pyav", limits: LimitsConfig | None = None
) -> SampledVideo:
    """Decode the frames of a plan of the same source, each stretched to side x side pixels.

    Args:
        decoder: see `data/video/decoders.py`.

    Raises:
        DataError: broken, or beyond the limits.
        UserError: the decoder is not installed.
    """
    limits = limits or LimitsConfig()
    try:
        reader = frames_of(decoder, source, plan.film, limits)
        frames = _stretched(reader, plan.numbers, side)
    except ScrambledStamps:
        reader = PyAVFrames(source, plan.film.index.counted(), limits)
        frames = _stretched(reader, plan.numbers, side)
    return SampledVideo(
        frames, plan.times, plan.size, plan.duration, plan.fps, reader.decoded, reader.replaced, reader.used
    )


def _stretched(reader: Frames, numbers: np.ndarray, side: int) -> np.ndarray:
    """Frames with these numbers (not descending): uint8 [C, side, side, 3]."""
    frames = np.empty((len(numbers), side, side, 3), np.uint8)
    different, places = np.unique(numbers, return_index=True)
    ends = [*places[1:].tolist(), len(numbers)]
    for pixels, first, end in zip(reader.frames(different), places.tolist(), ends, strict=True):
        frames[first:end] = resize(pixels, side, side)
    return frames


def read_video(
    source: Source,
    config: VideoConfig,
    *,
    side: int,
    clip: tuple[float, float] | None = None,
    sampling: Mapping[str, Any] | None = None,
    limits: LimitsConfig | None = None,
) -> SampledVideo:
    """Plan and decode the sampled frames of a video, or of its `clip` (seconds), each stretched to side x side pixels.

    Raises:
        DataError: not a video, broken, beyond the limits, or a clip that lies outside it.
    """
    plan = plan_video(source, config, clip=clip, sampling=sampling, limits=limits)
    return decode_video(source, plan, side=side, decoder=config.decoder, limits=limits)
