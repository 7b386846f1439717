"""Webdataset shards with a manifest, read at random without unpacking anything.

A data set is a folder of plain webdataset tars and a manifest (manifest.py), which is written last. The reader fetches
record i by its offset with `pread`, so training may read records in any order, resuming costs nothing, and workers
share no state.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.foreign import ForeignTexts
from molmo2_nemo.data.manifest import (
    MANIFEST,
    Member,
    ShardError,
    ShardIndex,
    members_crc,
    read_head,
    read_index,
    without_crc,
)
from molmo2_nemo.data.record import BadRecord
from molmo2_nemo.errors import DataError

BLOCK = 512  # bytes of a tar header
OPEN_FILES = 16
OPEN_INDEXES = 1024


def split_name(name: str) -> tuple[str, str]:
    """Tar member name -> (key, suffix) at the first dot of the base name, as webdataset does; suffix in lower case."""
    folder, _, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not dot or not suffix:
        raise DataError(f"member {name!r} has no suffix; records are <key>.json and <key>.<media suffix>")
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


def check_header(header: bytes) -> tarfile.TarInfo:
    """Parse one tar header and refuse everything but a plain file under a plain relative name.

    A leading `./` of the name is dropped.

    Raises:
        DataError: damaged header, link, device, folder, absolute path, `..`, or a name that is not plain ASCII.
    """
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except UnicodeDecodeError:
        raise DataError("a member name is not plain ASCII") from None
    except tarfile.HeaderError as error:
        raise DataError(f"damaged tar header ({error})") from None
    name = info.name = info.name.removeprefix("./")
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        kind = {tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link", tarfile.DIRTYPE: "a folder"}
        raise DataError(
            f"member {name!r} is {kind.get(info.type, 'not a plain file')}; only plain files are read "
            "(tar --dereference packs what links stand for)"
        )
    if not name.isascii() or not name.isprintable() or "\\" in name:
        raise DataError(f"member {name!r} has a name that is not plain ASCII")
    if name.startswith("/") or any(part in ("..", ".", "") for part in name.split("/")):
        raise DataError(f"member {name!r} has an absolute or climbing path")
    return info


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


class ShardDataset:
    """Random access to the records of one data set.

    Everything that can be checked before training is checked here: the folder, the manifest, and that every shard
        exists
    with the size it was written with (a truncated or missing shard gives one clear message).

    Args:
        limits: a record whose members exceed these is refused before any of it is read.
    Raises:
        ShardError: the folder, the manifest or a shard is missing, damaged or of another size.
    """

    def __init__(self, path: str | Path, name: str | None = None, limits: LimitsConfig | None = None):
        self.path, self.limits = Path(path), limits or LimitsConfig()
        self.manifest = _read_manifest(self.path, name)
        self.name: str = name or self.manifest["name"]
        self.shards: list[dict[str, Any]] = self.manifest["shards"]
        self.counted: int = self.manifest["length"]  # examples, as the mixture counts them
        self.starts: list[int] = []  # first record of each shard
        total, digest = 0, hashlib.sha256()
        for shard in self.shards:
            _check_shard(self.path, shard)
            self.starts.append(total)
            total += shard["records"]
            digest.update(f"{shard['name']} {shard['records']} {shard['sha256']}\n".encode())
        self.length = total
        self.texts: ForeignTexts | None = None  # of tars that another tool wrote
        if "texts" in self.manifest:
            self.texts = ForeignTexts(**self.manifest["texts"])
            digest.update(json.dumps(self.manifest["texts"], sort_keys=True).encode())
        self.fingerprint = digest.hexdigest()[:16]  # equal for the same records in the same order
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:  # workers open their own files
        return {**self.__dict__, "_files": OrderedDict(), "_indexes": OrderedDict()}

    def locate(self, index: int) -> tuple[int, int]:
        """Record number -> (shard number, number inside the shard)."""
        if not 0 <= index < self.length:
            raise IndexError(f"record {index} of data set {self.name!r}, which has {self.length}")
        low, high = 0, len(self.starts)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.starts[middle] <= index else (low, middle)
        return low, index - self.starts[low]

    def read(self, index: int) -> tuple[str, dict[str, bytes]]:
        """Record number -> ("shard:key", suffix -> bytes), as they were written: the manifest's checksum is compared.

        Raises:
            ShardError: the shard has disappeared, or is not the one that the manifest describes.
            BadRecord: members larger than the limits allow, or damaged ones.
        """
        number, inner = self.locate(index)
        shard = self.path / self.shards[number]["name"]
        entries = self._index(number)
        key, members = entries[inner]
        label = f"{shard.name}:{key}"
        self._check_sizes(label, members)
        file = self._file(number)
        result = {m.suffix: self._read_member(file, shard, key, m) for m in members}
        crc = entries.crc(inner)
        if crc is not None and members_crc(result) != crc:
            raise _damaged(label, members, f"its contents changed: CRC-32 {members_crc(result):08x}, {crc:08x} written")
        return label, result if self.texts is None else self.texts.members(label, result)

    def _read_member(self, file: Any, shard: Path, key: str, member: Member) -> bytes:
        """The bytes of one member, behind a header that says what the manifest says."""
        data = self._pread(file, shard, member.offset - BLOCK, BLOCK + member.size)
        check_member(shard, key, member, data[:BLOCK])
        return data[BLOCK:]

    def without_crc(self) -> int:
        """Records whose damage would not be noticed, as the manifest has no checksum of them."""
        return without_crc(self.path / MANIFEST)

    def _check_sizes(self, label: str, members: list[Member]) -> None:
        limits, total = self.limits, sum(member.size for member in members)
        text = sum(member.size for member in members if member.suffix == "json")
        if any(member.size < 0 for member in members):
            raise BadRecord(label, "too large", "a member has a negative size in the manifest")
        if text > limits.json_bytes:
            raise BadRecord(
                label, "too large", f".json: {text} bytes, {limits.json_bytes} allowed (data.limits.json_bytes)"
            )
        if total > limits.record_bytes:
            raise BadRecord(
                label,
                "too large",
                f"{len(members)} members, {total} bytes; {limits.record_bytes} allowed (data.limits.record_bytes)",
            )

    def verify(self) -> None:
        """Read every shard and compare its SHA-256 with the manifest (slow, so training does not do it)."""
        for shard in self.shards:
            found = file_sha256(self.path / shard["name"])
            if found != shard["sha256"]:
                raise ShardError(f"shard {self.path / shard['name']} is damaged: its SHA-256 is not the manifest's")

    def close(self) -> None:
        """Close the cached files; reading reopens them."""
        while self._files:
            self._files.popitem()[1].close()

    def _file(self, number: int) -> Any:
        return _cached(self._files, number, OPEN_FILES, self._open, lambda file: file.close())

    def _open(self, number: int) -> Any:
        path = self.path / self.shards[number]["name"]
        try:
            return path.open("rb", buffering=0)
        except OSError as error:
            raise ShardError(f"shard {path} cannot be opened: {error.strerror}") from None

    def _index(self, number: int) -> ShardIndex:
        return _cached(self._indexes, number, OPEN_INDEXES, self._load_index, lambda _: None)

    def _load_index(self, number: int) -> ShardIndex:
        return read_index(self.path / MANIFEST, number, self.shards[number]["records"])

    @staticmethod
    def _pread(file: Any, shard: Path, offset: int, size: int) -> bytes:
        parts, left = [], size
        while left > 0:  # one call returns at most 2 GiB
            try:
                part = os.pread(file.fileno(), left, offset + size - left)
            except OSError as error:
                raise ShardError(f"shard {shard} cannot be read: {error.strerror}") from None
            if not part:
                raise ShardError(f"shard {shard} is cut off: it ends before byte {offset + size}. Copy it again.")
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def check_member(shard: Path, key: str, member: Member, header: bytes) -> None:
    """Compare the header (512 bytes) before a member of a shard with what the manifest lists.

    Raises:
        BadRecord: the header is damaged.
        ShardError: it is another member's: the tar is not the one that the manifest describes.
    """
    try:
        info = check_header(header)
        found = split_name(info.name)
    except DataError as error:
        raise _damaged(f"{shard.name}:{key}", [member], str(error)) from None
    if found != (key, member.suffix) or info.size != member.size:
        raise ShardError(
            f"shard {shard} does not match its index: {key}.{member.suffix} expected at byte {member.offset}, "
            f"{info.name!r} found. Was a shard renamed or written anew? See: molmo2 shards check {shard.parent}"
        )


def _damaged(label: str, members: list[Member], why: str) -> BadRecord:
    """The error about a record whose bytes are not those written; says where in the shard its members lie."""
    start, end = min(m.offset for m in members) - BLOCK, max(m.offset + m.size for m in members)
    return BadRecord(
        label,
        "damaged",
        f"bytes {start} to {end} of the shard are damaged ({why}). Copy the shard again; without another copy, "
        "molmo2 shards repair keeps what is whole in it and leaves out the rest",
    )


def _cached(
    cache: OrderedDict[int, Any], key: int, limit: int, load: Callable[[int], Any], drop: Callable[[Any], None]
) -> Any:
    """The value of `key` from a least-recently-used cache of at most `limit` entries, loaded if it is not there."""
    if key in cache:
        cache.move_to_end(key)
        return cache[key]
    value = cache[key] = load(key)
    while len(cache) > limit:
        drop(cache.popitem(last=False)[1])
    return value


def _read_manifest(folder: Path, name: str | None) -> dict[str, Any]:
    label = f"data set {name!r}" if name else "data set"
    if not folder.is_dir():
        raise ShardError(f"{label}: no folder at {folder}. Give the folder that holds the shards and {MANIFEST}.")
    path = folder / MANIFEST
    if not path.is_file():
        if any(folder.glob("*.tar")):
            raise ShardError(
                f"{label}: {folder} holds shards but no {MANIFEST} (a webdataset from another tool, or from an older "
                f"version). Index it with: molmo2 shards index {folder}"
            )
        raise ShardError(f"{label}: no shards at {folder} (no {MANIFEST} and no *.tar)")
    return read_head(path)


def _check_shard(folder: Path, shard: dict[str, Any]) -> None:
    path = folder / shard["name"]
    try:
        size = path.stat().st_size
    except OSError:
        raise ShardError(f"shard {path} is missing; the manifest lists it with {shard['records']} records") from None
    if size != shard["bytes"]:
        state = "cut off" if size < shard["bytes"] else "changed"
        raise ShardError(
            f"shard {path} is {state}: it has {size} bytes, the manifest says {shard['bytes']}. Copy or write it again."
        )
