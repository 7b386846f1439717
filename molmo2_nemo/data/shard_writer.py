"""Write data sets of shards, whole or not at all, and index tars that others wrote."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from molmo2_nemo.data.record import parse_record
from molmo2_nemo.data.shards import (
    BLOCK,
    FORMAT,
    MANIFEST,
    VERSION,
    Member,
    ShardError,
    check_header,
    file_sha256,
    split_name,
)

LOCK = ".writing"  # in a working folder, locked while its writer lives
LEFTOVER_SECONDS = 3600.0
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_/-]*")
SUFFIX_PATTERN = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")


def index_tar(path: Path) -> list[tuple[str, list[Member]]]:
    """Scan a webdataset tar once: its records in order, with the offsets of their members.

    Raises:
        ShardError: hostile or damaged content, a cut file, duplicate names, or a compressed tar.
    """
    size = path.stat().st_size
    records: OrderedDict[str, list[Member]] = OrderedDict()
    last_key = None
    with path.open("rb") as file:
        for header, offset in _headers(path, file, size):
            try:
                info = check_header(header)
                key, suffix = split_name(info.name)
            except ValueError as error:
                raise ShardError(f"shard {path}: {error}") from None
            if offset + info.size > size:
                raise ShardError(
                    f"shard {path} is cut off: member {info.name!r} ends at byte {offset + info.size}, "
                    f"the file has {size}. Copy or write it again."
                )
            if key != last_key and key in records:
                raise ShardError(f"shard {path}: the key {key!r} appears twice (members of a record must be adjacent)")
            members = records.setdefault(key, [])
            if any(m.suffix == suffix for m in members):
                raise ShardError(f"shard {path}: the member {info.name!r} appears twice")
            members.append(Member(suffix, offset, info.size))
            last_key = key
    if not records:
        raise ShardError(f"shard {path} holds no record")
    return list(records.items())


def _headers(path: Path, file: Any, size: int) -> Iterator[tuple[bytes, int]]:
    """Headers of real members with the offset of their data; extended headers (PAX) are stepped over."""
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
        elif b"path=" in file.read(min(info.size, 65536)):
            raise ShardError(f"shard {path}: a member name needs an extended header; use short ASCII keys")
        position += BLOCK + -(-info.size // BLOCK) * BLOCK
    raise ShardError(f"shard {path} is cut off: the end-of-archive mark is missing. Copy or write it again.")


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

    Args:
        records: (key, suffix -> bytes), keys unique, each with a `json` member.
    Returns:
        The manifest.
    Raises:
        ShardError: `out` exists (without `overwrite`), a bad key or suffix, no record at all.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(out)
    if out.exists() and not overwrite:
        raise ShardError(f"{out} exists already; remove it or write elsewhere")
    if out.exists() and any(out.iterdir()) and not (out / MANIFEST).exists():
        raise ShardError(f"{out} exists and is not a data set of ours (no {MANIFEST}); it is not overwritten")
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent))
    lock = _lock(work / LOCK)
    try:
        work.chmod(0o755)  # mkdtemp makes it private
        _write_tars(work, records, name or out.name, records_per_shard, bytes_per_shard)
        manifest = write_manifest(work, name or out.name)
        (work / LOCK).unlink()
        _replace_folder(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            lock.close()
    return manifest


def clean_leftovers(out: Path) -> list[Path]:
    """Remove what killed writers of `out` left beside it; returns the folders removed.

    A working folder is locked by its living writer and so is kept. One without a lock may have been made a moment ago,
    or be complete and about to be renamed: it is kept for an hour. If a writer died between moving the old data set
    aside and putting the new one in its place, the old one is put back.
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
            lock = _lock(work / LOCK)
            if lock is None:
                continue
            lock.close()
        elif not _idle(work):
            continue
        shutil.rmtree(work, ignore_errors=True)
        removed.append(work)
    return removed


def _idle(folder: Path) -> bool:
    """Nobody changed the folder for an hour."""
    try:
        return time.time() - folder.stat().st_mtime > LEFTOVER_SECONDS
    except OSError:
        return False


def _lock(path: Path) -> Any | None:
    """An open file that holds the lock until it is closed or its process ends; None if another process has it."""
    file = path.open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _write_tars(work: Path, records: Iterable[tuple[str, dict[str, bytes]]], name: str, count: int, size: int) -> None:
    from webdataset import ShardWriter  # slow to import, and only writers need it

    opened: list[Any] = []

    def opener(filename: str) -> Any:
        opened.append((work / filename).open("wb"))
        return opened[-1]

    def finish(_: str) -> None:
        file = opened.pop()
        file.flush()
        os.fsync(file.fileno())
        file.close()

    stem = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    seen: set[str] = set()
    options: dict[str, Any] = {"opener": opener, "post": finish, "verbose": 0, "encoder": False, "mtime": 0}
    with ShardWriter(f"{stem}-%06d.tar", maxcount=count, maxsize=size, **options) as writer:
        for key, members in records:
            _check_names(key, members)
            if key in seen:
                raise ShardError(f"the key {key!r} is given twice; keys must be unique in a data set")
            seen.add(key)
            writer.write({"__key__": key, **members})
    if not seen:
        raise ShardError(f"no record to write for data set {name!r}")


def _check_names(key: str, members: dict[str, bytes]) -> None:
    if not KEY_PATTERN.fullmatch(key) or "//" in key or key.endswith("/"):
        raise ShardError(f"key {key!r} may hold only letters, digits, '_', '-' and inner '/'")
    if "json" not in members:
        raise ShardError(f"record {key!r} has no json member")
    for suffix in members:
        if not SUFFIX_PATTERN.fullmatch(suffix):
            raise ShardError(f"record {key!r}: the suffix {suffix!r} may hold only a-z, 0-9, '_' and dots between")
        if len(key) + 1 + len(suffix) > 99:
            raise ShardError(f"record {key!r}: the member name {key}.{suffix} is longer than 99 characters")


def write_manifest(folder: Path, name: str, *, parse: bool = False) -> dict[str, Any]:
    """Index every `*.tar` of `folder` and write the manifest last. Also makes a foreign webdataset readable here.

    Args:
        parse: also parse every record (media are not decoded), for shards that somebody else wrote.

    Raises:
        ShardError: no shards, or a tar that is not one.
        BadRecord: (with `parse`) a record that could never be used, such as one whose picture is not in the shard; no
            manifest is written, so no run begins with it.
    """
    shards: list[dict[str, Any]] = []
    for tar in sorted(folder.glob("*.tar")):
        records = index_tar(tar)
        if parse:
            _check_records(tar, records)
        text = json.dumps([[key, [[m.suffix, m.offset, m.size] for m in members]] for key, members in records])
        index = tar.with_suffix(".index.json")
        _write_atomic(index, text.encode())
        shards.append(
            {
                "name": tar.name,
                "bytes": tar.stat().st_size,
                "sha256": file_sha256(tar),
                "records": len(records),
                "index": index.name,
                "index_sha256": hashlib.sha256(text.encode()).hexdigest(),
            }
        )
    if not shards:
        raise ShardError(f"no shards (*.tar) in {folder}")
    total = sum(s["records"] for s in shards)
    manifest = {"format": FORMAT, "version": VERSION, "name": name, "records": total, "shards": shards}
    _write_atomic(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return manifest


def _check_records(tar: Path, records: list[tuple[str, list[Member]]]) -> None:
    """Parse every record (media are not decoded)."""
    with tar.open("rb") as file:
        for key, members in records:
            content = {}
            for member in members:
                file.seek(member.offset)
                content[member.suffix] = file.read(member.size)
            parse_record(f"{tar.name}:{key}", content)


def _write_atomic(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _replace_folder(work: Path, out: Path) -> None:
    if not out.exists():
        os.rename(work, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    os.rename(out, old / "data")
    os.rename(work, out)
    shutil.rmtree(old, ignore_errors=True)
