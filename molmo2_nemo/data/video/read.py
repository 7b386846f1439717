"""A video record's frames in two steps: a plan (which frames, at which times), and their decoding.

Times are seconds from the start of the clip, which is counted from the start of the film's first frame. A plan needs
the packets of the file and its first frame only; what an example's tokens and sizes are follows from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from molmo2_nemo.data.config import LimitsConfig, VideoConfig
from molmo2_nemo.data.image import TileGeometry
from molmo2_nemo.data.resize import patchify, resize
from molmo2_nemo.data.video.container import SUFFIX, Deadline, Source, open_video
from molmo2_nemo.data.video.frames_pyav import Frames, PyAVFrames, ScrambledStamps, reader_of, stamps_fit
from molmo2_nemo.data.video.index import VideoIndex, scan
from molmo2_nemo.data.video.orientation import frame_orientation, is_turned
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
    index: VideoIndex


@dataclass(slots=True)
class SampledVideo:
    """The sampled frames of a video, stretched to crops."""

    frames: np.ndarray  # uint8 [C, side, side, 3]
    times: np.ndarray  # float64 [C], requested seconds from the clip's start
    size: tuple[int, int]  # width and height of the upright image, pixels
    duration: float  # seconds of the clip
    fps: float  # of the file, averaged
    decoded: int  # frames decoded to get these


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """Properties of a video file, found by scanning its packets and decoding its first frame."""

    duration: float  # seconds of the content
    fps: float  # averaged
    frames: int
    size: tuple[int, int]  # width and height of the upright image, pixels
    suffix: str  # the usual file suffix of this kind of container


@dataclass(frozen=True, slots=True)
class _Look:
    """What is known of a file before frames are chosen."""

    index: VideoIndex
    size: tuple[int, int]  # width and height of the upright image, pixels
    kind: str  # of container


def _look(source: Source, limits: LimitsConfig) -> _Look:
    deadline = Deadline(limits.decode_seconds)
    with open_video(source, limits) as (container, stream):
        index = scan(container, stream, limits, deadline)
        kind = container.format.name.split(",")[0]
        doubtful = index.in_decoding_order and (stream.codec_context.has_b_frames or kind == "avi")
        if index.order == "stamps" and not doubtful:
            return _Look(index, _first_size(container, stream, index, deadline), kind)
    if index.order == "stamps":
        with open_video(source, limits) as (container, stream):
            index = index if stamps_fit(container, stream, deadline) else index.counted()
    with open_video(source, limits) as (container, stream):
        return _Look(index, _first_size(container, stream, index, deadline), kind)


def _first_size(container: Any, stream: Any, index: VideoIndex, deadline: Deadline) -> tuple[int, int]:
    first = reader_of(container, stream, index, np.zeros(1, np.int64), deadline).at(0)
    turned = is_turned(frame_orientation(first))
    return (first.height, first.width) if turned else (first.width, first.height)


def inspect_video(source: Source, limits: LimitsConfig | None = None) -> VideoInfo:
    """Scan a video without decoding more than its first frame.

    Raises:
        DataError: not a video, broken at the start, or beyond the limits.
    """
    look = _look(source, limits or LimitsConfig())
    index = look.index
    return VideoInfo(index.duration, index.fps, len(index.pts), look.size, SUFFIX.get(look.kind, look.kind))


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
    look = _look(source, limits or LimitsConfig())
    index = look.index
    start, end = 0.0, index.duration
    if clip is not None:
        start, end = float(clip[0]), min(float(clip[1]), index.duration)
        if not 0 <= start <= end or (start == end and index.duration > 0):
            raise DataError(f"clip {clip[0]} - {clip[1]} s does not lie in a video of {index.duration:.3f} s")
    times = TimeSampler.of(config, sampling or {}, index.fps)(end - start)
    return VideoPlan(times, index.frame_at(times + start), look.size, end - start, index.fps, index)


def decode_video(source: Source, plan: VideoPlan, *, side: int, limits: LimitsConfig | None = None) -> SampledVideo:
    """Decode the frames of a plan of the same source, each stretched to side x side pixels.

    Raises:
        DataError: broken, or beyond the limits.
    """
    frames = np.empty((len(plan.times), side, side, 3), np.uint8)
    decoded = _decode(source, plan, frames, lambda pixels: resize(pixels, side, side), limits)
    return SampledVideo(frames, plan.times, plan.size, plan.duration, plan.fps, decoded)


def decode_crops(
    source: Source, plan: VideoPlan, geometry: TileGeometry, out: np.ndarray, limits: LimitsConfig | None = None
) -> int:
    """Decode the frames of a plan of the same source straight to crops, uint8 `out` [C, P, D_p].

    Returns:
        How many frames were decoded for that.
    Raises:
        DataError: broken, or beyond the limits.
    """
    side, patch = geometry.crop, geometry.patch
    return _decode(source, plan, out, lambda pixels: patchify(resize(pixels, side, side)[None], patch)[0], limits)


def _decode(
    source: Source,
    plan: VideoPlan,
    out: np.ndarray,
    finish: Callable[[np.ndarray], np.ndarray],
    limits: LimitsConfig | None,
) -> int:
    """Write every frame of a plan, after `finish`, to its place in `out` [C, ...]; how many were decoded for that."""
    limits = limits or LimitsConfig()
    numbers, places = np.unique(plan.numbers, return_index=True)
    ends = [*places[1:].tolist(), len(out)]

    def write(decoder: Frames) -> int:
        for pixels, first, end in zip(decoder.frames(numbers), places.tolist(), ends, strict=True):
            out[first:end] = finish(pixels)
        return decoder.decoded

    try:
        return write(PyAVFrames(source, plan.index, limits))
    except ScrambledStamps:
        return write(PyAVFrames(source, plan.index.counted(), limits))


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
    return decode_video(source, plan, side=side, limits=limits)
