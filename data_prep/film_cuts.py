"""Parts and thinned copies of films, frame by frame as the ffmpeg program makes them.

The published loaders of several sets read clips that scripts cut before, with `ffmpeg -ss START -i FILM -t LENGTH`, or
films that were split into pictures (`ffmpeg -i FILM frame_%05d.jpg`) and put together again from every n-th.
"""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from pathlib import Path

import numpy as np

from data_prep.encode import encode_video
from data_prep.media_kinds import NOT_FOUND, MediaError
from data_prep.sources.base import FilmFrames
from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.video.container import Source, open_video
from molmo2_nemo.data.video.film import look_at
from molmo2_nemo.data.video.frames_pyav import PyAVFrames
from molmo2_nemo.data.video.index import VideoIndex, seconds_of
from molmo2_nemo.errors import DataError
from molmo2_nemo.files import atomic

INSIDE = 0.01  # of a frame: how far inside its first and last frame a part begins and ends, whatever the rounding
MAX_REPEATS = 100_000  # pictures that a film is split into at most, beyond one per frame
MICRO = 1_000_000


def whole_frames(path: Source, start: float, end: float, limits: LimitsConfig) -> tuple[float, float]:
    """The part of a film that `ffmpeg -ss start -i film -t end-start` keeps, in seconds from its first frame.

    It begins with the first frame at or after `start`, which counts from the start of the file (sound included), and
    has the frames of the next `end - start` seconds. Both ends are moved inside these frames by a hundredth of a frame.

    Raises:
        MediaError: not a video, or no frame there.
    """
    try:
        index = look_at(path, limits).index
        origin = _file_start(path, index, limits)
    except DataError as error:
        raise MediaError("video cannot be decoded", str(error)[:300]) from None
    begin = origin + _ticks(start, index.base)
    first = int(np.searchsorted(index.pts, begin))
    if first == len(index.pts):
        raise MediaError("clip outside the video", f"{start} - {end} s of {index.duration:.3f} s")
    after = len(index.pts)
    if end < math.inf:
        after = int(np.searchsorted(index.pts, int(index.pts[first]) + _ticks(end - start, index.base)))
    after = max(after, first + 1)
    times = seconds_of(np.append(index.pts, index.end)[[first, first + 1, after - 1, after]] - index.pts[0], index.base)
    return float(times[0] + INSIDE * (times[1] - times[0])), float(times[3] - INSIDE * (times[3] - times[2]))


def _ticks(seconds: float, base: Fraction) -> int:
    """Seconds as the ffmpeg program reads them, cut to microseconds and then rounded to the stream's ticks."""
    return round(Fraction(int(Fraction(repr(float(seconds))) * MICRO), MICRO) / base)


def _file_start(path: Source, index: VideoIndex, limits: LimitsConfig) -> int:
    """The time stamp of the start of the file, of all its streams, in ticks of the video's."""
    with open_video(path, limits) as (container, _):
        start = container.start_time
    return int(index.pts[0]) if start is None else round(Fraction(start, MICRO) / index.base)


def constant_rate(index: VideoIndex, rate: Fraction, origin: int) -> np.ndarray:
    """Numbers of the frames that `ffmpeg -i film frame_%05d.jpg` writes: int64 [pictures].

    Pictures are `rate` a second. A frame that is late by more than 1.1 pictures makes the one before it, or itself, be
    written several times; one that is early by as much is left out. (After the documentation of `-fps_mode cfr` and
    the program's behaviour.)

    Args:
        origin: the time stamp of the file's start.
    """
    marks = [float(v) for v in seconds_of((np.append(index.pts, index.end) - origin), index.base) * float(rate)]
    written: list[int] = []
    for number, at in enumerate(marks[:-1]):
        lasts = round(marks[number + 1] - at) or 1
        late, count, before = at - len(written), 1, 0
        ahead = late + lasts
        if late < 0 < ahead:
            late = 0.0
        if ahead < -1.1:
            count = 0
        elif ahead > 1.1:
            count = round(ahead)
            before = min(round(late - 0.6), count) if late > 1.1 else 0
        if len(written) + count > len(index.pts) + MAX_REPEATS:
            raise MediaError("too large", f"a film whose pictures are more than its frames by {MAX_REPEATS:,}")
        written += [max(number - 1, 0)] * before + [number] * (count - before)
    return np.array(written, np.int64)


def encode_film_frames(path: Path, media: FilmFrames, cache: Path, limits: LimitsConfig) -> Path:
    """An mp4 (H.264) of every `step`-th picture of a film, encoded once and cached.

    Raises:
        MediaError: not a video, a damaged one, or no pictures left.
    """
    stat = path.stat()
    mark = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    identity = f"{mark} {media.fps} {media.step} {media.first} {media.last}"
    name = hashlib.sha256(identity.encode()).hexdigest()
    target = cache / name[:2] / f"{name}.mp4"
    if target.exists():
        return target
    try:
        index = look_at(path, limits).index
        with open_video(path, limits) as (_, stream):
            rate = Fraction(stream.guessed_rate or stream.average_rate or index.fps).limit_denominator(100_000)
        numbers = constant_rate(index, rate, _file_start(path, index, limits))
        numbers = numbers[:: media.step][media.first : None if media.last is None else media.last + 1]
        if not len(numbers):
            raise MediaError(NOT_FOUND, f"pictures {media.first} to {media.last} of {path}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic(target) as part:
            encode_video(PyAVFrames(path, index, limits).frames(numbers), part, media.fps)
    except DataError as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError("video cannot be decoded", str(error)[:300]) from None
    return target
