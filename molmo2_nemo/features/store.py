"""A folder of features, one file per crop, which several processes and runs may share.

    FOLDER/<encoder's fingerprint>-<bytes of features>/<2 hex digits>/<62 hex digits>

The name is the SHA-256 of the crop's pixels as the encoder gets them. A file holds, little-endian: the magic, a CRC-32
of all behind it, the 32 bytes of the key, the features' size, the features. Files appear whole or not at all, and are
read and written without a lock; only who counts the folder holds one (FOLDER/.counted), so that none counts while
another is given room. The folder grows to its limit and then no further: runs read their data in a new order every
epoch, so throwing out the oldest would throw out what comes next.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from molmo2_nemo.errors import DataError, file_error
from molmo2_nemo.files import atomic

MAGIC = b"molmo2f1"
HEADER = struct.Struct("<8sI32sQ")
ABANDONED = 3600.0  # seconds after which a file under its temporary name is nobody's
COUNTED = ".counted"
COUNTS = 64  # how often, about, a folder that fills up is counted by a process; at most 1 / COUNTS of it stays unused


class Damaged(DataError):
    """An entry that is not what was written; it is gone."""


def key_of(pixels: np.ndarray) -> bytes:
    """Key of a crop, 32 bytes. pixels: uint8 [P, D_p], contiguous."""
    return hashlib.sha256(pixels.data).digest()


class FeatureStore:
    """Features of one encoder, read and written by one process.

    Args:
        folder: of all encoders.
        fingerprint: of the encoder, and of all else that features follow from besides pixels.
        size: bytes of the features of one crop.
        limit: bytes of all files below the folder.
        keep_free: bytes that are left free on its disk.
        processes: that write at the same time, with the same limit. Each counts the folder again before it writes more
            than a fixed share of it, and none writes where that share would not be left for all others too: what others
            have counted and not yet written is never more.
    """

    def __init__(
        self, folder: Path, fingerprint: str, size: int, *, limit: int, keep_free: int, processes: int
    ) -> None:
        self.folder, self.size, self.limit, self.keep_free = folder, size, limit, keep_free
        self.own = folder / f"{fingerprint[:32]}-{size}"
        self.processes = max(1, processes)
        self._share = max(1, limit // (COUNTS * self.processes * (HEADER.size + size)))  # entries
        self.stopped: str | None = None  # why it grows no more
        self._granted = 0  # entries that may be written before the folder is counted again

    def path(self, key: bytes) -> Path:
        name = key.hex()
        return self.own / name[:2] / name[2:]

    def has(self, key: bytes) -> bool:
        return os.path.exists(self.path(key))  # False for what may not be looked at, too

    def read(self, key: bytes, into: np.ndarray) -> bool:
        """Fill `into`, uint8 [size]; False where there is no such entry (any more).

        Raises:
            Damaged: it was there, and is not what was written.
        """
        path = self.path(key)
        try:
            with path.open("rb", buffering=0) as file:
                head, filled = file.read(HEADER.size), _fill(file, into)
                whole = filled == self.size and not file.read(1)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise Damaged(file_error(error)) from error
        if whole and len(head) == HEADER.size:
            magic, crc, stored, size = HEADER.unpack(head)
            if (magic, stored, size) == (MAGIC, key, self.size) and crc == _crc(key, self.size, into):
                return True
        with suppress(OSError):
            path.unlink()
        raise Damaged(f"{path}: its checksum, name or size is not that of its content")

    def write(self, key: bytes, features: np.ndarray) -> int:
        """Store features, uint8 [size]; the bytes that were written: 0 where the folder has them or grows no more."""
        if self.stopped is not None or self.has(key) or not self._may_grow():
            return 0
        path = self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as part, part.open("wb") as file:
                file.write(HEADER.pack(MAGIC, _crc(key, self.size, features), key, self.size))
                file.write(features.data)
        except OSError as error:
            self.stopped = file_error(error)
            return 0
        self._granted -= 1
        return HEADER.size + self.size

    def _may_grow(self) -> bool:
        entry = HEADER.size + self.size
        try:
            if self._granted < 1:
                with self._counting():
                    room = self.limit - self.used()[0]
                if room < entry * self.processes * self._share:
                    self.stopped = f"{self.folder} has come to its limit of {self.limit:,} bytes"
                    return False
                self._granted = self._share
            if shutil.disk_usage(self.folder).free < self.keep_free + entry:
                self.stopped = f"less than {self.keep_free:,} bytes would be left free on the disk of {self.folder}"
                return False
        except OSError as error:
            self.stopped = file_error(error)
            return False
        return True

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Held by one process at a time, where the file system has locks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / COUNTED).open("ab") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def used(self) -> tuple[int, int]:
        """Bytes of all entries, and of them those of other encoders. By names alone: no file is looked at."""
        sizes = {
            folder.name: _entries(folder) * (HEADER.size + int(folder.name.rsplit("-", 1)[1]))
            for folder in _folders(self.folder)
        }
        return sum(sizes.values()), sum(size for name, size in sizes.items() if name != self.own.name)

    def sweep(self) -> None:
        """Remove what processes left under temporary names when they were killed."""
        for folder in _folders(self.folder):
            for part in folder.glob("*/.*.part"):
                with suppress(OSError):
                    if time.time() - part.stat().st_mtime > ABANDONED:
                        part.unlink()


def _fill(file: object, into: np.ndarray) -> int:
    """Read until the array is full or the file ends; bytes read."""
    view, filled = into.data, 0
    while filled < len(view) and (count := file.readinto(view[filled:])):  # type: ignore[attr-defined]
        filled += count
    return filled


def _crc(key: bytes, size: int, features: np.ndarray) -> int:
    return zlib.crc32(features.data, zlib.crc32(key + size.to_bytes(8, "little")))


def _folders(folder: Path) -> list[Path]:
    """Those of encoders; others are not ours."""
    if not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if p.name.rsplit("-", 1)[-1].isdigit() and "-" in p.name and p.is_dir()]


def _entries(folder: Path) -> int:
    found = 0
    for part in os.scandir(folder):
        with suppress(OSError):
            found += sum(not name.startswith(".") for name in os.listdir(part.path))
    return found
