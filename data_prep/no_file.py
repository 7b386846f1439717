"""Whether there is a file, and why there is none: a folder, a broken link, a name in other letters."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path


def is_file(path: Path) -> bool:
    """Whether there is a file, or a link to one; not where the system cannot look (name too long, closed folder)."""
    try:
        return path.is_file()
    except OSError:
        return False


def why_not(path: Path) -> str:
    """In words, after a semicolon, why `path`, which is not there, may be meant; "" where nothing is known.

    A few other spellings are tried, each with one look; no folder is listed, however many files it has.
    """
    try:
        if path.is_dir():
            return "; it is a folder"
        if path.is_symlink():
            return f"; it is a link to {os.readlink(path)}, which does not exist"
        if path.exists():
            return "; it is no regular file"
    except OSError as error:
        return f"; the system says: {error.strerror}"
    other = next((name for name in _spellings(path.name) if is_file(path.with_name(name))), None)
    return "" if other is None else f"; there is {ascii(other)}: write the name as the file has it, letter by letter"


def _spellings(name: str) -> Iterator[str]:
    """The name in other cases and in the two forms of letters with accents (macOS, Linux)."""
    stem, dot, suffix = name.rpartition(".")
    cased = (name.lower(), name.upper(), f"{stem}{dot}{suffix.lower()}", f"{stem}{dot}{suffix.upper()}")
    forms = (unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
    yield from (other for other in dict.fromkeys((*cased, *forms)) if other != name)
