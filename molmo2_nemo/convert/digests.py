"""SHA256SUMS of a folder's weights, as `sha256sum -c SHA256SUMS` reads it: written with them, compared before they are
read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from molmo2_nemo.errors import ConversionError, read_text
from molmo2_nemo.files import write_text

DIGESTS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
READERS = 4  # threads; hashing leaves the interpreter free


def write_digests(folder: Path, files: Iterable[Path]) -> None:
    """Write the folder's DIGESTS.

    Args:
        files: of the folder.

    Raises:
        OSError: a file cannot be read, or DIGESTS not be written.
    """
    names = sorted({path.name for path in files})
    with ThreadPoolExecutor(READERS) as pool:
        sums = list(pool.map(lambda name: digest(folder / name), names))
    lines = (f"{found}  {name}\n" for found, name in zip(sums, names, strict=True))
    write_text(folder / DIGESTS, "".join(lines))


def check_digests(folder: Path, files: Iterable[Path]) -> list[str]:
    """Compare files with the folder's DIGESTS, where it has one; what could not be compared, in words.

    Args:
        files: of the folder, that are about to be read. Others that DIGESTS lists are left alone.

    Raises:
        ConversionError: a file is another than the one that was listed, or DIGESTS is damaged.
    """
    if not (folder / DIGESTS).is_file():
        return []
    listed = read_digests(folder / DIGESTS)
    paths = sorted(set(files))
    known = [path for path in paths if path.name in listed]
    with ThreadPoolExecutor(READERS) as pool:
        sums = list(pool.map(digest, known))
    for path, found in zip(known, sums, strict=True):
        if found != listed[path.name]:
            raise ConversionError(
                f"{path} is not the file that {DIGESTS} lists (SHA-256 {found[:12]}..., expected "
                f"{listed[path.name][:12]}...): it was damaged or changed since. Copy it again; if it was changed on "
                f"purpose, remove {folder / DIGESTS}"
            )
    return [f"{path.name} is not in {DIGESTS}: it was not compared" for path in paths if path.name not in listed]


def read_digests(path: Path) -> dict[str, str]:
    """File -> its SHA-256 in hexadecimal.

    Raises:
        ConversionError: a line is not of the form that sha256sum writes.
    """
    found = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        match = LINE.fullmatch(line)
        if match is None:
            raise ConversionError(f"{path}, line {number}: expected a SHA-256, two blanks and a file's name")
        found[match[2].removeprefix("./")] = match[1].lower()
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
