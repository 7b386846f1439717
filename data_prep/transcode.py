"""Smaller or more accessible videos, on request: a clip's packets without re-encoding, or a re-encoded video.

Both take the frames that training takes (data/video): the same stream, order and times, turned as they are shown.
"""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.encode import Ticks, encode_video
from data_prep.media_kinds import MediaError, Video
from data_prep.probe import probe_video
from molmo2_nemo.data.config import DataConfig, LimitsConfig
from molmo2_nemo.data.tally import KINDS
from molmo2_nemo.data.video.container import open_video
from molmo2_nemo.data.video.film import Film, look_at
from molmo2_nemo.data.video.frames_pyav import PyAVFrames, ScrambledStamps
from molmo2_nemo.data.video.index import VideoIndex, seconds_of
from molmo2_nemo.errors import DataError

Clip = tuple[float, float]
KEPT_WHOLE = "films kept whole, as their packets cannot be cut to the clip without changing its frames"
REPLACED = f"{KINDS['replaced_frames'].words}; the re-encoded film has them so"
MANY_REPLACED = f"{REPLACED}, over a tenth of it: download the film again"
MANY = 0.1  # share of a re-encoded film's frames
TAIL = 1.0  # seconds kept after a clip, so that its last frame is there whatever the order of packets


def cut_packets(video: Video, clip: Clip, config: DataConfig | None = None) -> tuple[Video, Clip]:
    """A video with only the packets of a clip, from the key frame before it on, and the clip's times in the new video.

    The frames shown in the clip are the same, bit by bit. Returns the video as it is, with a note, where an mp4 cannot
    hold its packets, where these do not say when they are shown, and where nothing can be decoded from that key frame
    on, as with periodic intra refresh; and without one where the cut would not be smaller.

    Raises:
        MediaError: the cut file cannot be read.
    """
    import av

    content, limits = video.content(), (config or DataConfig()).limits
    try:
        film = look_at(content, limits)
        if film.index.order != "stamps":
            return _kept_whole(video), clip
        data, origin = _packets(content, film.index, clip, limits)
        made = look_at(data, limits)
    except (av.error.FFmpegError, DataError, ValueError, OSError):
        return _kept_whole(video), clip
    if len(data) >= len(content):
        return video, clip
    moved = _as_seen(film.index, clip, made.index, origin)
    if not _same_frames(film, clip, made, moved):
        return _kept_whole(video), clip
    return probe_video(data, "mp4", config), moved


def _kept_whole(video: Video) -> Video:
    return replace(video, notes=(*video.notes, KEPT_WHOLE))


def _as_seen(film: VideoIndex, clip: Clip, made: VideoIndex, origin: int) -> Clip:
    """The clip in a film cut at the pts `origin`, so that it shows the same frames in floating point, too.

    A sampled time may be that of a frame, or the clip's end that of a sample: then the last bit of a time decides. So
    the times next to the exact ones are tried: just as long, and with the same frames at rates of 1 to 10 a second.
    """
    shift = (origin - int(film.pts[0])) * film.base
    start, length = max(float(Fraction(clip[0]) - shift), 0.0), min(clip[1], film.duration) - clip[0]
    marks = np.unique(np.concatenate([np.arange(0, length, 1 / rate) for rate in range(1, 11)]))
    wanted = film.frame_at(marks + clip[0]) - np.searchsorted(film.pts, origin)
    other = {
        time: int(np.count_nonzero(made.frame_at(marks + time) != wanted)) for time in _next_to(start) if time >= 0
    }
    parts = [(a, b) for a in other for b in _next_to(start + length) if b - a <= length]
    return min(parts, key=lambda p: (p[1] - p[0] != length, other[p[0]], length - (p[1] - p[0]), abs(p[0] - start)))


def _next_to(time: float) -> list[float]:
    """The floating-point numbers next to a time, 8 on each side."""
    found = [time]
    for _ in range(8):
        found = [math.nextafter(found[0], -math.inf), *found, math.nextafter(found[-1], math.inf)]
    return found


def _packets(content: bytes, index: VideoIndex, clip: Clip, limits: LimitsConfig) -> tuple[bytes, int]:
    """An mp4 of the packets of a clip, and the pts of the key frame that it begins with."""
    import av

    shown = index.pts[index.frame_at(np.array(clip))]
    origin = int(index.keys[max(int(np.searchsorted(index.keys, shown[0], side="right")) - 1, 0)])
    last = int(shown[1]) + int(TAIL / index.base)
    out, begun = io.BytesIO(), False
    with open_video(content, limits) as (source, stream):  # read from its start: not every container seeks to a packet
        with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as target:
            made = target.add_stream_from_template(stream)
            for packet in source.demux(stream):
                begun = begun or packet.pts == origin
                if not begun or packet.dts is None or packet.pts is None or packet.pts < origin:
                    continue
                if packet.dts > last:
                    break
                packet.pts -= origin
                packet.dts -= origin
                packet.stream = made
                target.mux(packet)
    return out.getvalue(), origin


def _same_frames(film: Film, clip: Clip, made: Film, moved: Clip) -> bool:
    """Whether a clip of one film has as many frames, shown at the same times, as that of another, to a millisecond,
    and is as long."""
    ends = [min(part[1], index.duration) - part[0] for index, part in ((film.index, clip), (made.index, moved))]
    times = []
    for index, part in ((film.index, clip), (made.index, moved)):
        first, last = index.frame_at(np.array(part)).tolist()
        times.append(seconds_of(index.pts[first : last + 1] - index.pts[0], index.base) - part[0])
    same = len(times[0]) == len(times[1]) and bool(np.abs(times[0] - times[1]).max() < 1e-3)
    same = same and abs(ends[0] - ends[1]) < 1e-3
    return same and made.index.order == "stamps" and made.size == film.size and made.begins


@dataclass(frozen=True)
class Wanted:
    """What a re-encoded video must not exceed; 0: anything."""

    height: int = 0  # lines of the upright picture
    fps: float = 0.0  # frames per second
    gop: int = 0  # frames from one key frame to the next

    def exceeded_by(self, video: Video) -> bool:
        higher = bool(self.height) and video.size[1] > self.height
        return higher or self.slows(video) or (bool(self.gop) and video.gop > self.gop)

    def slows(self, video: Video) -> bool:
        return bool(self.fps) and video.fps > self.fps * 1.001


def reencode(
    video: Video, clip: Clip | None, wanted: Wanted, *, cut: bool, config: DataConfig | None = None
) -> tuple[Video, Clip | None]:
    """H.264 with at most the wanted lines, frames per second and frames between key frames; unchanged where it has no
    more of any. Frames keep their times unless there are too many. Where one cannot be decoded, the one shown before
    stands in, as in training, and the video gets a note.

    Args:
        cut: keep only the clip; its times then begin with 0.
        config: settings of the training that it is for; their limits hold.

    Returns:
        The video, and what of it is the clip; of a whole film that has become longer, its former length.
    Raises:
        MediaError: no frame can be decoded, or the video is beyond the limits.
    """
    cut = cut and clip is not None
    if not wanted.exceeded_by(video):
        return cut_packets(video, clip, config) if cut and clip is not None else (video, clip)
    start, end = clip if cut and clip is not None else (0.0, video.duration)
    with tempfile.TemporaryDirectory(prefix="molmo2-video-") as folder:
        path = Path(folder) / "video.mp4"
        try:
            notes = _encoded(video, (start, end), wanted, path, (config or DataConfig()).limits)
        except MediaError:
            raise
        except Exception as error:
            raise MediaError("video cannot be re-encoded", str(error)[:300]) from None
        made = probe_video(path.read_bytes(), "mp4", config)
    made = replace(made, notes=(*made.notes, *notes))
    if cut or (clip is None and made.duration > end):  # frames at another rate may last a bit longer than the film
        return made, (0.0, end - start)
    return made, clip


def _encoded(video: Video, part: Clip, wanted: Wanted, path: Path, limits: LimitsConfig) -> tuple[str, ...]:
    """Encode a part of a video to a file; what is to be said of its frames."""
    content = video.content()
    film = look_at(content, limits)
    numbers, ticks = _chosen(video, film.index, *part, wanted)

    def encode(index: VideoIndex) -> PyAVFrames:
        reader = PyAVFrames(content, index, limits)
        frames = _frames(reader, numbers, wanted.height)
        encode_video(frames, path, min(wanted.fps or video.fps, video.fps), gop=wanted.gop, ticks=ticks)
        return reader

    try:
        reader = encode(film.index)
    except ScrambledStamps:
        reader = encode(film.index.counted())
    if not reader.replaced:
        return ()
    return (MANY_REPLACED if reader.replaced > MANY * len(np.unique(numbers)) else REPLACED,)


def _chosen(video: Video, index: VideoIndex, start: float, end: float, wanted: Wanted) -> tuple[np.ndarray, Ticks]:
    """Numbers of the frames to keep, not descending, and when they are shown in a video that begins at `start`."""
    end = min(end, index.duration)
    if wanted.slows(video):
        base = 1 / Fraction(wanted.fps).limit_denominator(1001)
        count = max(int(np.ceil((end - start) / float(base) - 1e-6)), 1)
        marks = np.arange(count + 1)
        return index.frame_at(start + seconds_of(marks[:-1], base)), Ticks(base, marks)
    first, last = index.frame_at(np.array([start, end])).tolist()
    numbers = np.arange(first, last + 1)
    begin, stop = (round(Fraction(seconds) / index.base) for seconds in (start, end))
    shown = np.maximum(index.pts[numbers] - index.pts[0] - begin, np.minimum(numbers - first, 1))
    return numbers, Ticks(index.base, np.append(shown, max(stop - begin, int(shown[-1]) + 1)))


def _frames(reader: PyAVFrames, numbers: np.ndarray, height: int) -> Iterator[np.ndarray]:
    """Upright RGB frames with these numbers, scaled to at most `height` lines and to even sizes."""
    different, counts = np.unique(numbers, return_counts=True)
    for pixels, count in zip(reader.frames(different), counts.tolist(), strict=True):
        scaled = _scaled(pixels, height)
        for _ in range(count):
            yield scaled


def _scaled(pixels: np.ndarray, height: int) -> np.ndarray:
    import av

    lines, width = pixels.shape[:2]
    if not height or lines <= height:
        return pixels
    wide, high = max(2 * round(width * height / lines / 2), 2), max(height - height % 2, 2)
    frame: Any = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    return frame.reformat(width=wide, height=high, format="rgb24").to_ndarray()
