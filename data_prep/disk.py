"""How much room a data set will take, said before it is prepared."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path

from data_prep.bringing.catalogue import load
from data_prep.media import Resolver
from data_prep.own_files import OwnRows
from data_prep.sources.base import Context, File, Inline, Media, Sample, Source, Stored
from data_prep.sources.references import parts

SAMPLED = 200  # samples whose media are measured
TEXT = 2048  # bytes of a record beside its media: JSON and tar headers


def room_line(wanted: float, basis: str, out: Path) -> str:
    """What is said of the room that a data set will take; "" where it plainly fits (less than half of what is free)."""
    there = next(folder for folder in (out, *out.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if wanted < free / 2:
        return ""
    short = "it does not fit" if wanted > free else "little is left then"
    return f"about {wanted / 1e9:,.1f} GB ({basis}); {free / 1e9:,.1f} GB are free in {there}: {short}"


def own_bytes(source: Source, found: OwnRows, resolver: Resolver) -> tuple[float, str]:
    """Bytes of a user's own data, and what that is from: the media of its first samples, of which those that several
    show count once; where the files hold the media themselves, these files."""
    rows, seen = iter(found.rows()), set[Media]()
    first = list(islice(rows, SAMPLED))
    samples = [item for item in source.records(first, Context(source.name)) if isinstance(item, Sample)]
    if any(isinstance(one, (Inline, Stored)) for sample in samples for one in sample.media):
        size = sum(path.stat().st_size for path in found.files)
        return size * len(samples) / len(first), "the size of its files"
    size = sum(TEXT + _bytes(sample, resolver, seen) for sample in samples)
    count = len(first) + sum(1 for _ in rows)
    return size * count / max(len(first), 1), f"by the first {len(first):,} of {count:,} records"


def published_bytes(name: str) -> tuple[float, str]:
    """Bytes that the media of a published data set take where they are published; 0 where that is not known."""
    catalogue = load()
    gb = [item.gb for item in catalogue.of([name])] if name in catalogue.sets else []
    return sum(size or 0.0 for size in gb) * 1e9, "the size of its archives"


def _bytes(sample: Sample, resolver: Resolver, seen: set[Media]) -> int:
    media = set(sample.media) - seen
    seen |= media
    return sum(_size(one, resolver) for one in media)


def _size(medium: Media, resolver: Resolver) -> int:
    """Of the first of its files that is there."""
    files = (resolver.local(part) for part, _ in parts(medium) if isinstance(part, File))
    return next((path.stat().st_size for path in files if path is not None), 0)
