"""Where the bytes of a data set's shards come from: files of a folder. data/objects/ has the same for object stores."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from molmo2_nemo.data.manifest import MANIFEST, ShardError, file_sha256, read_head

OPEN_FILES = 16

V = TypeVar("V")


class Span(NamedTuple):
    """Bytes of a shard."""

    shard: int  # its number in the manifest
    offset: int
    size: int


class ShardFiles(Protocol):
    """The files of one data set."""

    def head(self, name: str | None) -> dict[str, Any]:
        """The checked head of the manifest. Raises ShardError, about `name` if it is given."""

    def manifest(self) -> Path:
        """A file of this machine with the manifest. Raises ShardError."""

    def check(self, shards: Sequence[dict[str, Any]]) -> None:
        """Raises ShardError: a shard of the head is missing, or has another size. To be called before `read`."""

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of each span. Raises ShardError: a shard cannot be read, or is cut off."""

    def forget(self, spans: Sequence[Span]) -> bool:
        """Whether another `read` may give other bytes, as copies of them are dropped here."""

    def forget_manifest(self) -> bool:
        """Whether the file of the manifest was a damaged copy, and `manifest` brings another."""

    def sha256(self, number: int) -> str:
        """Of a whole shard, in hexadecimal. Raises ShardError or OSError."""

    def shown(self, number: int) -> Any:
        """The shard's path or address, with `name` and `parent`, for messages."""

    def close(self) -> None:
        """Give back what is open; reading opens it again."""


def _sets(folder: Path, inside: Sequence[str]) -> str:
    """The data sets in a folder that is none itself, or how one is made."""
    if not inside:
        return "; `molmo2 prepare` makes shards of data of your own (docs/data.md)"
    more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
    return f"; data sets lie in it, each with a path of its own: {', '.join(str(folder / n) for n in inside[:3])}{more}"


class LocalFiles:
    """The files of a folder, read with `pread`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._names: list[str] = []
        self._files: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:  # workers open their own files
        return {**self.__dict__, "_files": OrderedDict()}

    def head(self, name: str | None) -> dict[str, Any]:
        label = f"data set {name!r}" if name else "data set"
        folder = self.folder
        if folder.is_file():
            what = (
                "it is one shard"
                if folder.suffix == ".tar"
                else f"molmo2 prepare {folder} --out DIR makes shards of it"
            )
            raise ShardError(f"{label}: {folder} is a file. Give the folder that holds the shards; {what}")
        if not folder.is_dir():
            raise ShardError(f"{label}: no folder at {folder}. Give the folder that holds the shards and {MANIFEST}.")
        path = folder / MANIFEST
        if not path.is_file():
            if any(folder.glob("*.tar")):
                raise ShardError(
                    f"{label}: {folder} holds shards but no {MANIFEST} (a webdataset from another tool, or from an "
                    f"older version). Index it with: molmo2 shards index {folder}"
                )
            inside = sorted(part.parent.name for part in folder.glob(f"*/{MANIFEST}"))
            raise ShardError(f"{label}: no shards at {folder} (no {MANIFEST} and no *.tar){_sets(folder, inside)}")
        return read_head(path)

    def manifest(self) -> Path:
        return self.folder / MANIFEST

    def check(self, shards: Sequence[dict[str, Any]]) -> None:
        self._names = [shard["name"] for shard in shards]
        for shard in shards:
            path = self.folder / shard["name"]
            try:
                size = path.stat().st_size
            except OSError:
                raise ShardError(missing(path, shard)) from None
            if size != shard["bytes"]:
                raise ShardError(other_size(path, shard, size))

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        return [self._pread(*span) for span in spans]

    def _pread(self, number: int, offset: int, size: int) -> bytes:
        file = kept(self._files, number, OPEN_FILES, self._open, lambda old: old.close())
        parts, left = [], size
        while left > 0:  # one call returns at most 2 GiB
            try:
                part = os.pread(file.fileno(), left, offset + size - left)
            except OSError as error:
                raise ShardError(f"shard {self.shown(number)} cannot be read: {error.strerror}") from None
            if not part:
                raise ShardError(cut_off(self.shown(number), offset + size))
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _open(self, number: int) -> Any:
        path = self.shown(number)
        try:
            return path.open("rb", buffering=0)
        except OSError as error:
            raise ShardError(f"shard {path} cannot be opened: {error.strerror}") from None

    def forget(self, spans: Sequence[Span]) -> bool:
        return False

    def forget_manifest(self) -> bool:
        return False

    def sha256(self, number: int) -> str:
        return file_sha256(self.shown(number))

    def shown(self, number: int) -> Path:
        return self.folder / self._names[number]

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()


def missing(shown: Any, shard: dict[str, Any]) -> str:
    return f"shard {shown} is missing; the manifest lists it with {shard['records']} records"


def other_size(shown: Any, shard: dict[str, Any], size: int) -> str:
    state = "cut off" if size < shard["bytes"] else "changed"
    return f"shard {shown} is {state}: it has {size} bytes, the manifest says {shard['bytes']}. Copy or write it again."


def cut_off(shown: Any, end: int) -> str:
    return f"shard {shown} is cut off: it ends before byte {end}. Copy it again."


def kept(cache: OrderedDict[int, V], key: int, limit: int, load: Callable[[int], V], drop: Callable[[V], None]) -> V:
    """The value of `key` from a least-recently-used cache of at most `limit` entries, loaded if it is not there."""
    if key in cache:
        cache.move_to_end(key)
        return cache[key]
    value = cache[key] = load(key)
    while len(cache) > limit:
        drop(cache.popitem(last=False)[1])
    return value
