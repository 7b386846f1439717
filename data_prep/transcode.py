"""Smaller videos, on request: a clip's packets without re-encoding, or a re-encoded video."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from data_prep.media import MediaError, Video, encode_video, probe_video
from molmo2_nemo.data.video.index import seconds_of
from molmo2_nemo.errors import DataError

Clip = tuple[float, float]
TAIL = 1.0  # seconds kept after a clip, so that its last frame is there whatever the order of packets


def cut_packets(video: Video, clip: Clip) -> tuple[Video, Clip]:
    """A video with only the packets of a clip, from the key frame before it on, and the clip's times in the new video.

    The frames shown in the clip are the same, bit by bit (a time exactly between two frames may be rounded to the other
    one, since times are shifted). Returns the video unchanged where an mp4 cannot hold its packets, or when the cut
    would not be smaller.

    Raises:
        MediaError: the cut file cannot be read.
    """
    import av

    begin = max(clip[0], 0.0)
    content, out = video.content(), io.BytesIO()
    try:
        with av.open(io.BytesIO(content), "r") as source:
            stream: Any = source.streams.video[0]
            first = float(seconds_of(stream.start_time or 0, stream.time_base))
            origin = _key_before(source, stream, first + begin)
            source.seek(origin, stream=stream, backward=True)
            with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as target:
                made = target.add_stream_from_template(stream)
                for packet in source.demux(stream):
                    if packet.dts is None or packet.pts is None or packet.pts < origin:
                        continue
                    if seconds_of(packet.dts, stream.time_base) > first + clip[1] + TAIL:
                        break
                    packet.pts -= origin
                    packet.dts -= origin
                    packet.stream = made
                    target.mux(packet)
            shift = float(seconds_of(origin, stream.time_base)) - first
    except (av.error.FFmpegError, ValueError, OSError):
        return video, clip
    data = out.getvalue()
    if len(data) >= len(content):
        return video, clip
    return probe_video(data, "mp4"), (clip[0] - shift, clip[1] - shift)


def _key_before(source: Any, stream: Any, seconds: float) -> int:
    """Timestamp of the last key frame that is shown at or before `seconds` on the stream's clock."""
    keys = [p.pts for p in source.demux(stream) if p.is_keyframe and p.pts is not None and p.size]
    before = [pts for pts in keys if seconds_of(pts, stream.time_base) <= seconds + 1e-6]
    if not keys:
        raise DataError("no key frame")
    return int(max(before) if before else min(keys))


def reencode(video: Video, clip: Clip | None, height: int, fps: float, *, cut: bool) -> tuple[Video, Clip | None]:
    """H.264 with at most `height` lines and `fps` frames per second; unchanged where it has neither more lines nor more
    frames per second.

    Args:
        cut: keep only the clip; its times then begin with 0.
    Raises:
        MediaError: a frame cannot be decoded.
    """
    smaller = bool(height) and video.size[1] > height
    slower = bool(fps) and video.fps > fps * 1.001
    if not smaller and not slower:
        return cut_packets(video, clip) if cut and clip is not None else (video, clip)
    start, end = clip if cut and clip is not None else (0.0, video.duration)
    rate = min(fps, video.fps) if fps else video.fps
    rate = float(Fraction(rate).limit_denominator(1001))
    with tempfile.TemporaryDirectory(prefix="molmo2-video-") as folder:
        path = Path(folder) / "video.mp4"
        try:
            encode_video(_frames(video, start, min(end, video.duration), rate, height), path, rate)
        except MediaError:
            raise
        except Exception as error:
            raise MediaError("video cannot be re-encoded", str(error)[:300]) from None
        made = probe_video(path.read_bytes(), "mp4")
    return made, ((0.0, end - start) if cut and clip is not None else clip)


def _frames(video: Video, start: float, end: float, rate: float, height: int) -> Iterator[Any]:
    """RGB frames shown at start, start + 1/rate, ... below `end`, scaled to at most `height` lines."""
    import av

    count = max(math.ceil((end - start) * rate - 1e-6), 1)
    with av.open(io.BytesIO(video.content()), "r") as source:
        stream: Any = source.streams.video[0]
        first = float(seconds_of(stream.start_time or 0, stream.time_base))
        number, last = 0, None
        for frame in source.decode(stream):
            if frame.pts is None:
                continue
            time = seconds_of(frame.pts, stream.time_base) - first
            while last is not None and number < count and start + number / rate < time - 1e-6:
                yield _scaled(last, height)
                number += 1
            last = frame
            if number >= count:
                return
        while last is not None and number < count:
            yield _scaled(last, height)
            number += 1


def _scaled(frame: Any, height: int) -> Any:
    import numpy as np

    width, lines = frame.width, frame.height
    if height and lines > height:
        width, lines = max(round(width * height / lines), 2), height
    pixels = frame.reformat(width=width, height=lines, format="rgb24").to_ndarray()
    turns = round(frame.rotation / 90) % 4
    return np.rot90(pixels, turns) if turns else pixels
