"""What media are once they were found and looked at, and the error about one that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from molmo2_nemo.data.coverage import NOT_FOUND as NOT_FOUND
from molmo2_nemo.data.json_values import Fault
from molmo2_nemo.errors import DataError


class MediaError(DataError):
    """A media file cannot be used. `reason` is a short, countable text; `field` the field that names the file, where
    that is known."""

    def __init__(self, reason: str, detail: str = "", field: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.field = reason, detail, field

    def __reduce__(self):
        return type(self), (self.reason, self.detail, self.field)

    def fault(self, field: str, seen: str = "") -> Fault:
        """The error as that of the record's field that names the medium; `seen` is what the field holds."""
        seen = seen or self.detail[:200] or self.reason
        return Fault(field, seen, EXPECTED.get(self.reason, "a file that can be fetched"))


ENDS_EARLY = "films that end before the length that their header states: cut off? download them again"
ENDS_INSIDE = "films whose file ends inside a packet or before what it says: cut off? download them again"
EXPECTED = {
    NOT_FOUND: "a file that is there",
    "image cannot be decoded": "an image that training reads",
    "video cannot be decoded": "a video that training reads",
    "video cannot be re-encoded": "a video within the limits, of which a frame can be decoded",
    "too large": "a file and a picture within the limits",
    "clip outside the video": "a part of the video",
    "subtitles cannot be read": "a subtitle file: .srt, .vtt, .ass, .ssa or .json",
}


@dataclass(slots=True)
class StillImage:
    """An image that was decoded successfully: its encoded bytes, type, and size in pixels."""

    data: bytes
    suffix: str
    width: int
    height: int
    notes: tuple[str, ...] = ()  # what training does to it that its owner may not expect (pictures.py)


@dataclass(slots=True)
class Video:
    """A video whose packets were scanned and whose first frame was decoded."""

    data: bytes | Path  # a path where there is a file, as videos are large
    suffix: str
    duration: float  # seconds
    fps: float
    frames: int
    size: tuple[int, int]  # pixels
    gop: int = 1  # most frames from a key frame to the next
    part: tuple[float, float] | None = None  # (start, end) in seconds of the part that is meant; None: all of it
    notes: tuple[str, ...] = ()  # what its owner may not expect
    stated: float | None = None  # seconds that its header states, where it ends well before

    @property
    def lost(self) -> float:
        """Seconds that the header states beyond its end."""
        return max((self.stated or 0.0) - self.duration, 0.0)

    def content(self) -> bytes:
        """The encoded bytes, read if they are in a file."""
        return self.data if isinstance(self.data, bytes) else self.data.read_bytes()
