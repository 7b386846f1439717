"""The records of a webdataset tar that another tool may have written: one scan of its headers."""

from __future__ import annotations

import mmap
import re
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from molmo2_nemo.data.json_values import Fault
from molmo2_nemo.data.manifest import Member, ShardError
from molmo2_nemo.data.record import BadRecord
from molmo2_nemo.data.shards import BLOCK, check_header, split_name
from molmo2_nemo.errors import DataError

META = re.compile(r"__[^/]*__($|/)")  # names that webdataset keeps for itself
MAGIC, MAGIC_AT = b"ustar", 257  # of a tar header, and where in it
PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")
EXTENDED = frozenset({b"path", b"size"})  # what the plain header does not say, then


def index_tar(
    path: Path, bad: dict[str, BadRecord] | None = None, passed: Counter[str] | None = None
) -> list[tuple[str, list[Member]]]:
    """Scan a webdataset tar once: its records in order, with the offsets of their members.

    What the webdataset library passes over is passed over here: folders, names that begin with a dot or have none, and
    names like `__this__`.

    Args:
        bad: gets the keys of records that cannot be read, with their errors; None: those are an error.
        passed: gets the kinds of what is passed over, with their numbers.
    Raises:
        ShardError: hostile or damaged content, a cut file, a compressed tar, or (without `bad`) duplicate names.
    """
    size = path.stat().st_size
    records: OrderedDict[str, list[Member]] = OrderedDict()
    wrong: dict[str, BadRecord] = {}
    last_key = None
    with path.open("rb") as file:
        for header, offset in _headers(path, file, size):
            try:
                if kind := _passed_over(header):
                    if passed is not None:
                        passed[kind] += 1
                    continue
                info = check_header(header)
                key, suffix = split_name(info.name)
            except DataError as error:
                raise ShardError(f"shard {path}: {error}") from None
            if offset + info.size > size:
                raise ShardError(
                    f"shard {path} is cut off: member {info.name!r} ends at byte {offset + info.size}, "
                    f"the file has {size}. Copy or write it again."
                )
            if key != last_key and key in records:
                says = f"the key {key!r} appears twice (members of a record must be adjacent)"
                wrong.setdefault(key, _twice(path, key, suffix, says))
            members = records.setdefault(key, [])
            if any(m.suffix == suffix for m in members):
                wrong.setdefault(key, _twice(path, key, suffix, f"the member {info.name!r} appears twice"))
            members.append(Member(suffix, offset, info.size))
            last_key = key
    if wrong and bad is None:
        raise ShardError(f"shard {path}: {next(iter(wrong.values())).detail}")
    if bad is not None:
        bad.update(wrong)
    if not records:
        raise ShardError(f"shard {path} holds no record")
    return [(key, members) for key, members in records.items() if key not in wrong]


def salvage_tar(path: Path) -> dict[str, list[Member]]:
    """Every member whose header is whole anywhere in a file, by key: of a tar with bytes inserted, removed or zeroed,
    also behind the damage. Nothing says that its contents are whole; of members of one name the first counts."""
    found: dict[str, dict[str, Member]] = {}
    size = path.stat().st_size
    if size < BLOCK:
        return {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(MAGIC)
        while at >= 0:
            start = at - MAGIC_AT
            try:
                info = check_header(content[start : start + BLOCK]) if start >= 0 else None
                if info is not None and start + BLOCK + info.size <= size:
                    key, suffix = split_name(info.name)
                    found.setdefault(key, {}).setdefault(suffix, Member(suffix, start + BLOCK, info.size))
            except DataError:
                pass  # no header
            at = content.find(MAGIC, at + 1)
    return {key: list(members.values()) for key, members in found.items()}


def _twice(path: Path, key: str, suffix: str, says: str) -> BadRecord:
    fault = Fault("", f"{key}.{suffix} again", "one record of that key, its members adjacent and each once")
    return BadRecord(f"{path.name}:{key}", "bad record", says, fault, suffix)


def _passed_over(header: bytes) -> str:
    """The kind of a member that belongs to no record, as the webdataset library sees it; "" for all others.

    Raises:
        DataError: the header is damaged.
    """
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DataError(f"damaged tar header ({error})") from None
    name = info.name.removeprefix("./")
    base = name.rpartition("/")[2]
    if info.isdir():
        return "folders"
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return ""
    if META.match(name):
        return "meta data"
    return "hidden files" if base.startswith(".") else "" if "." in base[:-1] else "files without a suffix"


def _headers(path: Path, file: Any, size: int) -> Iterator[tuple[bytes, int]]:
    """Headers of the members with the offset of their data; extended headers (PAX) are skipped."""
    position = 0
    while position + BLOCK <= size:
        file.seek(position)
        header = file.read(BLOCK)
        if header.count(0) == BLOCK:
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ShardError(
                f"shard {path}: no tar header at byte {position} ({error}); shards are plain, uncompressed tars"
            ) from None
        if info.size < 0:
            raise ShardError(f"shard {path}: negative size at byte {position}")
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            raise ShardError(f"shard {path}: a member name is longer than 100 characters; use shorter keys")
        if info.type not in (tarfile.XHDTYPE, tarfile.XGLTYPE):
            yield header, position + BLOCK
        elif changed := EXTENDED & _extended(file.read(min(info.size, 65536))):
            name = min(changed).decode()
            raise ShardError(
                f"shard {path}: a member's {name} is in an extended header (at byte {position}): a name beyond 100 "
                "characters or plain ASCII, or a file beyond 8 GiB; use short ASCII keys and smaller files"
            )
        position += BLOCK + -(-info.size // BLOCK) * BLOCK
    raise ShardError(f"shard {path} is cut off: the end-of-archive mark is missing. Copy or write it again.")


def _extended(records: bytes) -> set[bytes]:
    """Keywords of a PAX header: lines of `LENGTH KEYWORD=VALUE`, the length that of the whole line."""
    found, position = set(), 0
    while match := PAX_RECORD.match(records, position):
        found.add(match[2])
        position += max(int(match[1]), 1)
    return found
