"""The manifest of a data set of shards: one Parquet file, a row per record, a row group per shard.

The file's metadata hold the head, a JSON object: name, number of records, length (in examples, as the mixture counts
them), the shards with their sizes and SHA-256, and where the data come from. A row gives the location of every member
of a record in its tar (of media that an earlier record shows too, in that one's) and, where measured, images, frames,
duration, and estimated tokens and crops. Pages carry checksums. The manifest is written last, so a data set that has
one is complete.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import DataError

MANIFEST = "manifest.parquet"
FORMAT = "molmo2-shards"
VERSION = 2
SHARING = 3  # version of manifests that list shared media: what reads version 2 alone refuses them by that
SHARED = "shared_media"  # in a head: {"members", "bytes"} of the media that are not written again
HEAD_KEY = b"molmo2"
MAX_HEAD_BYTES = 2**28
MEASURES = ("images", "frames", "duration", "tokens", "crops", "annotations", "crc")


class ShardError(DataError):
    """A data set cannot be opened, read or written as a whole."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where one member's bytes lie in its tar, or a shared medium's in that of the record that has it."""

    suffix: str
    offset: int  # of the data; the 512-byte header lies right before it
    size: int
    shard: int | None = None  # of a shared medium, number of its tar in the head's shards; None: the record's own tar
    owner: str | None = None  # of a shared medium, its name there

    def name(self, key: str) -> str:
        """Its name in its tar, if it belongs to the record `key`."""
        return self.owner or f"{key}.{self.suffix}"


@dataclass(slots=True)
class Entry:
    """One record as the manifest lists it; a measure that is None was not taken."""

    key: str
    members: list[Member] = field(default_factory=list)
    images: int | None = None
    frames: int | None = None  # of the video file
    duration: float | None = None  # seconds of the clip, or of the video
    tokens: int | None = None  # estimated, all branches
    crops: int | None = None  # estimated
    annotations: int | None = None
    crc: int | None = None  # CRC-32 of the members' contents in alphabetical order

    def take(self, measured: Entry) -> None:
        """Copy all measures of `measured` except the checksum."""
        for name in MEASURES:
            if name != "crc":
                setattr(self, name, getattr(measured, name))


def members_crc(members: Mapping[str, bytes]) -> int:
    """CRC-32 of a record's contents (suffix -> bytes), one after the other in alphabetical order of their suffixes."""
    crc = 0
    for suffix in sorted(members):
        crc = zlib.crc32(members[suffix], crc)
    return crc


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def renumber(listed: Iterable[Iterable[Entry]], numbers: Mapping[int, int]) -> None:
    """Give the tars of shared media their new numbers (old -> new)."""
    for entries in listed:
        for entry in entries:
            if any(m.shard is not None for m in entry.members):
                new = [m if m.shard is None else replace(m, shard=numbers[m.shard]) for m in entry.members]
                entry.members = new


def shared_head(listed: Iterable[Iterable[Entry]]) -> dict[str, Any]:
    """What a manifest's head says of shared media; nothing if there are none."""
    sizes = [m.size for entries in listed for entry in entries for m in entry.members if m.owner is not None]
    return {SHARED: {"members": len(sizes), "bytes": sum(sizes)}} if sizes else {}


class ShardIndex:
    """Keys, byte offsets and checksums of one shard's records, as arrays: a million records take tens of megabytes."""

    def __init__(self, table: Any):
        members = table["members"].combine_chunks()
        self._keys = table["key"].combine_chunks()
        self._starts = members.offsets.to_numpy()
        parts = members.values
        self._suffixes = parts.field("suffix")
        self._offsets, self._sizes = (parts.field(name).to_numpy() for name in ("offset", "size"))
        shared = parts.type.get_field_index("owner") >= 0
        self._owners: Any = parts.field("owner") if shared else None
        self._shards: Any = parts.field("shard") if shared else None
        crcs = table["crc"].combine_chunks() if "crc" in table.column_names else None
        self._crcs = None if crcs is None or crcs.null_count == len(crcs) else crcs

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, i: int) -> tuple[str, list[Member]]:
        where = range(int(self._starts[i]), int(self._starts[i + 1]))
        return self._keys[i].as_py(), [
            Member(self._suffixes[j].as_py(), int(self._offsets[j]), int(self._sizes[j]), *self._shared(j))
            for j in where
        ]

    def _shared(self, j: int) -> tuple[int, str] | tuple[()]:
        """Tar and name of a shared medium."""
        owner = None if self._owners is None else self._owners[j].as_py()
        return () if owner is None else (self._shards[j].as_py(), owner)

    def crc(self, i: int) -> int | None:
        """CRC-32 of a record's contents (`members_crc`); None where the manifest has none."""
        return None if self._crcs is None else self._crcs[i].as_py()


def write_manifest_file(path: Path, head: dict[str, Any], shards: Iterable[list[Entry]]) -> None:
    """Write a manifest file in place (callers make it atomic); `shards` yields the entries of each shard in turn. Only
    with SHARED in its head may they have shared media."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    version, fields = (SHARING, SHARED_FIELDS) if SHARED in head else (VERSION, FIELDS)
    described = {"format": FORMAT, "version": version, **head} | {"version": version}  # `head` may have been read
    schema = _schema(fields).with_metadata({HEAD_KEY: json.dumps(described)})
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for entries in shards:
            columns: dict[str, list[Any]] = {"key": [e.key for e in entries]}
            assert SHARED in head or all(m.owner is None for e in entries for m in e.members)
            columns["members"] = [[{name: getattr(m, name) for name in fields} for m in e.members] for e in entries]
            for name in MEASURES:
                columns[name] = [getattr(e, name) for e in entries]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=max(len(entries), 1))


def read_head(path: Path) -> dict[str, Any]:
    """The head of a manifest, checked.

    Raises:
        ShardError: not a manifest of this package, damaged, of another version, or naming files outside its folder.
    """
    head = _head(path)
    sharing = head.get("version") == SHARING
    if head.get("version") not in (VERSION, SHARING):
        versions = f"{VERSION} and {SHARING}"
        raise ShardError(f"{path} has version {head.get('version')!r}; this molmo2 reads versions {versions}")
    shards = head.get("shards")
    if not isinstance(shards, list) or not shards:
        raise ShardError(f"{path} lists no shards")
    fields = {"name": str, "bytes": int, "sha256": str, "records": int}
    for shard in shards:
        bad = not isinstance(shard, dict) or [f for f, kind in fields.items() if not isinstance(shard.get(f), kind)]
        if bad or shard["records"] < (0 if sharing else 1):  # one may have nothing but media of other shards' records
            raise ShardError(f"{path} has a damaged shard entry: {str(shard)[:120]}")
        if Path(shard["name"]).name != shard["name"] or shard["name"] in (".", ".."):
            raise ShardError(f"{path} names {shard['name']!r}, which is not a plain file name in its own folder")
    length = head.setdefault("length", sum(shard["records"] for shard in shards))
    if not isinstance(head.get("name"), str) or not isinstance(length, int) or length < 1:
        raise ShardError(f"{path} has a damaged head: name {head.get('name')!r}, length {length!r}")
    return head


def read_index(path: Path, number: int, records: int) -> ShardIndex:
    """The index of shard `number`, which holds `records` records.

    Raises:
        ShardError: the manifest is damaged, or disagrees with its head.
    """
    try:
        with _open(path) as file:
            index = ShardIndex(file.read_row_group(number, columns=["key", "members", "crc"], use_threads=False))
    except Exception as error:  # the library's errors have no common class
        raise ShardError(f"{path} is damaged (shard {number}): {error}") from None
    if len(index) != records:
        raise ShardError(f"{path} is damaged: shard {number} lists {len(index)} records, its head says {records}")
    return index


def without_crc(path: Path) -> int:
    """How many records of a manifest have no checksum: those of a manifest that another program wrote, or edited.

    Raises:
        ShardError: the manifest is damaged.
    """
    try:
        with _open(path) as file:
            return sum(_nulls(file.metadata.row_group(number)) for number in range(file.num_row_groups))
    except Exception as error:  # the library's errors have no common class
        raise ShardError(f"{path} is damaged: {error}") from None


def _nulls(group: Any) -> int:
    """Rows of a row group whose checksum is null, by the group's statistics; nothing of it is read."""
    for number in range(group.num_columns):
        column = group.column(number)
        if column.path_in_schema == "crc":
            statistics = column.statistics
            return int(statistics.null_count) if statistics is not None and statistics.has_null_count else 0
    return int(group.num_rows)


def read_entries(path: Path) -> Iterator[list[Entry]]:
    """All entries of a manifest, one list per shard.

    Raises:
        ShardError: the manifest is damaged.
    """
    try:
        with _open(path) as file:
            for number in range(file.num_row_groups):
                rows = file.read_row_group(number, use_threads=False).to_pylist()
                yield [Entry(**{**row, "members": [Member(**m) for m in row["members"]]}) for row in rows]
    except Exception as error:  # the library's errors have no common class
        raise ShardError(f"{path} is damaged: {error}") from None


def _open(path: Path) -> Any:
    import pyarrow.parquet as pq

    # No read-ahead threads: training reads this in forked workers.
    return pq.ParquetFile(path, memory_map=True, pre_buffer=False, page_checksum_verification=True)


def _head(path: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path).metadata or {}
        raw = metadata.get(HEAD_KEY, b"null")
        head = json.loads(raw.decode("utf-8")) if len(raw) <= MAX_HEAD_BYTES else None
    except Exception as error:
        raise ShardError(f"{path} cannot be parsed: {error}") from None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ShardError(f"{path} is not a {FORMAT} manifest")
    return head


FIELDS = ("suffix", "offset", "size")  # of a member
SHARED_FIELDS = (*FIELDS, "shard", "owner")


def _schema(fields: tuple[str, ...]) -> Any:
    import pyarrow as pa

    types = {"suffix": pa.string(), "offset": pa.int64(), "size": pa.int64(), "shard": pa.int32(), "owner": pa.string()}
    member = pa.struct([(name, types[name]) for name in fields])
    return pa.schema(
        [
            ("key", pa.string()),
            ("members", pa.list_(member)),
            ("images", pa.int32()),
            ("frames", pa.int32()),
            ("duration", pa.float64()),
            ("tokens", pa.int64()),
            ("crops", pa.int64()),
            ("annotations", pa.int32()),
            ("crc", pa.uint32()),
        ]
    )
