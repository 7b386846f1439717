"""Unpacking archives from elsewhere safely: nothing outside the target, no links, no decompression bombs."""

from __future__ import annotations

import fcntl
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from molmo2_nemo.errors import DataError

MAX_MEMBERS = 5_000_000
MAX_BYTES = 2 * 2**40  # unpacked size of one archive
MAX_RATIO = 200  # unpacked bytes per packed byte; media hardly compress
RATIO_FROM = 64 * 2**20  # unpacked bytes above which the ratio is checked


class ArchiveError(DataError):
    """An archive is refused or damaged."""


def unpack(archive: Path, target: Path, *, max_bytes: int = MAX_BYTES) -> Path:
    """Unpack a tar (plain, gz, bz2, xz) or zip into `target`, once; the folder appears when it is complete.

    Only plain files below plain relative paths are written, without their modes and owners.

    Raises:
        ArchiveError: a member with an absolute or climbing path, a link or device, too many members or bytes, damage.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers may want the same archive
        if target.is_dir():
            return target
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            _unpack(archive, work, max_bytes)
            os.rename(work, target)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    return target


def _unpack(archive: Path, work: Path, max_bytes: int) -> None:
    packed = max(archive.stat().st_size, 1)
    total = count = 0
    try:
        for name, file in _members(archive):
            count += 1
            if count > MAX_MEMBERS:
                raise ArchiveError(f"{archive} has more than {MAX_MEMBERS} members")
            path = work / safe_name(archive, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as out:
                while chunk := file.read(1 << 20):
                    total += len(chunk)
                    if total > max_bytes or (total > RATIO_FROM and total > MAX_RATIO * packed):
                        raise ArchiveError(f"{archive} unpacks to more than {total} bytes from {packed}; it is refused")
                    out.write(chunk)
    except FileExistsError as error:
        raise ArchiveError(
            f"{archive} holds {Path(error.filename).name!r} twice, or a file in place of a folder"
        ) from None
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ArchiveError(f"{archive} is damaged or of an unknown kind: {error}") from None


def safe_name(archive: Path, name: str) -> str:
    """The relative path of a member.

    Raises:
        ArchiveError: it is absolute, climbs, or has characters that mean something to a file system.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    bad = name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or ":" in (parts or [""])[0]
    if bad or not parts:
        raise ArchiveError(f"{archive}: member {name!r} has an absolute or climbing path; nothing is unpacked")
    return "/".join(parts)


def _members(archive: Path) -> Iterator[tuple[str, BinaryIO | Any]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for entry in zipped.infolist():
                if entry.is_dir():
                    continue
                if (entry.external_attr >> 16) & 0o170000 not in (0, 0o100000):
                    raise ArchiveError(f"{archive}: member {entry.filename!r} is a link or device; nothing is unpacked")
                with zipped.open(entry) as file:
                    yield entry.filename, file
        return
    with tarfile.open(archive, "r|*") as tar:
        for info in tar:
            if info.isdir():
                continue
            if not info.isreg():
                raise ArchiveError(f"{archive}: member {info.name!r} is a link or device; nothing is unpacked")
            content = tar.extractfile(info)
            assert content is not None
            yield info.name, content
