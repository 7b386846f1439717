"""Whether a video file ends before what its header says, as a download that was interrupted does."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.video.container import Source, open_video
from molmo2_nemo.data.video.film import Film

LEAST, SHARE = 0.5, 0.01  # seconds, and share of the stated length, that must be missing
CLOCK = re.compile(r"(\d+):(\d+):(\d+\.?\d*)")  # of Matroska: 00:00:10.000000000
TICK = Fraction(1, 1_000_000)  # seconds of FFmpeg's times of whole files


def stated_length(source: Source, film: Film, limits: LimitsConfig) -> float | None:
    """Seconds that the header states for a film whose packets end well before; None where they do not, or where the
    header states nothing, as in MPEG streams.

    Raises:
        DataError: the file cannot be read.
    """
    index = film.index
    reached = max(index.duration, float(index.end * index.base))  # some lengths count from the clock's 0
    with open_video(source, limits) as (container, stream):
        stated = _of_stream(container, stream)
        alone = len(container.streams) == 1
        if stated is None and container.duration and container.format.name not in ("mpegts", "mpeg"):
            stated = float(container.duration * TICK)
            if not alone and _short(reached, stated) and not _short(_longest(container), stated):
                return None  # the sound is longer
    return stated if stated is not None and _short(reached, stated) else None


def _short(seconds: float, stated: float) -> bool:
    return stated - seconds > max(LEAST, SHARE * stated)


def _of_stream(container: Any, stream: Any) -> float | None:
    """What is stated for the film itself, in seconds. FFmpeg shortens the length of an AVI that is cut off."""
    if container.format.name == "avi" and stream.frames and stream.average_rate:
        return float(stream.frames / stream.average_rate)
    if stream.duration and container.format.name not in ("mpegts", "mpeg"):
        return float(stream.duration * stream.time_base)
    found = CLOCK.fullmatch(str(stream.metadata.get("DURATION", "")))
    if not found:
        return None
    hours, minutes, seconds = map(float, found.groups())
    return 3600 * hours + 60 * minutes + seconds


def _longest(container: Any) -> float:
    """When the last packet of any stream ends, in seconds from the start of the file."""
    ends = [
        float((packet.pts + (packet.duration or 0)) * packet.time_base)
        for packet in container.demux()
        if packet.pts is not None and packet.time_base
    ]
    return max(ends, default=0.0) - float((container.start_time or 0) * TICK)


def is_cut_off(source: Source) -> bool:
    """Whether the file is shorter than its own boxes or chunks say (MP4 and its like, AVI, Matroska)."""
    if isinstance(source, bytes):
        return _ends_early(io.BytesIO(source), len(source))
    path = Path(source)
    with path.open("rb") as file:
        return _ends_early(file, path.stat().st_size)


def _ends_early(file: BinaryIO, size: int) -> bool:
    head = file.read(64)
    if head[4:8] == b"ftyp":
        boxes = list(_boxes(file, size))
        return boxes[-1][1] > size or not any(kind == b"moov" for kind, _ in boxes)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return 8 + int.from_bytes(head[4:8], "little") > size
    if head[:4] == b"\x1aE\xdf\xa3":
        end = _matroska_end(head)
        return end is None or end > size
    return False


def _boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    """Kind and end (bytes from the start of the file) of each box of an MP4."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        length = int.from_bytes(head[8:16], "big") if length == 1 else length or size - at  # 0: to the end of the file
        at += max(length, 8)
        yield head[4:8], at


def _matroska_end(head: bytes) -> int | None:
    """Where the segment ends, in bytes; 0 where that is not said; None where there is no segment."""
    length, at = _matroska_number(head, 4)
    at += length
    if head[at : at + 4] != b"\x18\x53\x80\x67":
        return None if len(head) < 64 else 0
    length, begin = _matroska_number(head, at + 4)
    return 0 if length == (1 << 7 * (begin - at - 4)) - 1 else begin + length


def _matroska_number(data: bytes, at: int) -> tuple[int, int]:
    """A number of variable length, and where it ends; 0 at the end of the data."""
    first = data[at] if at < len(data) else 0x80
    width = 9 - first.bit_length()
    value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
    return value, at + width
