"""What became of every item of a source, kept beside the shards: a line an item, in the source's order, packed.

A later call reads it as a stream: which samples had media that were not there, and what the media of records were.
"""

from __future__ import annotations

import gzip
import hashlib
import heapq
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from data_prep.download import FAILED
from data_prep.media import Resolver, secure
from data_prep.sources.base import (
    File,
    Frames,
    HubFile,
    Match,
    Media,
    Sample,
    Skip,
    Url,
    unit_of,
)
from data_prep.sources.references import parts
from molmo2_nemo.files import atomic

LEDGER = "prepared.jsonl.gz"
MISSING = "missing.txt"  # media that were not found: paths below --source, a line each
MISSING_URLS = "missing_urls.txt"  # and addresses whose download failed
FRAMES = "frames:"  # before the name of a folder of frames
MATCH = "match:"  # before a path in which "*" stands for any text
WHOLE_BYTES = 2**30  # of larger files, and of archives, size and ends stand for the content
END_BYTES = 2**20
RUN_NAMES = 200_000  # names sorted in memory at once


@dataclass(frozen=True, slots=True)
class Medium:
    """A file or a folder of frames below --source, as it was when its record was prepared."""

    names: tuple[str, ...]  # the one that was found; of a missing one all that would do, or its address
    size: int = -1  # bytes; -1: missing
    mtime: int = 0  # nanoseconds
    digest: str = ""  # of the content

    @property
    def there(self) -> bool:
        return self.size >= 0

    @property
    def shown(self) -> str:
        """Its name, for messages and lists."""
        return self.names[0].removeprefix(FRAMES).removeprefix(MATCH)

    def json(self) -> list[Any]:
        return [self.names[0], self.size, self.mtime, self.digest] if self.there else [list(self.names)]

    @classmethod
    def of_json(cls, found: list[Any]) -> Medium:
        return cls((found[0],), *found[1:]) if len(found) > 1 else cls(tuple(found[0]))


@dataclass(frozen=True, slots=True)
class Line:
    """One item of the source, and what became of it."""

    mark: str  # of its key and its row
    reason: str = ""  # why it was skipped; "": it is a record
    media: tuple[Medium, ...] = ()
    notes: tuple[str, ...] = ()  # of a record, what the summary counts

    def content(self) -> bytes:
        media = [medium.json() for medium in self.media]
        return json.dumps([self.mark, self.reason, media, self.notes], separators=(",", ":")).encode() + b"\n"

    @classmethod
    def of(cls, content: bytes) -> Line:
        mark, reason, media, notes = json.loads(content)
        return cls(mark, reason, tuple(map(Medium.of_json, media)), tuple(notes))


def mark_of(item: Sample | Skip) -> str:
    """What tells an item from another in its place: 16 hex digits of its key and, in a user's own file, its row."""
    row = item.place.mark if item.place is not None else ""
    return hashlib.blake2b(f"{item.key}\0{row}".encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def is_of(line: Line, item: Sample | Skip) -> bool:
    """Whether a line is of an item. Of a user's row that could not be read the key was the number of its line, also
    where it can be read."""
    if line.mark == mark_of(item):
        return True
    place = item.place
    if place is None or not line.reason:
        return False
    return line.mark == mark_of(Skip(f"{unit_of(place.file)} {place.line}", "", place=place))


# --- the file --------------------------------------------------------------------------------------------------------


class Writer:
    """Appends lines, from byte `at` on. What stands before a `cut` stays readable whatever happens after it."""

    def __init__(self, path: Path, at: int = 0):
        self._file = path.open("ab")
        self._file.truncate(at)
        self._packer: Any = None

    def add(self, line: Line) -> None:
        if self._packer is None:
            self._packer = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS | 16)  # 16: as gzip
        self._file.write(self._packer.compress(line.content()))

    def cut(self) -> int:
        """All lines so far are on the disk; returns the size of the file."""
        if self._packer is not None:
            self._file.write(self._packer.flush())
            self._packer = None
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Lines since the last cut may be lost."""
        self._file.close()


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a ledger; of one that was not finished, those before its last cut."""
    with gzip.open(path, "rb") as file:
        try:
            yield from map(Line.of, file)
        except EOFError:
            return


# --- media -----------------------------------------------------------------------------------------------------------


def media_of(sample: Sample, resolver: Resolver) -> tuple[Medium, ...]:
    """The state of everything that a sample takes from --source. To be called before the sample's record is made: what
    changes in between is then seen as changed later."""
    media = [*sample.media, *([sample.subtitles] if isinstance(sample.subtitles, File) else [])]
    return tuple(dict.fromkeys(medium for one in media for medium in _states(one, resolver)))


def not_fetched(sample: Sample, resolver: Resolver) -> tuple[Medium, ...]:
    """The addresses that a sample needs and that are not in the cache."""
    media = [*sample.media, *([sample.subtitles] if isinstance(sample.subtitles, Url) else [])]
    urls = [part.url for one in media for part, _ in parts(one) if isinstance(part, Url)]
    return tuple(Medium((url,)) for url in urls if not resolver.downloader.place(secure(url)).exists())


def _states(media: Media, resolver: Resolver) -> Iterator[Medium]:
    """What of a medium is below --source: the first alternative, and archives that come before it; where none is, the
    names of all."""
    names: list[str] = []
    for one, archive in parts(media):
        if not isinstance(one, (File, Frames, HubFile)):
            return
        wanted = _names(one)
        found = next(filter(None, (state_of(name, resolver) for name in wanted)), None)
        if found is not None:
            yield found
        if (found is not None and not archive) or (found is None and isinstance(one, HubFile)):
            return
        names += wanted if found is None else []
    if names:
        yield Medium(tuple(names))


def _names(media: File | Frames | HubFile) -> list[str]:
    if isinstance(media, File):
        return [MATCH * isinstance(media, Match) + path for path in media.paths]
    return [FRAMES + media.folder] if isinstance(media, Frames) else [media.path]


def state_of(name: str, resolver: Resolver, before: Medium | None = None) -> Medium | None:
    """What lies below --source under a name; None if nothing does.

    Args:
        before: an earlier state; its content is taken for the same if size and time are.
    """
    try:
        if name.startswith(MATCH):
            found = resolver.matching(name.removeprefix(MATCH))
        else:
            found = resolver.below(name.removeprefix(FRAMES), folder=name.startswith(FRAMES))
        if found is None:
            return None
        path, relative = found
        size, mtime = _frames(path) if name.startswith(FRAMES) else _stat(path)
        if before is not None and (before.size, before.mtime) == (size, mtime):
            return before
        label = FRAMES + relative if name.startswith(FRAMES) else relative
        return Medium((label,), size, mtime, _digest(path, size, mtime))
    except OSError:  # as good as not there; building the record says why
        return None


def _stat(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _frames(folder: Path) -> tuple[int, int]:
    """Bytes of all files of a folder, and the sum of their times, which a change of any one of them changes."""
    stats = [entry.stat() for entry in os.scandir(folder) if entry.is_file()]
    return sum(stat.st_size for stat in stats), sum(stat.st_mtime_ns for stat in stats) % 2**62


@lru_cache(4096)
def _digest(path: Path, size: int, mtime: int) -> str:
    """32 hex digits of the content of a file, or of all files of a folder."""
    made = hashlib.blake2b(digest_size=16)
    for file in sorted(path.iterdir()) if path.is_dir() else (path,):
        if file.is_file():
            _read_into(made, file)
    return made.hexdigest()


def _read_into(made: Any, path: Path) -> None:
    size = path.stat().st_size
    made.update(f"{size} ".encode())
    archive = path.suffix.lower() in (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz")
    with path.open("rb") as file:
        if archive or size > WHOLE_BYTES:
            made.update(file.read(END_BYTES))
            file.seek(max(size - END_BYTES, 0))
        while chunk := file.read(1 << 20):
            made.update(chunk)


# --- what is missing -------------------------------------------------------------------------------------------------


def write_missing(ledger: Path, target: Callable[[str], Path]) -> list[Path]:
    """Write MISSING and MISSING_URLS from a ledger, each name once, sorted; returns the files that hold something.

    Args:
        target: the path of a file of that name.
    """
    made = []
    for name, wanted in ((MISSING, _missing_path), (MISSING_URLS, _missing_url)):
        path = target(name)
        lines = read_lines(ledger)
        names = (found for line in lines if line.reason for medium in line.media if (found := wanted(line, medium)))
        first = next(names, None)
        if first is None:
            path.unlink(missing_ok=True)
            continue
        with atomic(path) as part, part.open("w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{one}\n" for one in _sorted_once(_and(first, names)))
        made.append(path)
    return made


def _and(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest


def _missing_path(line: Line, medium: Medium) -> str:
    return "" if medium.there or _missing_url(line, medium) else medium.shown


def _missing_url(line: Line, medium: Medium) -> str:
    return medium.names[0] if line.reason == FAILED and medium.names[0].startswith(("https://", "http://")) else ""


def _sorted_once(names: Iterable[str]) -> Iterator[str]:
    """Each name once, sorted, in bounded memory."""
    with tempfile.TemporaryFile() as file:
        runs: list[tuple[int, int]] = []
        held: set[str] = set()

        def spill() -> None:
            start = file.tell()
            file.writelines(json.dumps(name).encode() + b"\n" for name in sorted(held))
            runs.append((start, file.tell()))
            held.clear()

        for name in names:
            held.add(name)
            if len(held) >= RUN_NAMES:
                spill()
        if not runs:
            yield from sorted(held)
            return
        spill()
        file.flush()
        for name, _ in groupby(heapq.merge(*(_run(file.fileno(), *run) for run in runs))):
            yield name


def _run(number: int, start: int, end: int) -> Iterator[str]:
    """The names between two places of a file."""
    rest = b""
    while start < end:
        block = os.pread(number, min(1 << 16, end - start), start)
        start += len(block)
        *lines, rest = (rest + block).split(b"\n")
        yield from (json.loads(line) for line in lines)
