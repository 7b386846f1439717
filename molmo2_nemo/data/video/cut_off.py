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
HEAD, TAIL = 4096, 1 << 20  # bytes that are looked at
PACK = b"\0\0\1\xba"  # begins a pack of an MPEG program stream
ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")  # begins a WMV
ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # begins what it says of the whole file


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
    """Whether the file is shorter than it says (MP4 and its like, AVI, Matroska, WMV), or ends inside a packet (MPEG,
    Ogg)."""
    if isinstance(source, bytes):
        return _ends_early(io.BytesIO(source), len(source))
    path = Path(source)
    with path.open("rb") as file:
        return _ends_early(file, path.stat().st_size)


def _ends_early(file: BinaryIO, size: int) -> bool:
    head = file.read(HEAD)
    if head[4:8] == b"ftyp":
        boxes = list(_boxes(file, size))
        return boxes[-1][1] > size or not any(kind == b"moov" for kind, _ in boxes)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return 8 + int.from_bytes(head[4:8], "little") > size
    if head[:4] == b"\x1aE\xdf\xa3":
        end = _matroska_end(head)
        return end is None or end > size
    if head[:16] == ASF:
        at = head.find(ASF_FILE) + 40  # its size; flags, of which the first says that the size is not known
        stated, flags = (int.from_bytes(head[i : i + n], "little") for i, n in ((at, 8), (at + 48, 4)))
        return ASF_FILE in head and not flags & 1 and stated > size
    for packet in (188, 192):  # of an MPEG transport stream
        if size > 4 * packet and all(head[i : i + 1] == b"G" for i in range(packet - 188, 4 * packet, packet)):
            return size % packet > 0
    file.seek(max(size - TAIL, 0))
    tail = file.read()
    return (head[:4] == PACK and _pack_end(tail) > len(tail)) or (head[:4] == b"OggS" and _page_end(tail) > len(tail))


def _pack_end(tail: bytes) -> int:
    """Where the packets of the last pack of an MPEG program stream end, in bytes; 0 where there is none."""
    at = tail.rfind(PACK)
    if not 0 <= at <= len(tail) - 14:
        return at + 14 if at >= 0 else 0
    at += 14 + (tail[at + 13] & 7) if tail[at + 4] >> 6 == 1 else 12  # of MPEG-2, of MPEG-1
    while tail[at : at + 3] == PACK[:3] and tail[at + 3 : at + 4] > PACK[3:]:
        at += 6 + int.from_bytes(tail[at + 4 : at + 6], "big")
    return at


def _page_end(tail: bytes) -> int:
    """Where the last page of an Ogg ends, in bytes; 0 where there is none."""
    at = tail.rfind(b"OggS")
    segments = tail[at + 27 : at + 27 + tail[at + 26]] if 0 <= at < len(tail) - 26 else b""
    return at + 27 + len(segments) + sum(segments) if at >= 0 else 0


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
