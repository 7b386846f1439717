"""How much of a data set's media is below --source, and which YouTube videos are not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from data_prep.download import Downloader
from data_prep.media import Resolver
from data_prep.sources.base import (
    Context,
    File,
    Frames,
    Sample,
    Source,
    convert,
)
from data_prep.sources.references import parts
from data_prep.tables import Tables

YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")


@dataclass
class Coverage:
    """What one data set wants below --source."""

    wanted: int = 0  # different images, videos or folders of frames
    there: int = 0
    missing: list[File | Frames] = field(default_factory=list)

    def words(self) -> str:
        """As "61 % of 1,234"."""
        if not self.wanted:
            return "nothing is looked for below --source"
        return f"{100 * self.there // self.wanted} % of {self.wanted:,} ({self.wanted - self.there:,} missing)"

    def youtube_ids(self) -> list[str]:
        """The ids of missing videos, each once; names that are no ids are left out."""
        return list(dict.fromkeys(filter(None, map(youtube_id, self.missing))))


def coverage(source: Source, folders: tuple[Path, ...], cache: Path, downloader: Downloader) -> Coverage:
    """Read the rows of a data set and look for everything that its samples take from --source.

    Raises:
        SourceError: the rows cannot be had.
    """
    tables = Tables(folders, downloader)
    tables.check(source)
    ctx = Context(
        source.name, tables=lambda origin: tables.rows(origin, own=False), prepared=lambda name: 0, scratch=cache
    )
    resolver, found = Resolver(folders, cache, downloader), Coverage()
    seen: set[int] = set()
    for item in convert(source, tables.rows(source.origin, source.fields), ctx):
        for media in _local(item) if isinstance(item, Sample) else ():
            mark = hash(repr(media))
            if mark in seen:
                continue
            seen.add(mark)
            found.wanted += 1
            if any(resolver.has(one) for one in media):
                found.there += 1
            else:
                found.missing.append(media[0])
    return found


def _local(sample: Sample) -> Iterator[tuple[File | Frames, ...]]:
    """The media of a sample that must be below --source; each as its alternatives."""
    for media in sample.media:
        found = list(parts(media))
        local = tuple(part for part, archive in found if not archive and isinstance(part, (File, Frames)))
        if local and len(local) == len(found):  # else `prepare` fetches it where it is not there
            yield local


def youtube_id(media: File | Frames) -> str:
    """The YouTube id in the name of a video; "" where there is none."""
    for path in media.paths if isinstance(media, File) else ():
        name = PurePosixPath(path).name
        name = name.rsplit(".", 1)[0] if name.endswith((".mp4", ".mkv", ".webm")) else name
        for stem in (name, name.removesuffix("_2fps"), name.removeprefix("v_")):
            if YOUTUBE_ID.fullmatch(stem):
                return stem
    return ""
