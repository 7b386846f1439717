"""Where files are that are not where they are looked for: a folder too high or too low given as --source."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from data_prep.media import SUFFIXES
from data_prep.no_file import is_file

MOST_ENTRIES = 20_000  # looked at below each folder


def elsewhere(folders: Sequence[Path], names: Sequence[str]) -> str:
    """In words, which folder to give as --source instead, where a file of one of these names lies near; else ""."""
    for name in names:
        for folder in folders:
            found = _higher(folder, name) or _lower(folder, name)
            if found is not None:
                root = str(found)[: -len(name)].rstrip("/") if str(found).endswith("/" + name) else ""
                return f"{found} is there: give --source {root}." if root else f"{found} is there."
    return ""


def _higher(folder: Path, name: str) -> Path | None:
    """The file, if the folder given is one of those that its name begins with, or is beside it."""
    for parent in folder.resolve().parents[:3]:
        if is_file(parent / name):
            return parent / name
    return None


def _lower(folder: Path, name: str) -> Path | None:
    """A file of that base name below the folder, one whose path ends in the whole name first."""
    base, looked, other = PurePosixPath(name).name, 0, None
    wanted = {base, *(f"{base}.{suffix}" for suffix in SUFFIXES)} if base else set()
    for place, folders, files in os.walk(folder):
        folders.sort()
        looked += len(files) + len(folders)
        for file in wanted & set(files):
            path = Path(place) / file
            if str(path).endswith("/" + name):
                return path
            other = other or path
        if looked > MOST_ENTRIES:
            break
    return other
