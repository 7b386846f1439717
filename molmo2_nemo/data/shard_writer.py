"""Write data sets of shards atomically, and index tars from other tools."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from molmo2_nemo.data.manifest import MANIFEST, Entry, Member, ShardError, file_sha256, members_crc, write_manifest_file
from molmo2_nemo.data.record import BadRecord
from molmo2_nemo.data.shards import BLOCK
from molmo2_nemo.data.tar_index import index_tar
from molmo2_nemo.files import atomic

LEFT_OUT = "left out by index"  # why records of another tool's tars are missing from the manifest
OLD_MANIFEST = "manifest.json"  # manifest of earlier versions; their data sets may be replaced
LOCK = ".writing"  # in a working folder, locked while its writer lives
LEFTOVER_SECONDS = 3600.0
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_/-]*")
SUFFIX_PATTERN = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")


class NothingUsable(ShardError):
    """Tars that could be read, without a record that training could use."""


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
) -> dict[str, Any]:
    """Write a data set atomically: into a temporary folder beside `out`, renamed when complete.

    For data sets made in one go; `molmo2 prepare` (data_prep/) writes data sets resumably.

    Args:
        records: (key, suffix -> bytes), keys unique, each with a `json` member.
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
        shards, entries = _write_tars(work, records, label, records_per_shard, bytes_per_shard)
        head = {"name": label, "records": sum(s["records"] for s in shards), "shards": shards}
        write_manifest_file(work / MANIFEST, head, entries)
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
    work: Path, records: Iterable[tuple[str, dict[str, bytes]]], name: str, count: int, size: int
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
        shard.add(key, members)
    if shard is None:
        raise ShardError(f"no record to write for data set {name!r}")
    shards.append(shard.close())
    return shards, entries


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


def write_manifest(
    folder: Path,
    name: str,
    *,
    measure: Callable[[str, dict[str, bytes], Entry], None] | None = None,
    head: Mapping[str, Any] | None = None,
    left_out: Callable[[str, str, BadRecord], None] | None = None,
) -> dict[str, Any]:
    """Index every `*.tar` of `folder` and write the manifest last. Also makes a webdataset from another tool readable.

    Args:
        measure: (label, members, entry) fills in the measures of a record, or raises BadRecord.
        head: further fields of the manifest's head.
        left_out: called with shard, key and error of every record that cannot be used, which the manifest then does
            not list; None: such a record is an error.
    Returns:
        The head.
    Raises:
        ShardError: no shards, tars that are damaged or none (all are named), or no record that can be used.
        BadRecord: from `measure`, without `left_out`; no manifest is written, so no run begins with it.
    """
    shards: list[dict[str, Any]] = []
    listed: list[list[Entry]] = []
    unused: list[str] = []
    passed: Counter[str] = Counter()
    first, lost = "", 0
    for tar, (found, bad) in _scanned(folder, left_out is not None, passed).items():
        kept = []
        for entry, content in read_records(tar, [Entry(key, members) for key, members in found]):
            entry.crc = members_crc(content)
            try:
                if measure is not None:
                    measure(f"{tar.name}:{entry.key}", content, entry)
                kept.append(entry)
            except BadRecord as error:
                if bad is None:
                    raise
                bad[entry.key] = error
        for key, wrong in (bad or {}).items():
            first = first or f"{tar.name}:{key}: {wrong.detail}"
            assert left_out is not None
            left_out(tar.name, key, wrong)
            lost += 1
        if not kept:
            unused.append(tar.name)
            continue
        shards.append(
            {"name": tar.name, **file_state(tar), "records": len(kept)} | ({"left_out": len(bad)} if bad else {})
        )
        listed.append(kept)
    if not shards and not unused:
        raise ShardError(f"no shards (*.tar) in {folder}")
    if not shards:
        raise NothingUsable(f"none of the records in {folder} can be used; the first: {first}")
    manifest = {**(head or {}), "name": name, "records": sum(s["records"] for s in shards), "shards": shards}
    manifest |= {"unused": unused} if unused else {}
    manifest |= {"skipped": {LEFT_OUT: lost}} if lost else {}
    manifest |= {"passed_over": dict(sorted(passed.items()))} if passed else {}
    with atomic(folder / MANIFEST) as part:
        write_manifest_file(part, manifest, listed)
    return manifest


Scan = tuple[list[tuple[str, list[Member]]], dict[str, BadRecord] | None]  # records; keys that cannot be read


def _scanned(folder: Path, lenient: bool, passed: Counter[str]) -> dict[Path, Scan]:
    """`index_tar` of every tar of a folder, in the order of their names.

    Raises:
        ShardError: names every tar that cannot be read.
    """
    scans: dict[Path, Scan] = {}
    wrong: list[str] = []
    tars = sorted(folder.glob("*.tar"))
    for tar in tars:
        bad: dict[str, BadRecord] | None = {} if lenient else None
        try:
            scans[tar] = index_tar(tar, bad, passed), bad
        except ShardError as error:
            wrong.append(str(error))
    if wrong:
        many = f"{len(wrong)} of {len(tars)} tars cannot be read:\n  " if len(wrong) > 1 else ""
        rest = "Nothing was indexed: copy them again, or move them out of the folder and index the others"
        raise ShardError(many + "\n  ".join(wrong) + (f"\n{rest}" if len(tars) > 1 else ""))
    return scans


def file_state(path: Path) -> dict[str, Any]:
    """What a manifest says of a shard's file: its size and SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def read_records(tar: Path, entries: Iterable[Entry]) -> Iterator[tuple[Entry, dict[str, bytes]]]:
    """The members (suffix -> bytes) of each entry of one tar."""
    with tar.open("rb") as file:
        for entry in entries:
            content = {}
            for member in entry.members:
                file.seek(member.offset)
                content[member.suffix] = file.read(member.size)
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
