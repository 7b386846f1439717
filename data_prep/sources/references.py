"""Media references: the location of an image or a video. A source only names it; data_prep/media.py fetches it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from molmo2_nemo.errors import DataError


@dataclass(frozen=True, slots=True)
class Inline:
    """Encoded bytes that came with the row."""

    data: bytes
    suffix: str | None = None  # None: determined from the content


@dataclass(frozen=True, slots=True)
class Url:
    """Fetched over https, with retries, into the cache."""

    url: str
    sha256: str | None = None  # of the content, where the data set publishes it


@dataclass(frozen=True, slots=True)
class Stored:
    """A part of a file, such as a member of a tar, read where it lies."""

    path: str
    offset: int
    size: int  # bytes
    name: str  # its suffix says the kind

    @property
    def suffix(self) -> str | None:
        return PurePosixPath(self.name).suffix.lower().lstrip(".") or None

    def read(self) -> bytes:
        """The bytes.

        Raises:
            OSError: the file cannot be read.
            DataError: it ends before.
        """
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise DataError(f"{self.path} ends before byte {self.offset + self.size}")
        return data


class _Alternatives:
    """A sequence of alternatives, given as arguments; equal when all of them are."""

    __slots__ = ("_values",)

    def __init__(self, *values: Any):
        self._values = values

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._values == other._values  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((type(self), self._values))

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self._values!r}"


class File(_Alternatives):
    """A file below --source: the first of several relative paths that exists.

    A path without a known suffix matches any image or video suffix (`videos/abc` finds `videos/abc.webm`); one
    that ends in "/" is a folder, and means the only image or video in it (`videos/abc/`).
    """

    __slots__ = ()

    def __init__(self, *paths: str):
        super().__init__(*paths)

    @property
    def paths(self) -> tuple[str, ...]:
        return self._values


class Match(File):
    """As `File`, but `*` in a path stands for any text without a slash; of several files the first by name is taken.

    What comes from a row must be escaped (`glob.escape`).
    """

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a Hugging Face data set repository; read below --source (same relative path) if it is there."""

    repo: str
    path: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class ArchiveMember:
    """A member of a tar or zip archive, which is unpacked once (safely) below the cache.

    `path` may lack the suffix, as in `File`.
    """

    archive: File | HubFile | Url
    path: str


@dataclass(frozen=True, slots=True)
class Frames:
    """A folder of numbered images below --source that is encoded as a video of `fps` frames per second.

    `first` and `last` choose among the sorted images (0-based, both included) after only every `step`-th was kept.
    """

    folder: str
    fps: float
    first: int = 0
    last: int | None = None
    step: int = 1


@dataclass(frozen=True, slots=True)
class FilmFrames:
    """A film of which only some frames are kept, encoded as a video of `fps` frames per second.

    The film is first split into pictures at its own rate; `first`, `last` and `step` choose among them as in `Frames`.
    """

    video: File
    fps: float
    first: int = 0
    last: int | None = None
    step: int = 1


@dataclass(frozen=True, slots=True)
class Cut:
    """A part of a video, cut out by the framework, where the published loader expects parts cut in advance.

    With `whole_frames` it begins with the first frame at or after `start`, and its times count from that one, as in a
    part that the ffmpeg program cut out; without, with the frame shown at `start`.
    """

    video: File | HubFile | ArchiveMember | Url
    start: float  # seconds
    end: float
    whole_frames: bool = False


@dataclass(frozen=True, slots=True)
class Lettered:
    """An image with letters drawn on it by data_prep/lettering.py: AI2D asks about parts by letter."""

    image: File | HubFile | ArchiveMember
    boxes: tuple[tuple[str, float, float, float, float], ...]  # letter, left, top, right, bottom in pixels
    beside: bool = False  # translucent boxes with the letter beside, instead of opaque boxes with it inside


class FirstOf(_Alternatives):
    """The first of several media that is found, such as a video, or else the frames it is made of."""

    __slots__ = ()

    def __init__(self, *media: Media):
        super().__init__(*media)

    @property
    def media(self) -> tuple[Media, ...]:
        return self._values


@dataclass(frozen=True, slots=True)
class Prepared:
    """Media of another data set that was prepared beside this one: image number `image` of a record, or its video.

    `record` counts from 0 and is taken modulo the data set's size; see `Context.prepared`.
    """

    name: str
    record: int
    image: int = 0


Media = (
    Inline | Stored | Url | File | HubFile | ArchiveMember | Frames | FilmFrames | Prepared | Cut | Lettered | FirstOf
)


def column_media(value: Any) -> Media:
    """The media of an image or video column in undecoded form: {bytes, path}, bytes, a URL or a path.

    Raises:
        DataError: None or anything else.
    """
    if isinstance(value, dict) and value.get("bytes"):
        suffix = PurePosixPath(value.get("path") or "").suffix.lower().lstrip(".")
        return Inline(value["bytes"], suffix or None)
    if isinstance(value, (bytes, bytearray)) and value:
        return Inline(bytes(value))
    if isinstance(value, dict) and value.get("path"):
        value = value["path"]
    if isinstance(value, str) and value:
        return Url(value) if value.startswith(("https://", "http://")) else File(value)
    raise DataError(f"no image: {str(value)[:60]}")


def parts(media: Media) -> Iterator[tuple[Media, bool]]:
    """(file that a medium is made from, whether as an archive that may not have it) of all alternatives, in order."""
    if isinstance(media, FirstOf):
        for one in media.media:
            yield from parts(one)
    elif isinstance(media, (Cut, FilmFrames, Lettered)):
        yield from parts(media.image if isinstance(media, Lettered) else media.video)
    elif isinstance(media, ArchiveMember):
        yield from ((part, True) for part, _ in parts(media.archive))
    else:
        yield media, False
