"""Videos: which times to sample, decoding just those frames, and their tokens with timestamps and subtitles.

Times are seconds from the start of the clip. Every frame is one stretched crop (no tiles, no global view) whose patches
are pooled in pool x pool windows. A file is first scanned without decoding (packet times only), so that the duration is
that of the content, whatever the header says, and every wanted frame is reached the shortest way: by decoding on from
the current position, or by seeking to the key frame before it. Besides the stretched crops at most two decoded frames
are in memory.

Shape legend: C frames (= crops), P patches per frame, D_p values per patch, N pooled tokens, K patches of a window.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from av.error import FFmpegError

from molmo2_nemo.data.config import ImageConfig, LimitsConfig, VideoConfig
from molmo2_nemo.data.image import TileGeometry, VisualInput, patchify, pool_windows, resize
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.errors import DataError, UserError

SEEK_GAP = 8  # frames; decoding on over fewer frames than this is cheaper than seeking
EDGE = 1e-6  # seconds a requested time is kept away from both ends of the stream
# Containers that hold their own media. Playlists and other formats that refer to further files are not opened.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv,asf,gif"


class SubtitleLike(Protocol):
    """One subtitle: its start and end in seconds from the start of the clip, and its text."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class TimeSampler:
    """The sampling times of a clip of a given duration.

    `uniform_last_frame`: every 1/max_fps seconds, and the end itself; if these are more than `max_frames`, then
    `max_frames` times spread evenly from start to end. `fps`: the largest of the ascending `candidate_fps` at which
    `max_frames` frames still span the clip; if none does, the first, which truncates the clip.
    """

    max_frames: int
    max_fps: float = 2.0
    mode: str = "uniform_last_frame"
    candidate_fps: tuple[float, ...] = (1.0,)

    @classmethod
    def of(cls, config: VideoConfig, sampling: Mapping[str, Any], video_fps: float) -> TimeSampler:
        """Settings of the run, overridden by a record's `sampling`.

        Keys: `mode` (or `frame_sample_mode`), `candidate_sampling_fps`, `sampling_fps`, `max_fps`, `max_frames`.
        Without candidates, `fps` tries the multiples of `sampling_fps` up to 10 that divide the video's own rate.
        """
        mode = str(sampling.get("mode", sampling.get("frame_sample_mode", "uniform_last_frame")))
        wanted = sampling.get("candidate_sampling_fps")
        if not wanted:
            step = int(sampling.get("sampling_fps") or 1)
            own = round(video_fps)
            wanted = [rate for rate in range(step, 11, step) if own % rate == 0] or [step]
        frames = min(int(sampling.get("max_frames", config.max_frames)), config.max_frames)
        rates = tuple(sorted(float(rate) for rate in wanted))
        return cls(frames, float(sampling.get("max_fps", config.max_fps)), mode, rates)

    def __call__(self, duration: float) -> np.ndarray:
        """Seconds from the clip's start: float64 [n], 1 <= n <= max_frames."""
        if self.max_frames < 1 or self.max_fps <= 0 or min(self.candidate_fps) <= 0:
            raise UserError(f"video sampling needs max_frames >= 1 and rates > 0, got {self}")
        if self.mode == "uniform_last_frame":
            if (self.max_frames - 1) / self.max_fps < duration:
                return np.linspace(0, duration, self.max_frames, endpoint=True, dtype=np.float64)
            return np.concatenate([np.arange(0, duration, 1 / self.max_fps), [duration]]).astype(np.float64)
        if self.mode == "fps":
            rate = self.candidate_fps[0]
            for candidate in self.candidate_fps:
                if self.max_frames / candidate < duration:
                    break
                rate = candidate
            times = np.arange(self.max_frames, dtype=np.float64) / rate
            return times[times < duration] if duration > 0 else times[:1]
        raise UserError(f"unknown video sampling mode {self.mode!r}; known: uniform_last_frame, fps")


def seconds_of(ticks: Any, base: Fraction) -> Any:
    """Seconds of a count of ticks (a number or an int64 array): multiplied first, then divided, as float64.

    One rounding, so that a frame at 0.5 s is at 0.5 whatever the time base; `ticks * float(base)` rounds twice, and
    with a time base such as 1/600 many frames then begin just after the time they are asked for.
    """
    return np.asarray(ticks, np.float64) * base.numerator / base.denominator


@dataclass(frozen=True)
class VideoIndex:
    """The times of a stream's frames, from a scan of its packets, in presentation order."""

    pts: np.ndarray  # int64 [frames], stream time base
    keys: np.ndarray  # int64 [key frames], their pts
    key_dts: np.ndarray  # int64 [key frames]
    base: Fraction  # seconds of one unit of pts
    end: int  # end of the last frame, stream time base

    @property
    def duration(self) -> float:
        return float(seconds_of(self.end - int(self.pts[0]), self.base))

    @property
    def fps(self) -> float:
        return len(self.pts) / self.duration if self.duration > 0 else 1.0

    def frame_at(self, seconds: np.ndarray) -> np.ndarray:
        """Numbers of the frames shown at times from the start of the first frame: int64 [n]."""
        inside = np.maximum(np.minimum(seconds, self.duration - EDGE), EDGE)
        begins = seconds_of(self.pts - self.pts[0], self.base)
        return np.clip(np.searchsorted(begins, inside, side="right") - 1, 0, len(self.pts) - 1)


class Deadline:
    """A limit on the processor time of reading one video. Wall time would make the result depend on other load."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._end = time.thread_time() + seconds

    def check(self) -> None:
        if time.thread_time() > self._end:
            raise DataError(
                f"reading the video took more than {self.seconds:g} s of processor time (data.limits.decode_seconds)"
            )


@contextmanager
def _opened(source: bytes | str | Path, limits: LimitsConfig) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; every error of the library is raised as a DataError."""
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    name = f"video of {len(source)} bytes" if isinstance(source, bytes) else f"video {source}"
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        with av.open(file, container_options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                raise DataError(f"{name} has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise DataError(f"{name} is in a format for which there is no decoder")
            _check_size(stream.codec_context.width, stream.codec_context.height, limits)
            stream.codec_context.thread_count = 1  # threads would decode frames ahead that are not wanted
            yield container, stream
    except (FFmpegError, OSError, EOFError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error  # the library's message without its error number
        raise DataError(f"cannot read {name}: {why}") from error


def _check_size(width: int, height: int, limits: LimitsConfig) -> None:
    if width * height > limits.pixels:
        raise DataError(
            f"video frames of {width} x {height} pixels; at most {limits.pixels} are read (data.limits.pixels)"
        )


def scan(container: Any, stream: Any, limits: LimitsConfig, deadline: Deadline) -> VideoIndex:
    """Read the packet times of a stream without decoding.

    Raises:
        DataError: no frames, or more frames, seconds or processor time than the limits allow.
    """
    rows: list[tuple[int, int, int]] = []  # pts, duration, dts of a key frame or -1 << 62
    none = -(1 << 62)
    for packet in container.demux(stream):
        pts = packet.pts if packet.pts is not None else packet.dts
        if pts is None or not packet.size or packet.is_discard:
            continue
        dts = packet.dts if packet.dts is not None else pts
        rows.append((pts, packet.duration or 0, dts if packet.is_keyframe else none))
        if len(rows) > limits.video_frames:
            raise DataError(f"video has more than {limits.video_frames} frames (data.limits.video_frames)")
        if len(rows) % 1024 == 0:
            deadline.check()
    if not rows:
        raise DataError("video has no frames")
    table = np.array(sorted(rows), dtype=np.int64)
    pts = np.unique(table[:, 0])
    last = int(table[-1, 1]) or (int(pts[-1] - pts[-2]) if len(pts) > 1 else 0)
    is_key = table[:, 2] != none
    if not is_key.any():
        is_key[0] = True
    key_dts = np.maximum(table[is_key, 2], -(1 << 60))
    index = VideoIndex(pts, table[is_key, 0], key_dts, Fraction(stream.time_base), int(pts[-1]) + last)
    if index.duration > limits.video_seconds:
        raise DataError(
            f"video lasts {index.duration:.0f} s; at most {limits.video_seconds:.0f} s are read "
            "(data.limits.video_seconds)"
        )
    return index


class _FrameReader:
    """Reads a stream forward, and seeks where that saves decoding. Holds at most two frames.

    Frames that are neither wanted nor needed for decoding others (about half of those in H.264 with B frames) are
    skipped; the others are the same as if all had been decoded.
    """

    def __init__(self, container: Any, stream: Any, index: VideoIndex, wanted: np.ndarray, deadline: Deadline) -> None:
        self._container, self._stream, self._index, self._deadline = container, stream, index, deadline
        self._wanted = set(index.pts[wanted].tolist())  # of every frame that will be requested
        self._frames: Iterator[Any] = iter(())
        self._last: Any = None
        self._before: Any = None
        self.decoded = 0

    def at(self, number: int) -> Any:
        """The decoded frame with this number; numbers must not decrease from call to call."""
        target = int(self._index.pts[number])
        self._jump_if_worth_it(target)
        while self._last is None or self._last.pts < target:
            if not self._step():
                break
        if self._last is None:
            raise DataError("no frame of the video could be decoded")
        # A frame that the decoder dropped is replaced by the one shown before it.
        return self._before if self._last.pts > target and self._before is not None else self._last

    def _step(self) -> bool:
        for frame in self._frames:
            if frame.pts is None:
                frame.pts = frame.dts
            if frame.pts is not None:
                self._before, self._last = self._last, frame
                self.decoded += 1
                return True
        return False

    def _jump_if_worth_it(self, target: int) -> None:
        index = self._index
        key = max(int(np.searchsorted(index.keys, target, side="right")) - 1, 0)
        if self._last is not None:
            here = int(np.searchsorted(index.pts, self._last.pts))
            if index.keys[key] <= self._last.pts or int(np.searchsorted(index.pts, index.keys[key])) - here < SEEK_GAP:
                return
        # Containers differ in which of a key frame's times they search by; some then land on the key frame after it.
        for timestamp in (index.keys[key], index.key_dts[key], min(index.key_dts[0], index.pts[0])):
            self._seek(int(timestamp))
            if self._step() and self._last.pts <= target:
                return

    def _seek(self, timestamp: int) -> None:
        try:
            self._container.seek(timestamp, stream=self._stream, backward=True)
        except FFmpegError:  # some containers cannot find their very first frame by its time
            self._container.seek(int(self._index.pts[0]), stream=self._stream, backward=True, any_frame=True)
        self._last = self._before = None
        self._frames = _decode(self._container, self._stream, self._wanted, self._deadline)


def _decode(container: Any, stream: Any, wanted: Container[int], deadline: Deadline) -> Iterator[Any]:
    """Frames from the current position on; frames not in `wanted` (pts) only if others are predicted from them."""
    for packet in container.demux(stream):
        deadline.check()
        time = packet.pts if packet.pts is not None else packet.dts
        stream.codec_context.skip_frame = "NONREF" if time is not None and time not in wanted else "DEFAULT"
        yield from packet.decode()


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


CONTAINER_SUFFIX = {"mov": "mp4", "matroska": "mkv", "mpegts": "ts", "mpeg": "mpg", "asf": "wmv", "ogg": "ogv"}


def inspect_video(source: bytes | str | Path, limits: LimitsConfig | None = None) -> VideoInfo:
    """Scan a video without decoding more than its first frame.

    Raises:
        DataError: not a video, broken at the start, or beyond the limits.
    """
    limits = limits or LimitsConfig()
    deadline = Deadline(limits.decode_seconds)
    with _opened(source, limits) as (container, stream):
        index = scan(container, stream, limits, deadline)
        first = _FrameReader(container, stream, index, np.zeros(1, np.int64), deadline).at(0)
        turned = round(first.rotation / 90) % 2 == 1
        size = (first.height, first.width) if turned else (first.width, first.height)
        kind = container.format.name.split(",")[0]
        return VideoInfo(index.duration, index.fps, len(index.pts), size, CONTAINER_SUFFIX.get(kind, kind))


def read_video(
    source: bytes | str | Path,
    config: VideoConfig,
    *,
    side: int,
    clip: tuple[float, float] | None = None,
    sampling: Mapping[str, Any] | None = None,
    limits: LimitsConfig | None = None,
) -> SampledVideo:
    """Decode the sampled frames of a video, or of its `clip` (seconds), each stretched to side x side pixels.

    Raises:
        DataError: not a video, broken, beyond the limits, or a clip that lies outside it.
    """
    limits = limits or LimitsConfig()
    deadline = Deadline(limits.decode_seconds)
    with _opened(source, limits) as (container, stream):
        index = scan(container, stream, limits, deadline)
        start, end = 0.0, index.duration
        if clip is not None:
            start, end = float(clip[0]), min(float(clip[1]), index.duration)
            if not 0 <= start <= end or (start == end and index.duration > 0):
                raise DataError(f"clip {clip[0]} - {clip[1]} s does not lie in a video of {index.duration:.3f} s")
        times = TimeSampler.of(config, sampling or {}, index.fps)(end - start)
        numbers = index.frame_at(times + start)
        reader = _FrameReader(container, stream, index, numbers, deadline)
        frames = np.empty((len(times), side, side, 3), np.uint8)
        size = (0, 0)
        for i, number in enumerate(numbers):
            if i and number == numbers[i - 1]:
                frames[i] = frames[i - 1]
                continue
            pixels = _upright(reader.at(int(number)), limits)
            size = (pixels.shape[1], pixels.shape[0])
            frames[i] = resize(pixels, side, side)
        return SampledVideo(frames, times, size, end - start, index.fps, reader.decoded)


def _upright(frame: Any, limits: LimitsConfig) -> np.ndarray:
    """RGB pixels of a decoded frame with the file's rotation applied: uint8 [H, W, 3]."""
    _check_size(frame.width, frame.height, limits)  # a stream may change its frame size midway
    pixels = frame.to_ndarray(format="rgb24")
    quarter_turns = round(frame.rotation / 90) % 4  # counter-clockwise, as np.rot90 counts
    return np.rot90(pixels, quarter_turns) if quarter_turns else pixels


def timestamp_text(number: int, seconds: float, mode: str) -> str:
    """What precedes frame `number` (from 0) in the token sequence.

    Raises:
        DataError: unknown mode.
    """
    if mode == "per-frame-compact":
        return f"{seconds:.1f} " if number == 0 else f" {seconds:.1f} "
    if mode == "per-frame":
        return f"time {seconds:.2f}"
    if mode == "numbered-frames":
        return f"{number}:"
    if mode == "none":
        return ""
    raise UserError(f"unknown video.time_mode {mode!r}; known: per-frame-compact, per-frame, numbered-frames, none")


def subtitle_text(subtitles: Sequence[SubtitleLike] | str, times: np.ndarray, mode: str) -> str:
    """The subtitle block that follows the frames: a header and one line per entry kept; "" if there are no subtitles.

    Subtitles without times are one text, which is kept whole. The mode `frame_N` keeps the entries within N seconds of
    a sampled frame.
    """
    if not subtitles or mode == "ignore":
        return ""
    near = re.fullmatch(r"frame(?:_(\d+(?:\.\d+)?))?", mode)
    if not near and mode != "all" and not re.fullmatch(r"truncate_\d+", mode):
        raise UserError(f"unknown video.subtitle_mode {mode!r}; known: frame_N, all, truncate_N, ignore")
    if isinstance(subtitles, str):
        return "subtitle\n" + subtitles
    lines = ["subtitle\n"]
    for entry in subtitles:
        if near:
            reach = float(near.group(1) or 1)
            if not np.any((entry.end >= times - reach) & (entry.start <= times + reach)):
                continue
        lines.append(f"{entry.start:.1f} - {entry.end:.1f} {entry.text}\n")
    return "".join(lines)


def subtitle_ids(
    subtitles: Sequence[SubtitleLike] | str, times: np.ndarray, config: VideoConfig, tokenizer: Molmo2Tokenizer
) -> list[int]:
    """Token ids of the subtitle block, cut to the configured length."""
    text = subtitle_text(subtitles, times, config.subtitle_mode)
    ids = tokenizer.encode(text) if text else []
    limits = [config.max_subtitle_tokens]
    if config.subtitle_mode.startswith("truncate_"):
        limits.append(int(config.subtitle_mode.removeprefix("truncate_")))
    for limit in limits:
        ids = ids if limit is None else ids[:limit]
    return ids


def video_token_ids(
    times: np.ndarray, tokens_per_frame: int, config: VideoConfig, tokenizer: Molmo2Tokenizer
) -> list[int]:
    """Timestamps, markers and patches of all frames in one of the layouts of the reference.

    `per_frame_markers`: time, start, patches, end for every frame; otherwise one start and one end around the whole
    video.
    """
    special = tokenizer.special
    start, end = (special.frame_start, special.frame_end) if config.frame_tokens else (special.im_start, special.im_end)
    patches = [special.im_patch] * tokens_per_frame
    ids: list[int] = [] if config.per_frame_markers else [start]
    for number, seconds in enumerate(times):
        text = timestamp_text(number, float(seconds), config.time_mode)
        ids += tokenizer.encode(text) if text else []
        ids += [start, *patches, end] if config.per_frame_markers else patches
    return ids if config.per_frame_markers else [*ids, end]


def encode_video(
    video: SampledVideo,
    image: ImageConfig,
    config: VideoConfig,
    tokenizer: Molmo2Tokenizer,
    *,
    subtitles: Sequence[SubtitleLike] | str = (),
) -> VisualInput:
    """Sampled frames as crops and tokens, followed by the subtitles."""
    geometry = TileGeometry.of(image)
    patches = geometry.grid**2
    first = pool_windows(np.arange(patches).reshape(geometry.grid, geometry.grid), config.pool)
    first = first.reshape(-1, config.pool**2)
    count, pooled = len(video.frames), len(first)
    offsets = (np.arange(count) * patches)[:, None, None]
    pooling = np.where(first < 0, -1, first + offsets).reshape(count * pooled, -1).astype(np.int64)
    return VisualInput(
        token_ids=video_token_ids(video.times, pooled, config, tokenizer)
        + subtitle_ids(subtitles, video.times, config, tokenizer),
        crops=patchify(video.frames, geometry.patch),
        pooling=pooling,
        unit_crops=[1] * count,
        unit_pooled_tokens=[pooled] * count,
        info={
            "frame_times": [float(t) for t in video.times],
            "size": list(video.size),
            "duration": video.duration,
            "fps": video.fps,
            "decoded_frames": video.decoded,
        },
    )
