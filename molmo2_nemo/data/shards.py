"""Webdataset shards with a manifest, read at random without unpacking anything.

A data set is a folder of plain webdataset tars and a manifest (manifest.py), which is written last. The reader fetches
record i by its offset (shard_files.py), so training may read records in any order, resuming costs nothing, and workers
share no state.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.foreign import ForeignTexts
from molmo2_nemo.data.manifest import (
    Member,
    ShardError,
    ShardIndex,
    members_crc,
    read_index,
    without_crc,
)
from molmo2_nemo.data.objects.address import place_of
from molmo2_nemo.data.objects.files import RemoteFiles
from molmo2_nemo.data.record import BadRecord
from molmo2_nemo.data.shard_files import LocalFiles, ShardFiles, Span, kept
from molmo2_nemo.errors import DataError

BLOCK = 512  # bytes of a tar header
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


class MixedUp(ShardError):
    """A shard holds another record where the manifest lists one."""


class ShardDataset:
    """Random access to the records of one data set.

    Everything that can be checked before training is checked here: the folder, the manifest, and that every shard
        exists
    with the size it was written with (a truncated or missing shard gives one clear message).

    Args:
        path: a folder, or an address that fsspec opens (s3://bucket/set), read as data/objects/ says.
        limits: a record whose members exceed these is refused before any of it is read.
    Raises:
        ShardError: the folder, the manifest or a shard is missing, damaged or of another size.
    """

    def __init__(self, path: str | Path, name: str | None = None, limits: LimitsConfig | None = None):
        self.path = place = place_of(path)
        self.limits = limits or LimitsConfig()
        self.files: ShardFiles = LocalFiles(place) if isinstance(place, Path) else RemoteFiles(place)
        self.manifest = self.files.head(name)
        self.name: str = name or self.manifest["name"]
        self.shards: list[dict[str, Any]] = self.manifest["shards"]
        self.counted: int = self.manifest["length"]  # examples, as the mixture counts them
        self.starts: list[int] = []  # first record of each shard
        self.files.check(self.shards)
        total, digest = 0, hashlib.sha256()
        for shard in self.shards:
            self.starts.append(total)
            total += shard["records"]
            digest.update(f"{shard['name']} {shard['records']} {shard['sha256']}\n".encode())
        self.length = total
        self.texts: ForeignTexts | None = None  # of tars that another tool wrote
        if "texts" in self.manifest:
            self.texts = ForeignTexts(**self.manifest["texts"])
            digest.update(json.dumps(self.manifest["texts"], sort_keys=True).encode())
        self.fingerprint = digest.hexdigest()[:16]  # equal for the same records in the same order
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:  # workers read their own
        return {**self.__dict__, "_indexes": OrderedDict()}

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
        entries = self._index(number)
        key, members = entries[inner]
        label = f"{self.shards[number]['name']}:{key}"
        self._check_sizes(label, members)
        spans = [self._span(number, label, m) for m in members]
        try:
            result = self._members(label, key, members, spans, entries.crc(inner))
        except (BadRecord, MixedUp):
            if not self.files.forget(spans):
                raise
            result = self._members(label, key, members, spans, entries.crc(inner))
        return label, result if self.texts is None else self.texts.members(label, result)

    def _members(
        self, label: str, key: str, members: list[Member], spans: list[Span], crc: int | None
    ) -> dict[str, bytes]:
        """The bytes of a record's members, behind headers that say what the manifest says, and with its checksum."""
        result = {}
        for member, span, data in zip(members, spans, self.files.read(spans), strict=True):
            check_member(self.files.shown(span.shard), key, member, data[:BLOCK], label)
            result[member.suffix] = data[BLOCK:]
        if crc is not None and members_crc(result) != crc:
            shared = "".join(f"; its .{m.suffix} is {self._owner(m)}" for m in members if m.owner is not None)
            says = f"its contents changed: CRC-32 {members_crc(result):08x}, {crc:08x} written{shared}"
            raise _damaged(label, [m for m in members if m.owner is None] or members, says)
        return result

    def _span(self, number: int, label: str, member: Member) -> Span:
        """Where a member of a record of shard `number` lies, with its header.

        Raises:
            ShardError: a shared medium that would lie outside the data set.
        """
        if member.owner is None:
            return Span(number, member.offset - BLOCK, BLOCK + member.size)
        tar = -1 if member.shard is None else member.shard
        inside = 0 <= tar < len(self.shards)
        if not inside or not BLOCK <= member.offset <= self.shards[tar]["bytes"] - member.size:
            raise ShardError(
                f"the manifest of {self.path} is damaged: .{member.suffix} of record {label} would lie at byte "
                f"{member.offset} of shard {member.shard}, which is outside the data set"
            )
        return Span(tar, member.offset - BLOCK, BLOCK + member.size)

    def _owner(self, member: Member) -> str:
        """Where a shared medium lies, in words."""
        return f"{member.owner} of {self.shards[member.shard or 0]['name']}"

    def without_crc(self) -> int:
        """Records whose damage would not be noticed, as the manifest has no checksum of them."""
        return without_crc(self.files.manifest())

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
        for number, shard in enumerate(self.shards):
            if self.files.sha256(number) != shard["sha256"]:
                raise ShardError(f"shard {self.files.shown(number)} is damaged: its SHA-256 is not the manifest's")

    def close(self) -> None:
        """Close the cached files; reading reopens them."""
        self.files.close()

    def _index(self, number: int) -> ShardIndex:
        return kept(self._indexes, number, OPEN_INDEXES, self._load_index, lambda _: None)

    def _load_index(self, number: int) -> ShardIndex:
        try:
            return read_index(self.files.manifest(), number, self.shards[number]["records"])
        except ShardError:
            if not self.files.forget_manifest():
                raise
            return read_index(self.files.manifest(), number, self.shards[number]["records"])


def check_member(shard: Any, key: str, member: Member, header: bytes, label: str = "") -> None:
    """Compare the header (512 bytes) before a member of a shard with what the manifest lists.

    Args:
        label: "shard:key" of the record, if its medium is another record's.
    Raises:
        BadRecord: the header is damaged.
        MixedUp: it is another member's: the tar is not the one that the manifest describes.
    """
    try:
        info = check_header(header)
        found = split_name(info.name)
        wanted = split_name(member.owner) if member.owner is not None else (key, member.suffix)
    except DataError as error:
        raise _damaged(label or f"{shard.name}:{key}", [member], str(error)) from None
    if found != wanted or info.size != member.size:
        raise MixedUp(
            f"shard {shard} does not match its index: {member.name(key)} expected at byte {member.offset}, "
            f"{info.name!r} found. Was a shard renamed or written anew? See: molmo2 shards check {shard.parent}"
        )


def _damaged(label: str, members: list[Member], why: str) -> BadRecord:
    """The error about a record whose bytes are not those written; says where in the shard its members lie."""
    start, end = min(m.offset for m in members) - BLOCK, max(m.offset + m.size for m in members)
    owners = [m.owner for m in members if m.owner is not None]
    return BadRecord(
        label,
        "damaged",
        f"bytes {start} to {end} of the shard {f'of {owners[0]} ' if owners else ''}are damaged ({why}). Copy the "
        "shard again; without another copy, molmo2 shards repair keeps what is whole in it and leaves out the rest",
    )
