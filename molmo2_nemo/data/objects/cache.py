"""Copies of what was read from object stores, on this machine's disk, with a limit.

A file holds one span of a shard: a member of a record with its tar header. Whole shards would be the wrong unit:
records are drawn in random order from all shards of a mixture, so the first packs alone would fetch every shard they
touch. A file is named after the shard's SHA-256 and the span, so it can never be that of a shard that was replaced, and
the same shard at two addresses is kept once. It ends in a CRC-32 of its content.

Processes share a folder without knowing of each other. The bytes taken are counted in a file under a lock, before a
file is written; whoever finds the limit reached removes what was not used for the longest time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from molmo2_nemo.data.objects.traffic import counts
from molmo2_nemo.errors import UserError, file_error

TAKEN, MANIFESTS, PART = "taken", "manifests", ".part"
BLOCK = 4096  # bytes that a file's size is rounded up to on the disk
CRC = 4  # bytes
FILL = 0.9  # of the limit, after a removal
ABANDONED = 3600.0  # seconds after which a file that is still being written is nobody's


def default_folder() -> Path:
    """A folder of this user on a disk of this machine."""
    return Path(tempfile.gettempdir()) / f"molmo2-objects-{os.getuid()}"


class SpanCache:
    """Key -> bytes, in files of a folder that several processes use.

    Args:
        limit: bytes on the disk, manifests included; 0: nothing but manifests is kept.
    """

    def __init__(self, folder: str | None, limit: int):
        self.folder, self.limit = Path(folder) if folder else default_folder(), limit

    def open(self) -> None:
        """Make the folder.

        Raises:
            UserError: it cannot be made, or belongs to another user.
        """
        try:
            (self.folder / MANIFESTS).mkdir(parents=True, exist_ok=True, mode=0o700)
            if self.folder == default_folder() and self.folder.lstat().st_uid != os.getuid():
                raise UserError(f"{self.folder} belongs to another user: set data.store.cache to a folder of yours")
        except OSError as error:
            raise UserError(f"data.store.cache={self.folder}: {file_error(error)}") from None

    def get(self, key: str) -> memoryview | None:
        """The bytes kept under a key; None if there are none, or damaged ones, which are removed."""
        path = self._path(key)
        try:
            with path.open("rb", buffering=0) as file:
                data = memoryview(file.readall())
            os.utime(path)
        except OSError:
            return None
        content = data[:-CRC]
        if len(data) < CRC or zlib.crc32(content).to_bytes(CRC, "little") != data[-CRC:]:
            counts["damaged"] += 1
            self.drop(key)
            return None
        return content

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Keep bytes under a key, if the limit and the disk have room for them."""
        if self.limit and _on_disk(len(data) + CRC) <= self.limit:
            try:
                self._write(self._path(key), data, zlib.crc32(data).to_bytes(CRC, "little"))
            except OSError:
                counts["not_kept"] += 1

    def drop(self, key: str) -> None:
        with suppress(OSError):
            self._path(key).unlink()

    def manifest(self, address: str, version: str) -> Path | None:
        """The file of a manifest, if it is kept and its bytes are those that came."""
        for path in (self.folder / MANIFESTS).glob(f"{_name(address, version)}-*.parquet"):
            with suppress(OSError):
                if f"{zlib.crc32(path.read_bytes()):08x}" == path.stem.rpartition("-")[2]:
                    os.utime(path)
                    return path
                counts["damaged"] += 1
                path.unlink()
        return None

    def keep_manifest(self, address: str, version: str, data: bytes) -> Path:
        """
        Raises:
            UserError: it cannot be written.
        """
        path = self.folder / MANIFESTS / f"{_name(address, version)}-{zlib.crc32(data):08x}.parquet"
        try:
            self._write(path, data)
        except OSError as error:
            raise UserError(f"data.store.cache={self.folder}: {file_error(error)}") from None
        return path

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()[:40]
        return self.folder / name[:2] / name[2:]

    def _write(self, path: Path, *parts: bytes | memoryview) -> None:
        part = path.with_name(f"{path.name}.{os.urandom(4).hex()}{PART}")
        try:
            self._reserve(part, sum(map(len, parts)))
            with part.open("r+b", buffering=0) as file:
                for data in parts:
                    _write_all(file.fileno(), data)
            with self._locked():  # or somebody who counts would see the file twice, or not at all
                os.replace(part, path)
        except OSError:
            with suppress(OSError):
                part.unlink()
            raise

    def _reserve(self, part: Path, size: int) -> None:
        """Make an empty file of `size` bytes, after removing others if the limit asks for it."""
        part.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._locked() as counter:
            taken = int.from_bytes(os.pread(counter, 8, 0), "little") if os.fstat(counter).st_size else self._scan(None)
            if taken + _on_disk(size) > max(self.limit, 1):
                taken = self._scan(max(int(self.limit * FILL) - _on_disk(size), 0))
            with part.open("xb") as file:
                file.truncate(size)
            os.pwrite(counter, (taken + _on_disk(size)).to_bytes(8, "little"), 0)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The file that counts the bytes taken, open and locked."""
        counter = os.open(self.folder / TAKEN, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(counter, fcntl.LOCK_EX)
            yield counter
        finally:
            os.close(counter)

    def _scan(self, goal: int | None) -> int:
        """Bytes that all files take, after the removal of as many as are above `goal`, the longest unused first."""
        found = sorted(self._files())
        taken = sum(size for _, size, _ in found)
        for _, size, path in found if goal is not None else ():
            if taken <= (goal or 0):
                break
            if path.endswith(PART):  # somebody writes it
                continue
            with suppress(FileNotFoundError):
                os.unlink(path)
            taken -= size
        return taken

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """Last use, bytes on the disk, path; files that were never finished are removed."""
        for folder in os.scandir(self.folder):
            if not folder.is_dir(follow_symlinks=False) or len(folder.name) != 2 and folder.name != MANIFESTS:
                continue
            for file in os.scandir(folder.path):
                with suppress(FileNotFoundError):
                    status = file.stat(follow_symlinks=False)
                    if file.name.endswith(PART) and time.time() - status.st_mtime > ABANDONED:
                        os.unlink(file.path)
                    else:
                        yield status.st_mtime, _on_disk(status.st_size), file.path


def _write_all(file: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def _on_disk(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _name(address: str, version: str) -> str:
    return hashlib.sha256(f"{address}\0{version}".encode()).hexdigest()[:40]
