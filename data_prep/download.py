"""Downloads over https into a cache: retries with back-off, limits of rate and of connections to a host, size caps,
checksums, resumed transfers.

A transfer is resumed only where the server's file is still the one that was begun (If-Range with its ETag or date, and
its size); else it starts over. Plain http is refused, on redirects too. A file that the server reports as permanently
gone is remembered, so that later runs do not request it; remove `*.gone` below the cache to try it again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from molmo2_nemo.data.coverage import FAILED as FAILED  # the one reason that is temporary; all others are permanent
from molmo2_nemo.errors import DataError, UserError

CHUNK = 1 << 18
RETRIES = 5
BACKOFF = 1.0  # seconds before the second try; doubled each time, with up to half of it added at random
LONGEST_WAIT = 60.0  # seconds between tries; a server that asks for more is not asked again in this call
TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two pieces
GONE = frozenset({400, 401, 403, 404, 405, 406, 410, 414, 415, 451})  # status codes for which a retry is pointless
AGENT = "molmo2_nemo data_prep"


class DownloadError(DataError):
    """A file cannot be downloaded. `reason` is a short, countable text."""

    def __init__(self, url: str, reason: str, detail: str = ""):
        super().__init__(f"{url}: {reason}{f' ({detail})' if detail else ''}")
        self.url, self.reason, self.detail = url, reason, detail

    def __reduce__(self):
        return type(self), (self.url, self.reason, self.detail)


class Cancelled(BaseException):
    """The transfer was stopped by `Downloader.cancel`, as after Ctrl-C."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What is known of a file before it is downloaded."""

    size: int | None = None  # bytes
    sha256: str | None = None
    sha1: str | None = None

    def problem(self, path: Path) -> tuple[str, str] | None:
        """(reason, detail) of how a file differs; None if it does not."""
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            return "wrong size", f"{size} bytes; {self.size} were expected"
        for kind, wanted in (("sha256", self.sha256), ("sha1", self.sha1)):
            if wanted is not None and (found := _digest(path, kind)) != wanted.lower():
                return "wrong checksum", f"its {kind} is {found}; expected {wanted}"
        return None


class Problem(NamedTuple):
    """Why one try failed."""

    text: str
    wait: float | None = None  # seconds until the server may be asked again, where it says so
    silent: bool = False  # no answer came at all


class Downloader:
    """Fetches into `cache`; safe to use from several threads and processes at once.

    Args:
        max_bytes: of one file.
        rate: at most this many downloads are started per second; 0 = no limit.
        verify: as in `requests`: True, or a file of certificates to trust.
        per_host: at most this many connections of this process to one host; 0 = no limit.
        dead_after: files without any answer after which a host is not asked again by this object; 0 = never.
        remember_gone: write down which files are permanently gone.
        watch: called with (URL, bytes that are there, bytes in all or None) as they come.
    """

    def __init__(
        self,
        cache: Path,
        *,
        max_bytes: int = 4 * 2**30,
        rate: float = 0.0,
        retries: int = RETRIES,
        backoff: float = BACKOFF,
        verify: bool | str = True,
        per_host: int = 0,
        dead_after: int = 0,
        remember_gone: bool = True,
        watch: Callable[[str, int, int | None], None] | None = None,
    ):
        self.cache, self.max_bytes, self.rate = cache, max_bytes, rate
        self.retries, self.backoff, self.verify = retries, backoff, verify
        self.per_host, self.dead_after, self.remember_gone, self.watch = per_host, dead_after, remember_gone, watch
        self.dead: dict[str, str] = {}  # host -> why it is not asked again
        self._made_here()

    def _made_here(self) -> None:
        """What belongs to this process: connections, locks."""
        self._next = 0.0  # earliest start of the next download
        self._session: Any = None
        self._lock = threading.Lock()
        self._places: dict[str, threading.BoundedSemaphore] = {}  # host -> its free connections
        self._silent: dict[str, int] = {}  # host -> files in a row without an answer
        self._cancelled = threading.Event()

    def __getstate__(self) -> dict[str, Any]:  # workers open their own connections
        made_here = ("_next", "_session", "_lock", "_places", "_silent", "_cancelled")
        return {name: value for name, value in self.__dict__.items() if name not in made_here}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._made_here()

    def cancel(self) -> None:
        """Transfers in other threads end soon, with `Cancelled`; what has come stays, for the next run."""
        self._cancelled.set()

    def fetch(
        self,
        url: str,
        sha256: str | None = None,
        *,
        expected: Expected | None = None,
        headers: dict[str, str] | None = None,
    ) -> Path:
        """The cached file of a URL, downloaded if it is not in the cache.

        Args:
            headers: sent to this host only, such as an authorization.
        Raises:
            DownloadError: not https, gone, too large, wrong size or checksum, a dead host, or still failing after all
                tries.
            UserError: the disk has no room for it.
            OSError: the cache cannot be written (the disk is full).
            Cancelled: `cancel` was called.
        """
        if not url.startswith("https://"):
            raise DownloadError(url, "not https", "only https is fetched")
        expected = expected or Expected(sha256=sha256)
        path = self.place(url)
        gone = path.with_suffix(".gone")
        if not path.exists():
            if self.remember_gone and gone.exists():
                raise DownloadError(url, "gone", gone.read_text(errors="replace"))
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._connection_to(url):
                self._try(url, path, gone, headers or {})
        problem = expected.problem(path)
        if problem is not None:
            path.unlink(missing_ok=True)
            raise DownloadError(url, *problem)
        return path

    def place(self, url: str) -> Path:
        """Where the file of a URL is, or will be, in the cache."""
        name = hashlib.sha256(url.encode()).hexdigest()
        return self.cache / name[:2] / name

    @contextmanager
    def _connection_to(self, url: str) -> Iterator[None]:
        """One of the host's connections is ours.

        Raises:
            DownloadError: the host is dead.
        """
        host = urlsplit(url).netloc
        with self._lock:
            place = self._places.setdefault(host, threading.BoundedSemaphore(self.per_host or 1 << 20))
        with place:
            if host in self.dead:
                raise DownloadError(url, FAILED, f"{host} is not asked again in this run: {self.dead[host]}")
            yield

    def _answered(self, url: str, problem: Problem | None) -> None:
        """Remember whether a host answers, after all tries of one file."""
        host = urlsplit(url).netloc
        with self._lock:
            silent = self._silent[host] = self._silent.get(host, 0) + 1 if problem and problem.silent else 0
            if self.dead_after and problem is not None:
                if silent >= self.dead_after:
                    self.dead[host] = problem.text
                elif problem.wait is not None and problem.wait > LONGEST_WAIT:
                    self.dead[host] = f"it asks to wait {problem.wait:,.0f} s ({problem.text})"

    def _try(self, url: str, path: Path, gone: Path, headers: dict[str, str]) -> None:
        """Download with all tries. A partial file is kept for the next run, unless it is refused."""
        part = path.with_suffix(".part")  # not files.atomic, which discards a partial file
        begun = path.with_suffix(".begun")
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # one thread of one process downloads; the others wait
            if path.exists():
                part.unlink(missing_ok=True)
                return
            try:
                self._tries(url, file, begun, headers)
                os.replace(part, path)
                begun.unlink(missing_ok=True)
            except DownloadError as error:
                if error.reason == "gone" and self.remember_gone:
                    gone.write_text(error.detail)
                if error.reason != FAILED or not file.tell():
                    part.unlink(missing_ok=True)
                    begun.unlink(missing_ok=True)
                raise

    def _tries(self, url: str, file: Any, begun: Path, headers: dict[str, str]) -> None:
        import requests

        problem: Problem | None = None
        for attempt in range(self.retries):
            if problem is not None:
                if problem.wait is not None and problem.wait > LONGEST_WAIT:
                    break
                self._wait(attempt, problem)
            self._pace()
            try:
                problem = self._once(url, file, begun, headers)
            except requests.exceptions.InvalidSchema as error:
                raise DownloadError(url, "not https", f"redirected: {error}") from None
            except requests.exceptions.ConnectionError as error:
                silent = not isinstance(error, requests.exceptions.ChunkedEncodingError)
                problem = Problem(_text(error), silent=silent)
            except (requests.RequestException, ConnectionError, TimeoutError) as error:
                problem = Problem(_text(error), silent=isinstance(error, requests.exceptions.Timeout))
            if problem is None:
                file.flush()
                break
        self._answered(url, problem)
        if problem is not None:
            asked = f", asks to wait {problem.wait:,.0f} s" if problem.wait else ""
            raise DownloadError(url, FAILED, f"{attempt + 1} tries, the last: {problem.text}{asked}")

    def _once(self, url: str, file: Any, begun: Path, headers: dict[str, str]) -> Problem | None:
        """One try, which resumes where an earlier one stopped. Returns what failed, None on success."""
        from requests import exceptions

        have, known = file.seek(0, os.SEEK_END), _read_begun(begun)
        if have and have == known.get("size"):
            return None  # stopped after the last byte
        asked = {"User-Agent": AGENT, "Accept-Encoding": "identity", **headers}
        if have:
            asked["Range"] = f"bytes={have}-"
            if known.get("version"):
                asked["If-Range"] = known["version"]
        with self._connection().get(url, headers=asked, stream=True, timeout=TIMEOUT, verify=self.verify) as answer:
            if answer.status_code in GONE:
                raise DownloadError(url, "gone", f"status {answer.status_code}")
            if answer.status_code == 416:  # the partial file is not the start of the current one
                file.truncate(0)
                return Problem("status 416")
            if answer.status_code not in (200, 206):
                return Problem(f"status {answer.status_code}", _retry_after(answer.headers.get("Retry-After", "")))
            total = self._begin(url, answer, file, have, begun, known)
            if isinstance(total, Problem):
                return total
            have = file.seek(0, os.SEEK_END)
            try:
                for chunk in answer.iter_content(CHUNK):
                    have += len(chunk)
                    if have > self.max_bytes:
                        raise DownloadError(url, "too large", f"more than {self.max_bytes} bytes")
                    file.write(chunk)
                    self._came(url, have, total)
            except (exceptions.ConnectionError, exceptions.ChunkedEncodingError) as error:
                return Problem(_text(error))
        if total is not None and have < total:
            return Problem(f"cut off after {have} of {total} bytes")
        return None if have else Problem("empty answer")

    def _begin(
        self, url: str, answer: Any, file: Any, have: int, begun: Path, known: dict[str, Any]
    ) -> int | None | Problem:
        """Make `file` ready for an answer's content, and note which version it is.

        Returns: bytes of the whole file, None if unknown; or why the answer cannot be used.
        """
        total = _whole_size(answer, have)
        if answer.status_code == 206:
            start = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
            other_size = total is not None and known.get("size") not in (None, total)
            if (start and int(start[1]) != have) or other_size:
                file.truncate(0)
                begun.unlink(missing_ok=True)
                return Problem("the file on the server has changed" if other_size else "answered with another range")
        else:
            file.truncate(0)
            have = 0
        if total is not None and total > self.max_bytes:
            raise DownloadError(url, "too large", f"{total} bytes; at most {self.max_bytes}")
        free = shutil.disk_usage(begun.parent).free
        if total is not None and total - have > free:
            raise UserError(f"no room in {self.cache}: {url} needs {total - have:,} more bytes, {free:,} are free")
        tag = answer.headers.get("ETag", "")
        version = "" if tag.startswith("W/") else tag
        begun.write_text(json.dumps({"version": version or answer.headers.get("Last-Modified", ""), "size": total}))
        return total

    def _came(self, url: str, have: int, total: int | None) -> None:
        if self._cancelled.is_set():
            raise Cancelled
        if self.watch is not None:
            self.watch(url, have, total)

    def _connection(self) -> Any:
        if self._session is None:
            import requests

            session = requests.Session()
            session.adapters.clear()  # so that a redirect to http finds no adapter
            session.mount("https://", requests.adapters.HTTPAdapter(pool_maxsize=32))
            session.max_redirects = 5
            self._session = session
        return self._session

    def _pace(self) -> None:
        if self.rate <= 0:
            return
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + 1.0 / self.rate
        time.sleep(max(0.0, start - now))

    def _wait(self, attempt: int, problem: Problem) -> None:
        wait = max(self.backoff * 2 ** (attempt - 1), problem.wait or 0.0)
        # Not seeded: it spreads clients in time and does not affect the output.
        if self._cancelled.wait(min(wait * (1 + random.random() / 2), LONGEST_WAIT)):
            raise Cancelled


def _whole_size(answer: Any, have: int) -> int | None:
    """Bytes of the whole file that an answer is about, of which it may give the part from `have` on."""
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        return None  # its length is that of the packed content
    length = answer.headers.get("Content-Length", "")
    if answer.status_code == 206:
        total = re.search(r"/(\d+)$", answer.headers.get("Content-Range", ""))
        if total:
            return int(total[1])
        return have + int(length) if length.isdigit() else None
    return int(length) if length.isdigit() else None


def _read_begun(path: Path) -> dict[str, Any]:
    """What is known of a partial file: its `version` on the server and its `size` in bytes."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _retry_after(value: str) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None without one."""
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _digest(path: Path, kind: str) -> str:
    made = hashlib.new(kind)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            made.update(chunk)
    return made.hexdigest()


def _text(error: BaseException) -> str:
    """One line; of an error that wraps others, which begin with the address once more, the innermost cause."""
    text = " ".join(str(error).split())
    cause = re.search(r"Caused by (\w+)\((.*)", text)
    if cause is None:
        return f"{type(error).__name__}: {text[:120]}"
    words = re.sub(r"<[^>]*>|HTTPSConnectionPool\([^)]*\)", "", cause[2]).strip("'\": )")
    return f"{type(error).__name__}, {cause[1]}: {words[:160]}"
