"""A video record's frames in two steps: a plan (which frames, at which times), and their decoding.

Times are seconds from the start of the clip, which is counted from the start of the film's first frame. A plan needs
the packets of the file and its first frame only; what an example's tokens and sizes are follows from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from molmo2_nemo.data.config import LimitsConfig, VideoConfig
from molmo2_nemo.data.image import TileGeometry
from molmo2_nemo.data.resize import patchify, resize
from molmo2_nemo.data.video.container import Source
from molmo2_nemo.data.video.cut_off import stated_length
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


class Decoding(NamedTuple):
    """How the frames of a plan were decoded."""

    decoded: int  # frames decoded to get those of the plan
    replaced: int  # frames that could not be decoded, so that the one shown before stands in
    decoder: str

    @property
    def info(self) -> dict[str, Any]:
        """For `VisualInput.info`."""
        return {"decoded_frames": self.decoded, "replaced_frames": self.replaced, "decoder": self.decoder}


@dataclass(slots=True)
class SampledVideo:
    """The sampled frames of a video, stretched to crops."""

    frames: np.ndarray  # uint8 [C, side, side, 3]
    times: np.ndarray  # float64 [C], requested seconds from the clip's start
    size: tuple[int, int]  # width and height of the upright image, pixels
    duration: float  # seconds of the clip
    fps: float  # of the file, averaged
    decoding: Decoding


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """Properties of a video file, found by scanning its packets and decoding its first frame."""

    duration: float  # seconds of the content
    fps: float  # averaged
    frames: int
    size: tuple[int, int]  # width and height of the upright image, pixels
    suffix: str  # the usual file suffix of this kind of container
    gop: int  # most frames from a key frame to the next; all of them where none can be sought
    stated: float | None = None  # seconds that the header states, where the packets end well before


def inspect_video(source: Source, limits: LimitsConfig | None = None) -> VideoInfo:
    """Scan a video without decoding more than its first frame.

    Raises:
        DataError: not a video, broken at the start, or beyond the limits.
    """
    limits = limits or LimitsConfig()
    film = look_at(source, limits)
    index, stated = film.index, stated_length(source, film, limits)
    return VideoInfo(index.duration, index.fps, len(index.pts), film.size, film.suffix, index.gop, stated)


def clip_within(clip: tuple[float, float] | None, duration: float) -> tuple[float, float]:
    """Start and end of a clip, or of the whole video, in seconds; what of a clip lies behind the end is cut off.

    Args:
        duration: of the video, in seconds.

    Raises:
        DataError: nothing of the clip lies in the video.
    """
    if clip is None:
        return 0.0, duration
    start, end = float(clip[0]), min(float(clip[1]), duration)
    if not 0 <= start <= end or (start == end and duration > 0):
        raise DataError(f"clip {clip[0]} - {clip[1]} s does not lie in a video of {duration:.3f} s")
    return start, end


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
    start, end = clip_within(clip, index.duration)
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
    frames = np.empty((len(plan.times), side, side, 3), np.uint8)
    done = _decode(source, plan, frames, lambda pixels: resize(pixels, side, side), decoder, limits)
    return SampledVideo(frames, plan.times, plan.size, plan.duration, plan.fps, done)


def decode_crops(
    source: Source,
    plan: VideoPlan,
    geometry: TileGeometry,
    out: np.ndarray,
    *,
    decoder: str = "pyav",
    limits: LimitsConfig | None = None,
) -> Decoding:
    """Decode the frames of a plan of the same source straight to crops, uint8 `out` [C, P, D_p].

    Raises:
        DataError, UserError: as `decode_video`.
    """
    side, patch = geometry.crop, geometry.patch
    return _decode(
        source, plan, out, lambda pixels: patchify(resize(pixels, side, side)[None], patch)[0], decoder, limits
    )


def _decode(
    source: Source,
    plan: VideoPlan,
    out: np.ndarray,
    finish: Callable[[np.ndarray], np.ndarray],
    decoder: str,
    limits: LimitsConfig | None,
) -> Decoding:
    """Write every frame of a plan, after `finish`, to its place in `out` [C, ...]."""
    limits = limits or LimitsConfig()
    numbers, places = np.unique(plan.numbers, return_index=True)
    ends = [*places[1:].tolist(), len(out)]

    def write(reader: Frames) -> Decoding:
        for pixels, first, end in zip(reader.frames(numbers), places.tolist(), ends, strict=True):
            out[first:end] = finish(pixels)
        return Decoding(reader.decoded, reader.replaced, reader.used)

    try:
        return write(frames_of(decoder, source, plan.film, limits))
    except ScrambledStamps:
        return write(PyAVFrames(source, plan.film.index.counted(), limits))


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
