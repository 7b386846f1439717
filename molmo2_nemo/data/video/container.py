"""Opening a video file: which formats, which of its streams, and the limits on what is read of it."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
from av.error import FFmpegError

from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.errors import DataError

Source = bytes | str | Path  # the content of a video file, or its path

# Containers that hold their own media. Playlists and other formats that refer to further files are not opened.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv,asf,gif"
SUFFIX = {"mov": "mp4", "matroska": "mkv", "mpegts": "ts", "mpeg": "mpg", "asf": "wmv", "ogg": "ogv"}
PICTURES = (b"\xff\xd8\xff", b"\x89PNG\r\n")  # as which JPEG and PNG begin
DEFAULT = 0x1  # the bits of FFmpeg's stream dispositions that matter here
ATTACHED_PICTURE, TIMED_THUMBNAILS = 0x400, 0x800


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
def open_video(source: Source, limits: LimitsConfig) -> Iterator[tuple[Any, Any]]:
    """The container and the stream of its film; every error of the library is raised as a DataError.

    Raises:
        DataError: not a video, no film in it, no decoder for it, frames beyond the limit.
    """
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        with av.open(file, container_options=options, metadata_errors="replace") as container:
            stream = film_stream(container, name_of(source))
            check_size(stream.codec_context.width, stream.codec_context.height, limits)
            stream.codec_context.thread_count = 1  # threads would decode frames ahead that are not wanted
            yield container, stream
    except (FFmpegError, OSError, EOFError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error  # the library's message without its error number
        picture = isinstance(source, bytes) and source.startswith(PICTURES)
        hint = "; it starts as a JPEG or PNG picture does" if picture else ""
        raise DataError(f"cannot read {name_of(source)}: {why}{hint}") from error


def name_of(source: Source) -> str:
    return f"video of {len(source)} bytes" if isinstance(source, bytes) else f"video {source}"


def film_stream(container: Any, name: str) -> Any:
    """The stream that a player would show: the default one, else that with the most pixels, else the first.

    Never an attached picture (cover art) or thumbnails: these are streams of their own, and often come first.

    Raises:
        DataError: there is none, or no decoder for any.
    """
    films = [s for s in container.streams.video if not _disposition(s) & (ATTACHED_PICTURE | TIMED_THUMBNAILS)]
    known = [stream for stream in films if stream.codec_context is not None]
    if known:
        return max(known, key=lambda s: (_disposition(s) & DEFAULT, _pixels(s), -s.index))
    if films:
        raise DataError(f"{name} is in a format for which there is no decoder")
    only = "only a cover picture, no film" if container.streams.video else "no video stream"
    raise DataError(f"{name} has {only}")


def _disposition(stream: Any) -> int:
    return int(getattr(stream.disposition, "value", stream.disposition))


def _pixels(stream: Any) -> int:
    return int(stream.codec_context.width * stream.codec_context.height)


def check_size(width: int, height: int, limits: LimitsConfig) -> None:
    if width * height > limits.pixels:
        raise DataError(
            f"video frames of {width} x {height} pixels; at most {limits.pixels} are read (data.limits.pixels)"
        )
