"""A data set's files at an object store: the manifest whole, records by ranges, both kept on this machine's disk."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from molmo2_nemo.data.config import StoreConfig
from molmo2_nemo.data.manifest import MANIFEST, ShardError, read_head
from molmo2_nemo.data.objects.address import Address
from molmo2_nemo.data.objects.cache import SpanCache
from molmo2_nemo.data.objects.store import Gone, ObjectStore, Refused, StoredFile, StoreError
from molmo2_nemo.data.objects.traffic import counts
from molmo2_nemo.data.shard_files import Span, cut_off, missing, other_size

T = TypeVar("T")

GAP = 65536  # bytes between two spans that are fetched with them rather than asking twice
AT_ONCE = 16  # requests for the sizes of shards, where the store does not list
LISTED_FOR = 20.0  # seconds in which a folder is not listed again

_options = StoreConfig()
_listed: dict[str, tuple[float, dict[str, StoredFile] | None]] = {}
_silent: dict[str, tuple[float, StoreError]] = {}  # bucket or host -> when it had not answered, and what was said


def use(options: StoreConfig) -> None:
    """The settings of all data sets that this process opens from here on."""
    global _options
    _options = options


def options_in_use() -> StoreConfig:
    return _options


class RemoteFiles:
    """See `ShardFiles`."""

    def __init__(self, folder: Address, options: StoreConfig | None = None):
        self.options = options or _options
        self.folder, self.store = folder, ObjectStore(folder, self.options)
        self.cache = SpanCache(self.options.cache, int(self.options.cache_gib * 2**30))
        self._found: StoredFile | None = None  # the manifest
        self._kept: Path | None = None
        self._names: list[str] = []
        self._sums: list[str] = []  # SHA-256 of each shard

    def listing(self) -> dict[str, StoredFile] | None:
        """That of the store, or one that is a few seconds old."""
        when, found = _listed.get(self.folder.url, (-LISTED_FOR, None))
        if time.monotonic() - when >= LISTED_FOR:
            found = self._unless_silent(self.store.listing)
            _listed[self.folder.url] = time.monotonic(), found
        return found

    def _unless_silent(self, ask: Callable[[], T]) -> T:
        """What a request returns. A store that did not answer after all tries is not asked for the next data set of a
        mixture as soon: each would wait as long."""
        host = "/".join(self.folder.url.split("/", 3)[:3])
        when, said = _silent.get(host, (-LISTED_FOR, None))
        if said is not None and time.monotonic() - when < LISTED_FOR:
            raise said
        try:
            return ask()
        except (Gone, Refused):
            raise
        except StoreError as error:
            _silent[host] = time.monotonic(), error
            raise

    def is_empty(self) -> bool:
        """Whether there are neither a manifest nor shards."""
        listed = self.listing()
        if listed is None:
            return self._manifest_alone() is None
        return MANIFEST not in listed and not any(name.endswith(".tar") for name in listed)

    def _manifest_alone(self) -> StoredFile | None:
        return self._unless_silent(lambda: self.store.look(MANIFEST))

    def head(self, name: str | None) -> dict[str, Any]:
        label = f"data set {name!r}" if name else "data set"
        listed = self.listing()
        self._found = self._manifest_alone() if listed is None else listed.get(MANIFEST)
        if self._found is None:
            tars = listed is not None and any(file.endswith(".tar") for file in listed)
            if tars:
                raise ShardError(
                    f"{label}: {self.folder} holds shards but no {MANIFEST}. Copy them here, index them and copy them "
                    f"back: molmo2 shards copy copies what a manifest lists, molmo2 shards index DIR makes one"
                )
            raise ShardError(f"{label}: no shards at {self.folder} (no {MANIFEST})")
        path = self.manifest()
        with self._named(path):
            return read_head(path)

    def manifest(self) -> Path:
        if self._kept is None or not self._kept.exists():
            self._kept = self._keep_manifest()
        return self._kept

    def _keep_manifest(self) -> Path:
        assert self._found is not None, "`head` finds the manifest"
        self.cache.open()
        version = self._found.version
        before = self._kept.name if self._kept is not None else None
        path = self.cache.manifest(self.folder.url, version) if version else None
        if path is None:
            data = self.store.whole(MANIFEST, self._found.size)
            path = self.cache.keep_manifest(self.folder.url, version or hashlib.sha256(data).hexdigest(), data)
        if before not in (None, path.name):  # the name has its checksum
            raise ShardError(f"{self.folder / MANIFEST} was replaced while this run reads it; start again")
        return path

    def forget_manifest(self) -> bool:
        """Fetch the manifest again before it is read again, as its copy is damaged."""
        if self._kept is not None:
            counts["damaged"] += 1
            self._kept.unlink(missing_ok=True)
        return True

    @contextmanager
    def _named(self, path: Path) -> Iterator[None]:
        """Errors about the manifest's copy name its address."""
        try:
            yield
        except ShardError as error:
            raise ShardError(str(error).replace(str(path), str(self.folder / MANIFEST))) from None

    def check(self, shards: Sequence[dict[str, Any]]) -> None:
        self._names = [shard["name"] for shard in shards]
        self._sums = [shard["sha256"] for shard in shards]
        listed = self.listing()
        if listed is None:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                found = list(pool.map(self.store.look, self._names))
        else:
            found = [listed.get(name) for name in self._names]
        for number, (shard, file) in enumerate(zip(shards, found, strict=True)):
            if file is None:
                raise ShardError(missing(self.shown(number), shard))
            if file.size is not None and file.size != shard["bytes"]:
                raise ShardError(other_size(self.shown(number), shard, file.size))

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        found = {span: self._from_cache(span) for span in spans}
        for whole in together([span for span, data in found.items() if data is None]):
            data = memoryview(self._fetch(whole))
            for span in spans:
                if found[span] is None and _inside(span, whole):
                    part = data[span.offset - whole.offset :][: span.size]
                    self.cache.put(self._key(span), part)
                    found[span] = part
        return [bytes(found[span] or b"") for span in spans]

    def _from_cache(self, span: Span) -> memoryview | None:
        data = self.cache.get(self._key(span)) if self.cache.limit else None
        if data is not None:
            counts["hits"] += 1
        return data

    def _fetch(self, span: Span) -> bytes:
        try:
            return self.store.read(self._names[span.shard], span.offset, span.size)
        except Gone as error:
            raise ShardError(f"shard {self.shown(span.shard)} has disappeared: {error}") from None

    def forget(self, spans: Sequence[Span]) -> bool:
        counts["damaged"] += len(spans)
        for span in spans:
            self.cache.drop(self._key(span))
        return True

    def _key(self, span: Span) -> str:
        return f"{self._sums[span.shard]} {span.offset} {span.size}"

    def sha256(self, number: int) -> str:
        digest = hashlib.sha256()
        found = self.store.look(self._names[number])
        if found is None or found.size is None:
            raise ShardError(cut_off(self.shown(number), 1))
        for data in self.store.chunks(self._names[number], found.size):
            digest.update(data)
        return digest.hexdigest()

    def shown(self, number: int) -> Address:
        return self.folder / self._names[number]

    def close(self) -> None:
        """Connections are kept: they are few, and end with the process."""


def together(spans: Sequence[Span]) -> list[Span]:
    """Spans that cover all of `spans` with few requests: what lies close in a shard is one."""
    found: list[Span] = []
    for span in sorted(spans):
        last = found[-1] if found else None
        if last is not None and last.shard == span.shard and span.offset <= last.offset + last.size + GAP:
            end = max(last.offset + last.size, span.offset + span.size)
            found[-1] = Span(span.shard, last.offset, end - last.offset)
        else:
            found.append(span)
    return found


def _inside(span: Span, whole: Span) -> bool:
    end = whole.offset + whole.size
    return span.shard == whole.shard and whole.offset <= span.offset and span.offset + span.size <= end
