"""Requests to an object store through fsspec: listings and ranges, with tries, time limits and plain errors."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from molmo2_nemo.data.config import StoreConfig
from molmo2_nemo.data.manifest import ShardError
from molmo2_nemo.data.objects.address import Address
from molmo2_nemo.data.objects.traffic import counts
from molmo2_nemo.errors import DataError

T = TypeVar("T")

CONNECT = 15.0  # seconds
SLOWEST = 2**20  # bytes per second: a request may take the timeout and this long for its bytes
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between two tries
LONGEST_ASKED = 120.0  # seconds that a store may ask to wait
SAID_AFTER, SAID_EVERY = 2, 60.0  # tries, and seconds, after which somebody is told what is waited for
CHUNK = 16 * 2**20  # bytes of one request of a whole file
TRANSIENT = (408, 425, 429, *range(500, 600))  # HTTP status codes after which a request is made again
NO_LISTING = ("http", "https")  # fsspec takes a page's links for one, without sizes
VERSIONS = ("ETag", "etag", "md5Hash", "md5", "Content-MD5", "content_md5", "generation", "VersionId")
TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")
EXTRAS = {  # scheme -> what to install
    **dict.fromkeys(("s3", "s3a"), "pip install 'molmo2_nemo[s3]'"),
    **dict.fromkeys(("gs", "gcs"), "pip install 'molmo2_nemo[gcs]'"),
}


_open: dict[tuple[int, str, float], Any] = {}  # process id, scheme, timeout: a file system does not outlive a fork
_said = -SAID_EVERY
_loops: dict[int, Any] = {}  # process id: the loop of its file systems, which runs in a thread


class StoreError(ShardError):
    """A store refused a request, or did not answer it after all tries."""


class Gone(StoreError):
    """There is nothing at an address."""


class Refused(StoreError):
    """The store knows who asks, or not, and does not allow it."""


class StoredFile(NamedTuple):
    """A file as a store lists it."""

    size: int | None  # bytes; None: the store does not say
    version: str  # differs after the file was replaced; empty: the store does not say


@dataclass(frozen=True)
class Problem:
    """Why a request failed."""

    text: str
    kind: type[StoreError] | None = None  # raised at once; None: the request may be made again
    wait: float = 0.0  # seconds that the store asks for


class ObjectStore:
    """The files of one folder at a store. Connections are those of the process that asks.

    Raises (all methods):
        StoreError: names the address, and what the store or the library says.
    """

    def __init__(self, folder: Address, options: StoreConfig):
        self.folder, self.options = folder, options

    @property
    def files(self) -> Any:
        """fsspec's file system. Those of one scheme share it, as each takes a second to open and has connections."""
        key = os.getpid(), self.folder.scheme, self.options.timeout
        if key not in _open:
            _open[key] = open_filesystem(self.folder, self.options)
        return _open[key]

    def listing(self) -> dict[str, StoredFile] | None:
        """Name -> file, by one listing; empty where the folder is not there. None: the store does not list."""
        if self.folder.scheme in NO_LISTING:
            return None
        try:
            self.files.invalidate_cache(self.folder.url)
            found = self._tries(self.folder, lambda: self._call("ls", self.folder.url, detail=True))
        except Gone:
            return {}
        except Refused:
            return None
        return {str(e["name"]).rpartition("/")[2]: _stored(e) for e in found if e.get("type") == "file"}

    def folders(self) -> list[str]:
        """Names of the folders in this one."""
        found = self._tries(self.folder, lambda: self._call("ls", self.folder.url, detail=True))
        return sorted(str(e["name"]).rstrip("/").rpartition("/")[2] for e in found if e.get("type") == "directory")

    def look(self, name: str) -> StoredFile | None:
        """A file's size and version, by one request; None if it is not there."""
        try:
            return _stored(self._tries(self.folder / name, lambda: self._call("info", str(self.folder / name))))
        except Gone:
            return None

    def look_again(self, name: str) -> StoredFile | None:
        """`look` at a file that was written by this process, past what the library remembers of the folder."""
        self.files.invalidate_cache(self.folder.url)
        return self.look(name)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes of a file, by one request.

        Raises:
            Gone: no such file.
        """
        address = self.folder / name

        def once() -> bytes:
            counts["requests"] += 1
            data = self._call("cat_file", str(address), start=offset, end=offset + size, size=size)
            counts["bytes"] += len(data)
            if len(data) < size:
                raise EOFError(f"the answer has {len(data):,} of {size:,} bytes")
            return data

        if not size:
            return b""
        data = self._tries(address, once)
        if len(data) != size:
            raise StoreError(
                f"{address}: asked for {size:,} bytes at {offset:,}, the server sends {len(data):,}: it does not know "
                "ranges (HTTP range requests). Serve the shards by a server that does, or copy them here: "
                f"molmo2 shards copy {self.folder} DIR"
            )
        return data

    def whole(self, name: str, size: int | None) -> bytes:
        """All bytes of a small file."""
        return b"".join(self.chunks(name, size))

    def chunks(self, name: str, size: int | None, start: int = 0) -> Iterator[bytes]:
        """All bytes of a file from `start` on, a request each; where its size is not known, by one request."""
        address = self.folder / name
        if size is None:
            yield self._tries(address, lambda: self._call("cat_file", str(address)))[start:]
            return
        for at in range(start, size, CHUNK):
            yield self.read(name, at, min(CHUNK, size - at))

    def put(self, name: str, local: str, size: int) -> None:
        """Write a file of this machine, of `size` bytes, to the store, where it replaces one of its name."""
        address = self.folder / name
        self._tries(address, lambda: self._call("put_file", local, str(address), size=size))

    def write(self, name: str, data: bytes) -> None:
        address = self.folder / name
        self._tries(address, lambda: self._call("pipe_file", str(address), data, size=len(data)))

    def remove(self, name: str) -> None:
        address = self.folder / name
        self._tries(address, lambda: self._call("rm_file", str(address)))

    def _call(self, method: str, *args: Any, size: int = 0, **more: Any) -> Any:
        """A method of the file system; where it can be, limited in time."""
        files = self.files
        if not getattr(files, "async_impl", False):
            return getattr(files, method)(*args, **more)
        from fsspec.asyn import sync

        limit = self.options.timeout + size / SLOWEST
        return sync(files.loop, getattr(files, f"_{method}"), *args, timeout=limit, **more)

    def _tries(self, address: Address, request: Callable[[], T]) -> T:
        problem = Problem("")
        for attempt in range(self.options.retries + 1):
            try:
                return request()
            except DataError:
                raise
            except Exception as error:  # the libraries' errors have no common class
                found = problem_of(error)
                if found is None:
                    raise
                problem = found
            if problem.kind is not None:
                raise problem.kind(f"{address}: {problem.text}")
            if attempt < self.options.retries:
                counts["retries"] += 1
                wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT)
                if attempt >= SAID_AFTER:
                    _say(f"{address}: {problem.text}; try {attempt + 2} of {self.options.retries + 1} follows")
                # Not seeded: it spreads clients in time and does not affect what is read.
                time.sleep(max(wait * (0.5 + random.random()), min(problem.wait, LONGEST_ASKED)))
        raise StoreError(f"{address}: {attempt + 1} tries, the last: {problem.text} (data.store.retries)")


def _say(text: str) -> None:
    """Print a line for the person who waits, at most one a minute from each process."""
    global _said
    if time.monotonic() - _said >= SAID_EVERY:
        _said = time.monotonic()
        print(f"molmo2: {text}", file=sys.stderr, flush=True)


def problem_of(error: Exception) -> Problem | None:
    """What an error of fsspec, or of the libraries beneath, means; None for a fault in a program."""
    status, headers = _status(error)
    text = _words(error)
    if status is not None:
        said = f"the server answers {status} ({text})"
        if status in (404, 410):
            return Problem(f"it is not there ({said})", Gone)
        if status in (401, 403):
            return Problem(f"{said}: no permission; see docs/object_stores.md, Credentials", Refused)
        if status in TRANSIENT:
            asked = str((headers or {}).get("Retry-After", ""))
            return Problem(said, wait=float(asked) if asked.isdigit() else 0.0)
        return Problem(said, StoreError)
    if isinstance(error, FileNotFoundError):
        return Problem(f"it is not there ({text})", Gone)
    if isinstance(error, PermissionError):
        return Problem(f"the store refuses it ({text}); see docs/object_stores.md, Credentials", Refused)
    if "Credential" in type(error).__name__ or "TokenRetrieval" in type(error).__name__:
        return Problem(f"no credentials ({text}); see docs/object_stores.md, Credentials", Refused)
    if isinstance(error, OSError) and error.errno == 22:  # what s3fs makes of a range beyond the end
        return Problem(f"the store refuses the request ({text}); is the file cut off?", StoreError)
    if isinstance(error, (TypeError, AttributeError, NameError, KeyError, AssertionError, NotImplementedError)):
        return None
    return Problem(text)


def _status(error: BaseException | None) -> tuple[int | None, Any]:
    """The HTTP status and headers that an error carries, or one that it was raised from."""
    while error is not None:
        status = getattr(error, "status", None)
        answer = getattr(error, "response", None)
        if status is None and isinstance(answer, dict):  # of botocore
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(status, int) and status >= 400:
            return status, getattr(error, "headers", None)
        error = error.__cause__
    return None, None


def _words(error: BaseException) -> str:
    """One line of an error."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error
    text = " ".join(str(getattr(cause, "message", "") or cause).split())[:200]
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__


def open_filesystem(folder: Address, options: StoreConfig) -> Any:
    """fsspec's file system of an address.

    Raises:
        StoreError: the package for its scheme is missing, or nobody knows the scheme.
    """
    import fsspec

    scheme = folder.scheme
    if scheme not in fsspec.available_protocols():
        raise StoreError(f"{folder}: {scheme}:// is not a scheme that fsspec knows; s3://, gs:// and https:// are")
    try:
        kind = fsspec.get_filesystem_class(scheme)
        files = kind(**_settings(scheme, options), **_loop_for(kind), skip_instance_cache=True)
    except ImportError as error:
        how = EXTRAS.get(scheme, "install it with pip")
        raise StoreError(f"{folder}: a package is missing to read {scheme}:// ({_words(error)}): {how}") from None
    if isinstance(getattr(files, "retries", None), int):
        files.retries = 1  # tries are counted and spaced here
    return files


def _loop_for(kind: Any) -> dict[str, Any]:
    """The argument with this process's loop. fsspec's own is, after a fork, one that nobody runs."""
    import asyncio

    from fsspec.asyn import AsyncFileSystem

    if not issubclass(kind, AsyncFileSystem):
        return {}
    if os.getpid() not in _loops:
        loop = _loops[os.getpid()] = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="object store", daemon=True).start()
    return {"loop": _loops[os.getpid()]}


def _settings(scheme: str, options: StoreConfig) -> dict[str, Any]:
    """Time limits for a scheme's library, under what the user's configuration of fsspec says."""
    from fsspec.config import conf

    if scheme in ("s3", "s3a"):
        own = {"connect_timeout": CONNECT, "read_timeout": options.timeout, "retries": {"total_max_attempts": 1}}
        return {"config_kwargs": own | dict(conf.get("s3", {}).get("config_kwargs", {}))}
    if scheme in NO_LISTING:
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=options.timeout)
        return {"client_kwargs": {"timeout": limits, "trust_env": True} | conf.get(scheme, {}).get("client_kwargs", {})}
    return {}


def _stored(entry: dict[str, Any]) -> StoredFile:
    known = [str(entry[name]) for name in VERSIONS if entry.get(name)]
    known = known or [str(entry[name]) for name in TIMES if entry.get(name)]
    size = entry.get("size")
    return StoredFile(None if size is None else int(size), f"{size} {' '.join(known)}" if known else "")
