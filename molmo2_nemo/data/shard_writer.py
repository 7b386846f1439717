"""Write data sets of shards atomically."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from molmo2_nemo.data.manifest import (
    MANIFEST,
    Entry,
    Member,
    ShardError,
    file_sha256,
    members_crc,
    shared_head,
    write_manifest_file,
)
from molmo2_nemo.data.media_once import MEDIA, MediaOnce, media_bytes, with_owners
from molmo2_nemo.data.shards import BLOCK

OLD_MANIFEST = "manifest.json"  # manifest of earlier versions; their data sets may be replaced
LOCK = ".writing"  # in a working folder, locked while its writer lives
LEFTOVER_SECONDS = 3600.0
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_/-]*")
SUFFIX_PATTERN = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")


class TarShard:
    """One shard being written: a hidden file that gets its final name when it is complete and on disk. `files.atomic`
    does not fit, because many calls write the file and one may discard it.

    The bytes depend only on the records. The members of a record are in alphabetical order.
    """

    def __init__(self, path: Path):
        from webdataset import TarWriter  # slow to import, and only writers need it

        self.path = path
        self._part = path.with_name(f".{path.name}.part")
        self._file = _HashingFile(self._part.open("wb"))
        self._tar = TarWriter(self._file, mtime=0, user="", group="", encoder=False)
        self.entries: list[Entry] = []

    @property
    def size(self) -> int:
        """Bytes written so far, without the end-of-archive mark."""
        return int(self._tar.tarstream.offset)

    def add(
        self, key: str, members: Mapping[str, bytes], shared: Mapping[str, tuple[Member, bytes]] | None = None
    ) -> Entry:
        """Write one record; the caller fills in the measures of the entry returned.

        Args:
            members: suffix -> bytes, to be written.
            shared: suffix -> where the bytes of a further medium have been written before, and the bytes.
        Raises:
            ShardError: a key or suffix that cannot be a member name, no `json` member.
            OSError: the disk is full.
        """
        shared = shared or {}
        check_names(key, {**members, **dict.fromkeys(shared, b"")})
        entry, position = Entry(key), self.size
        for suffix in sorted(members):
            entry.members.append(Member(suffix, position + BLOCK, len(members[suffix])))
            position += record_bytes(len(members[suffix]))
        entry.members = sorted([*entry.members, *(m for m, _ in shared.values())], key=lambda member: member.suffix)
        entry.crc = members_crc({**members, **{suffix: content for suffix, (_, content) in shared.items()}})
        self._tar.write({"__key__": key, **members})
        assert self.size == position, "a member did not take exactly the bytes of a plain header and its data"
        self.entries.append(entry)
        return entry

    def keep(self, key: str, media: Mapping[str, bytes]) -> list[Member]:
        """Write media whose record is not there, as other records share them; returns where they lie."""
        check_names(key, {**media, "json": b""})
        members, position = [], self.size
        for suffix in sorted(media):
            members.append(Member(suffix, position + BLOCK, len(media[suffix])))
            position += record_bytes(len(media[suffix]))
        self._tar.write({"__key__": key, **media})
        return members

    def close(self) -> dict[str, Any]:
        """Finish the shard and give it its final name; returns its entry for the manifest's head."""
        self._tar.close()
        self._file.close()
        os.replace(self._part, self.path)
        return {
            "name": self.path.name,
            "bytes": self._file.written,
            "sha256": self._file.digest.hexdigest(),
            "records": len(self.entries),
        }

    def discard(self) -> None:
        """Remove everything written so far."""
        self._file.abandon()
        self._part.unlink(missing_ok=True)


def record_bytes(*sizes: int) -> int:
    """Bytes that members of these sizes take in a tar."""
    return sum(BLOCK + -(-size // BLOCK) * BLOCK for size in sizes)


class _HashingFile:
    """A file that a tar stream writes to, and that hashes the bytes on the way."""

    def __init__(self, file: Any):
        self._file = file
        self.digest = hashlib.sha256()
        self.written = 0
        self._abandoned = False

    def write(self, data: bytes) -> int:
        if self._abandoned:  # the tar stream flushes its buffer when it is garbage-collected
            return len(data)
        self._file.write(data)
        self.digest.update(data)
        self.written += len(data)
        return len(data)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        self._abandoned = True
        try:
            self._file.close()
        except OSError:  # the disk is full; the unwritten bytes are no longer needed
            self._file.raw.close()


def shard_stem(name: str) -> str:
    """The file name of a data set's shards, without number and suffix."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def write_shards(
    out: str | Path,
    records: Iterable[tuple[str, dict[str, bytes]]],
    *,
    name: str | None = None,
    records_per_shard: int = 1000,
    bytes_per_shard: int = 2 * 10**9,
    overwrite: bool = False,
    media_once: bool = False,
) -> dict[str, Any]:
    """Write a data set atomically: into a temporary folder beside `out`, renamed when complete.

    For data sets made in one go; `molmo2 prepare` (data_prep/) writes data sets resumably.

    Args:
        records: (key, suffix -> bytes), keys unique, each with a `json` member.
        media_once: write media that several records have once (media_once.py), as `molmo2 prepare` does.
    Returns:
        The manifest's head.
    Raises:
        ShardError: `out` exists (without `overwrite`), a bad key or suffix, no record at all.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(out)
    if out.exists() and not overwrite:
        raise ShardError(f"{out} exists already; remove it or write elsewhere")
    check_replaceable(out)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent))
    lock = lock_file(work / LOCK)
    try:
        work.chmod(0o755)  # mkdtemp makes it private
        label = name or out.name
        once = MediaOnce(work) if media_once else None
        shards, entries = _write_tars(work, records, label, records_per_shard, bytes_per_shard, once)
        head = {"name": label, "records": sum(s["records"] for s in shards), **shared_head(entries), "shards": shards}
        write_manifest_file(work / MANIFEST, head, entries)
        (work / MEDIA).unlink(missing_ok=True)
        (work / LOCK).unlink()
        replace_folder(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            lock.close()
    return head


def check_replaceable(out: Path) -> None:
    """Raises ShardError when `out` holds something other than a data set of this package."""
    ours = any((out / name).exists() for name in (MANIFEST, OLD_MANIFEST))
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not ours)):
        raise ShardError(f"{out} exists and is not a molmo2 data set (no {MANIFEST}); it is not overwritten")


def clean_leftovers(out: Path) -> list[Path]:
    """Remove what killed writers of `out` left beside it; returns the folders removed.

    A working folder that a running writer has locked is kept. One without a lock may have been created just now, or may
    be complete and about to be renamed, so it is kept for an hour. If a writer died between moving the old data set
    aside and putting the new one in its place, the old one is restored.
    """
    removed = []
    for old in sorted(out.parent.glob(f".{glob.escape(out.name)}.old-*")):
        if not _idle(old):
            continue
        if not out.exists() and (old / "data" / MANIFEST).is_file():
            os.rename(old / "data", out)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            removed.append(old)
    for work in sorted(out.parent.glob(f".{glob.escape(out.name)}.tmp-*")):
        if not work.is_dir() or work.is_symlink():
            continue
        if (work / LOCK).exists():
            lock = lock_file(work / LOCK)
            if lock is None:
                continue
            lock.close()
        elif not _idle(work):
            continue
        shutil.rmtree(work, ignore_errors=True)
        removed.append(work)
    return removed


def _idle(folder: Path) -> bool:
    """Whether the folder has not changed for an hour."""
    try:
        return time.time() - folder.stat().st_mtime > LEFTOVER_SECONDS
    except OSError:
        return False


def lock_file(path: Path) -> Any | None:
    """An open file that holds the lock until it is closed or its process ends; None if another process has it."""
    file = path.open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _write_tars(
    work: Path,
    records: Iterable[tuple[str, dict[str, bytes]]],
    name: str,
    count: int,
    size: int,
    once: MediaOnce | None,
) -> tuple[list[dict[str, Any]], list[list[Entry]]]:
    seen: set[str] = set()
    shards: list[dict[str, Any]] = []
    entries: list[list[Entry]] = []
    shard: TarShard | None = None
    for key, members in records:
        if key in seen:
            raise ShardError(f"the key {key!r} appears twice; keys must be unique in a data set")
        seen.add(key)
        if shard is not None and (len(shard.entries) >= count or shard.size >= size):
            shards.append(shard.close())
            shard = None
        if shard is None:
            shard = TarShard(work / f"{shard_stem(name)}-{len(shards):06d}.tar")
            entries.append(shard.entries)
            if once is not None:
                once.begin(shard.path.name)
        add_once(shard, once, key, members)
    if once is not None:
        once.close()
    if shard is None:
        raise ShardError(f"no record to write for data set {name!r}")
    shards.append(shard.close())
    return shards, entries


def add_once(shard: TarShard, once: MediaOnce | None, key: str, members: Mapping[str, bytes]) -> Entry:
    """`TarShard.add` of a record without the media that were written before; its JSON then says where they are."""
    if once is None:
        return shard.add(key, members)
    shared = once.find(members)
    own = {suffix: data for suffix, data in members.items() if suffix not in shared}
    if shared:
        own["json"] = with_owners(members["json"], shared, once.names)
    entry = shard.add(key, own, {suffix: (member, members[suffix]) for suffix, member in shared.items()})
    once.wrote(entry)
    return entry


def check_names(key: str, members: Mapping[str, bytes]) -> None:
    """Raises ShardError unless key and suffixes can be member names and there is a `json` member."""
    if not KEY_PATTERN.fullmatch(key) or "//" in key or key.endswith("/"):
        raise ShardError(f"key {key!r} may hold only letters, digits, '_', '-' and inner '/'")
    if "json" not in members:
        raise ShardError(f"record {key!r} has no json member")
    for suffix in members:
        if not SUFFIX_PATTERN.fullmatch(suffix):
            raise ShardError(f"record {key!r}: the suffix {suffix!r} may hold only a-z, 0-9, '_' and dots between")
        if len(key) + 1 + len(suffix) > 99:
            raise ShardError(f"record {key!r}: the member name {key}.{suffix} is longer than 99 characters")


def file_state(path: Path) -> dict[str, Any]:
    """What a manifest says of a shard's file: its size and SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def read_records(
    tar: Path, entries: Iterable[Entry], tars: Mapping[int, Path] | None = None
) -> Iterator[tuple[Entry, dict[str, bytes]]]:
    """The members (suffix -> bytes) of each entry of one tar, as far as they are there.

    Args:
        tars: where shared media lie.
    """
    with tar.open("rb") as file:
        for entry in entries:
            content = {}
            for member in entry.members:
                if member.owner is None:
                    file.seek(member.offset)
                    content[member.suffix] = file.read(member.size)
                else:
                    content[member.suffix] = media_bytes((tars or {}).get(member.shard or 0), member)
            yield entry, content


def replace_folder(work: Path, out: Path) -> None:
    """Put the complete folder `work` in the place of `out`, which may exist and is missing only for an instant."""
    if not out.exists():
        os.rename(work, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    os.rename(out, old / "data")
    os.rename(work, out)
    shutil.rmtree(old, ignore_errors=True)
