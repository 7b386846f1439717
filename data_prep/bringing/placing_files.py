"""From a downloaded file to its place below --source: unpacked safely, moved in steps that can be repeated."""

from __future__ import annotations

import errno
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

from data_prep.archive import ArchiveError, unpack
from data_prep.bringing.catalogue import Item
from molmo2_nemo.data.record import IMAGE_SUFFIXES, VIDEO_SUFFIXES

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
PAGES = (b"<!doctype html", b"<html")


def is_archive_name(name: str) -> bool:
    """Whether a name is that of an archive which is unpacked."""
    return name.lower().endswith(ARCHIVES)


def wrong_kind(path: Path, *, archive: bool, name: str = "") -> str:
    """Why a file cannot be what was asked for; "" if it can. Sites answer with a page when they refuse a file."""
    with path.open("rb") as file:
        head = file.read(512).lstrip()
    if head[:14].lower().startswith(PAGES):
        return "the server answered with a web page, not with the file (too many downloads of it, or a form to sign)"
    if archive and not zipfile.is_zipfile(path) and not tarfile.is_tarfile(path):
        return f"neither a zip nor a tar archive; it begins with {head[:16]!r}"
    if name.endswith(".json") and head[:1] not in (b"{", b"["):
        return f"not JSON; it begins with {head[:16]!r}"
    return ""


def place_archive(archive: Path, item: Item, into: Path, unpacked: Path) -> int:
    """Unpack into the folder `unpacked` (beside the target, on the same disk), then move everything to `into`.

    Killed at any point, the same call goes on. Files of that name are replaced.

    Returns: the number of files moved now.
    Raises:
        ArchiveError: damaged, a path that climbs, a link, or without the folder that the catalogue names.
    """
    unpack(archive, unpacked)
    return move(_base(unpacked, item, archive), into, flat=item.flat)


def _base(unpacked: Path, item: Item, archive: Path) -> Path:
    """The folder of the unpacked archive whose content is meant."""
    wanted = item.inside or item.inside_if
    if not wanted:
        return unpacked
    found = sorted((p for p in unpacked.rglob(wanted) if p.is_dir()), key=lambda p: len(p.parts))
    if found:
        return found[0]
    if item.inside_if:
        return unpacked
    top = ", ".join(sorted(p.name for p in unpacked.iterdir())[:6])
    raise ArchiveError(f"{archive}: no folder {wanted} in it (there are: {top}); the catalogue expects one")


def move(source: Path, target: Path, *, flat: bool = False) -> int:
    """Move everything in `source` into `target`, joining folders. `flat`: only media files, without their folders.

    Returns: the number of files and whole folders moved.
    """
    target.mkdir(parents=True, exist_ok=True)
    if flat:
        media = [p for p in source.rglob("*") if p.suffix.lower().lstrip(".") in IMAGE_SUFFIXES | VIDEO_SUFFIXES]
        for path in media:
            move_file(path, target / path.name)
        return len(media)
    count = 0
    for entry in sorted(source.iterdir()):
        place = target / entry.name
        if entry.is_dir() and place.is_dir():
            count += move(entry, place)
        else:
            move_file(entry, place)
            count += 1
    return count


def move_file(source: Path, target: Path) -> None:
    """Rename a file or folder, also to another disk."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.move(source, target)  # the target is a link to another disk


def join(pieces: list[Path], target: Path) -> Path:
    """One file of the pieces in this order; it has its name when it is complete. The pieces stay."""
    if not target.exists():
        part = target.with_suffix(".joining")
        with part.open("wb") as out:
            for piece in pieces:
                with piece.open("rb") as file:
                    shutil.copyfileobj(file, out, 1 << 20)
        os.replace(part, target)
    return target
