"""Copies of data sets between folders and object stores: resumable, checked by SHA-256, the manifest last."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data_prep.ledger import LEDGER, MISSING, MISSING_URLS
from data_prep.output import SKIPPED
from molmo2_nemo.data.config import StoreConfig
from molmo2_nemo.data.manifest import MANIFEST, ShardError, file_sha256, read_head
from molmo2_nemo.data.objects.address import Address
from molmo2_nemo.data.objects.cache import SpanCache
from molmo2_nemo.data.objects.files import RemoteFiles
from molmo2_nemo.data.objects.store import CHUNK, ObjectStore, StoredFile
from molmo2_nemo.data.shard_files import other_size
from molmo2_nemo.errors import UserError
from molmo2_nemo.files import atomic, write_json

PLACE = Path | Address
BESIDE = (SKIPPED, LEDGER, MISSING, MISSING_URLS)  # of a data set, copied where they are there
NUMBERED = re.compile(r"(.+)-\d{6,}(?:-r\d+)?\.tar")
READ_ONLY = ("http", "https")
SENT = "sent"  # folder of the cache with what was sent where


class Copied(NamedTuple):
    """What a copy of one data set came to."""

    files: int  # shards that were copied now
    bytes: int
    already: int  # shards that were there, with the SHA-256 of the manifest
    removed: int = 0  # shards of the data set that was replaced


@dataclass
class Watch:
    """Called with the bytes that came since the last call; `begin` with the name and all bytes of a data set."""

    begin: Callable[[str, int], None] = lambda name, size: None
    step: Callable[[int], None] = lambda size: None


def sets_at(place: PLACE, options: StoreConfig) -> list[PLACE]:
    """`place` itself if it is a data set, else the data sets in it.

    Raises:
        ShardError: it is none and has none.
    """
    from data_prep.shard_tools import data_sets

    if isinstance(place, Path):
        return list(data_sets(place))
    files = RemoteFiles(place, options)
    listed = files.listing()
    if files.store.look(MANIFEST) is not None if listed is None else MANIFEST in listed:
        return [place]
    inner = [] if listed is None else [place / name for name in files.store.folders()]
    found: list[PLACE] = [at for at in inner if MANIFEST in (RemoteFiles(at, options).listing() or {})]
    if not found:
        raise ShardError(f"{place} has no {MANIFEST}, nor has any folder in it")
    return found


def copy(
    source: PLACE, target: PLACE, options: StoreConfig, *, overwrite: bool = False, watch: Watch | None = None
) -> Copied:
    """Copy one data set. A second call goes on where the first was stopped, with what is right at the target kept.

    Args:
        target: the folder or address of the data set itself.
        overwrite: replace another data set there.
    Raises:
        UserError: the target is another data set, or cannot be written; a shard of the source is not that of its
            manifest.
    """
    watch = watch or Watch()
    at, to = _side(source, options), _side(target, options)
    head, manifest = at.manifest()
    _make_ready(to, head, manifest, overwrite)
    there, here = to.listing(), at.listing()
    watch.begin(head["name"], sum(shard["bytes"] for shard in head["shards"]))
    done = size = already = 0
    for shard in head["shards"]:
        if to.has(shard, there.get(shard["name"])):
            already += 1
            watch.step(shard["bytes"])
            continue
        found = here.get(shard["name"])
        if found is not None and found.size not in (None, shard["bytes"]):
            raise ShardError(other_size(f"{at}/{shard['name']}", shard, found.size))
        to.bring(at, shard, watch.step)
        done, size = done + 1, size + shard["bytes"]
    for name in BESIDE:
        if (data := at.small(name)) is not None:
            to.write(name, data)
    to.write(MANIFEST, manifest)
    return Copied(done, size, already, _clear(to, head) if overwrite else 0)


def _clear(to: Side, head: dict[str, Any]) -> int:
    """Remove shards under this data set's names that its manifest does not list: those of one that was replaced."""
    listed = {shard["name"] for shard in head["shards"]} | set(head.get("unused", ()))
    stems = {_stem(shard["name"]) for shard in head["shards"]} - {None}
    old = sorted(name for name in to.listing() if name not in listed and _stem(name) in stems)
    for name in old:
        to.remove(name)
    return len(old)


def _stem(name: str) -> str | None:
    """What stands before the number in a shard's name; None where there is none."""
    found = NUMBERED.fullmatch(name)
    return None if found is None else found[1]


def _make_ready(to: Side, head: dict[str, Any], manifest: bytes, overwrite: bool) -> None:
    """Refuse another data set at the target; a manifest there goes, so that it never lists shards that change."""
    before = to.small(MANIFEST)
    if before is None or before == manifest:
        return
    if not overwrite:
        try:
            to.manifest()
        except ShardError as error:
            raise UserError(f"{error}; --overwrite replaces what is there") from None
        raise UserError(
            f"{to} is another data set, or {head['name']} as it was before: name another target, or --overwrite"
        )
    to.remove(MANIFEST)


class Side(Protocol):
    """A data set's files at one end of a copy."""

    def manifest(self) -> tuple[dict[str, Any], bytes]:
        """The checked head, and the whole manifest."""

    def listing(self) -> dict[str, StoredFile]:
        """The files there."""

    def small(self, name: str) -> bytes | None:
        """The bytes of a small file; None where it is not there."""

    def write(self, name: str, data: bytes) -> None:
        """Write a small file, whole or not at all."""

    def remove(self, name: str) -> None:
        """Remove a file."""

    def has(self, shard: dict[str, Any], found: StoredFile | None) -> bool:
        """Whether the shard is there, with the bytes of the manifest."""

    def here(self, shard: dict[str, Any], step: Callable[[int], None]) -> tuple[Path, bool]:
        """A checked file of this machine with the shard, and whether it is a copy to be removed after use."""

    def bring(self, source: Side, shard: dict[str, Any], step: Callable[[int], None]) -> None:
        """Copy a shard from the other end, checked."""


class FolderSide:
    """A folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def manifest(self) -> tuple[dict[str, Any], bytes]:
        return read_head(self.folder / MANIFEST), (self.folder / MANIFEST).read_bytes()

    def listing(self) -> dict[str, StoredFile]:
        self.folder.mkdir(parents=True, exist_ok=True)
        return {path.name: StoredFile(path.stat().st_size, "") for path in self.folder.iterdir() if path.is_file()}

    def small(self, name: str) -> bytes | None:
        path = self.folder / name
        return path.read_bytes() if path.is_file() else None

    def write(self, name: str, data: bytes) -> None:
        with atomic(self.folder / name) as part:
            part.write_bytes(data)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()

    def has(self, shard: dict[str, Any], found: StoredFile | None) -> bool:
        right = found is not None and found.size == shard["bytes"]
        return right and file_sha256(self.folder / shard["name"]) == shard["sha256"]

    def here(self, shard: dict[str, Any], step: Callable[[int], None]) -> tuple[Path, bool]:
        path = self.folder / shard["name"]
        if not path.is_file() or file_sha256(path) != shard["sha256"]:
            raise ShardError(f"{path} is not the shard of the manifest (molmo2 shards check {self.folder}); not copied")
        return path, False

    def bring(self, source: Side, shard: dict[str, Any], step: Callable[[int], None]) -> None:
        path, part = self.folder / shard["name"], self.folder / f".{shard['name']}.part"
        if isinstance(source, StoreSide):
            source.download(shard, part, step)
        else:
            _copy_file(source.here(shard, step)[0], part, step)
            _same(part, shard, source)
        os.replace(part, path)


class StoreSide:
    """A folder at an object store. What was sent is noted in the cache, so that a second call needs not read it."""

    def __init__(self, folder: Address, options: StoreConfig):
        self.files = RemoteFiles(folder, options)
        self.store: ObjectStore = self.files.store
        self.cache: SpanCache = self.files.cache

    def __str__(self) -> str:
        return str(self.store.folder)

    def manifest(self) -> tuple[dict[str, Any], bytes]:
        head = self.files.head(None)
        return head, self.files.manifest().read_bytes()

    def listing(self) -> dict[str, StoredFile]:
        return self.store.listing() or {}

    def small(self, name: str) -> bytes | None:
        found = self.store.look(name)
        return None if found is None else self.store.whole(name, found.size)

    def write(self, name: str, data: bytes) -> None:
        self._writable()
        self.store.write(name, data)

    def remove(self, name: str) -> None:
        self._writable()
        self.store.remove(name)

    def has(self, shard: dict[str, Any], found: StoredFile | None) -> bool:
        if found is None or found.size != shard["bytes"]:
            return False
        if found.version and self._note(shard).is_file():
            if json.loads(self._note(shard).read_text()) == [shard["sha256"], found.version]:
                return True
        return self._sha256(shard) == shard["sha256"]

    def _sha256(self, shard: dict[str, Any]) -> str:
        digest = hashlib.sha256()
        for data in self.store.chunks(shard["name"], shard["bytes"]):
            digest.update(data)
        return digest.hexdigest()

    def here(self, shard: dict[str, Any], step: Callable[[int], None]) -> tuple[Path, bool]:
        self.cache.open()
        folder = self.cache.folder / "copying"
        folder.mkdir(exist_ok=True)
        path = folder / shard["sha256"]
        self.download(shard, path, lambda size: None)
        return path, True

    def download(self, shard: dict[str, Any], part: Path, step: Callable[[int], None]) -> None:
        """The shard in `part`, which may have its beginning; checked.

        Raises:
            ShardError: its SHA-256 is not that of the manifest; `part` is removed then.
        """
        with part.open("ab") as file:
            begun = file.tell()
            if begun > shard["bytes"]:
                begun = file.truncate(0)  # another shard's of that name
            step(begun)
            for data in self.store.chunks(shard["name"], shard["bytes"], begun):
                file.write(data)
                step(len(data))
        _same(part, shard, self)

    def bring(self, source: Side, shard: dict[str, Any], step: Callable[[int], None]) -> None:
        self._writable()
        path, scratch = source.here(shard, step)
        try:
            self.store.put(shard["name"], str(path), shard["bytes"])
        finally:
            if scratch:
                path.unlink(missing_ok=True)
        found = self.store.look_again(shard["name"])
        if found is None or found.size not in (None, shard["bytes"]):
            size = "no such file" if found is None else f"{found.size} bytes"
            raise ShardError(f"{self}/{shard['name']}: {size} after it was sent with {shard['bytes']}; copy it again")
        if found.version:
            self.cache.open()
            self._note(shard).parent.mkdir(exist_ok=True)
            write_json(self._note(shard), [shard["sha256"], found.version], None)
        step(shard["bytes"])

    def _note(self, shard: dict[str, Any]) -> Path:
        name = hashlib.sha256(f"{self}/{shard['name']}".encode()).hexdigest()[:40]
        return self.cache.folder / SENT / name

    def _writable(self) -> None:
        if self.store.folder.scheme in READ_ONLY:
            raise UserError(f"{self}: it cannot be written over {self.store.folder.scheme}://; s3:// and gs:// can")


def _side(place: PLACE, options: StoreConfig) -> Side:
    return FolderSide(place) if isinstance(place, Path) else StoreSide(place, options)


def _copy_file(source: Path, target: Path, step: Callable[[int], None]) -> None:
    with source.open("rb") as file, target.open("wb") as out:
        while data := file.read(CHUNK):
            out.write(data)
            step(len(data))


def _same(part: Path, shard: dict[str, Any], source: Side) -> None:
    if part.stat().st_size != shard["bytes"] or file_sha256(part) != shard["sha256"]:
        part.unlink()
        raise ShardError(f"{source}/{shard['name']} is not the shard of the manifest (SHA-256); not copied")


def check_apart(source: PLACE, target: PLACE) -> None:
    """Refuse to copy a folder onto or into itself, or into one that it lies in.

    Raises:
        UserError: the two places are one, or one lies in the other.
    """
    at, to = _parts(source), _parts(target)
    if at == to:
        how = "are the same place"
    elif at == to[: len(at)]:
        how = f"overlap: {target} lies in {source}"
    elif to == at[: len(to)]:
        how = f"overlap: {source} lies in {target}"
    else:
        return
    raise UserError(f"{source} and {target} {how}; name a target beside it, such as {source.parent / 'copy'}")


def _parts(place: PLACE) -> tuple[str, ...]:
    """What a place is made of, links followed: of an address scheme, host and folders."""
    if isinstance(place, Path):
        return place.resolve().parts
    scheme, _, rest = place.url.partition("://")
    return (f"{scheme.lower()}://", *(part for part in rest.split("/") if part not in ("", ".")))


def target_of(source: PLACE, target: PLACE, sets: Sequence[PLACE]) -> dict[PLACE, PLACE]:
    """Data set -> where its copy goes: the target itself for a data set, a folder of its name below it for several."""
    if list(sets) == [source]:
        return {source: target}
    return {found: target / found.name for found in sets}
