"""Downloads over https into a cache: retries with back-off, a rate limit, size caps, checksums, resumed transfers.

Plain http is refused, on redirects too. A file that the server reports as permanently gone is remembered, so that later
runs do not request it; remove `*.gone` below the cache to try it again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import time
from pathlib import Path
from typing import Any

from molmo2_nemo.data.shards import file_sha256
from molmo2_nemo.errors import DataError

CHUNK = 1 << 18
RETRIES = 5
BACKOFF = 1.0  # seconds before the second try; doubled each time, with up to half of it added at random
LONGEST_WAIT = 60.0  # upper limit in seconds between tries, even if the server asks for more
TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two pieces
GONE = frozenset({400, 401, 403, 404, 405, 406, 410, 414, 415, 451})  # status codes for which a retry is pointless
FAILED = "download failed"  # the one reason that is temporary; all others are permanent
AGENT = "molmo2_nemo data_prep"


class DownloadError(DataError):
    """A file cannot be downloaded. `reason` is a short, countable text."""

    def __init__(self, url: str, reason: str, detail: str = ""):
        super().__init__(f"{url}: {reason}{f' ({detail})' if detail else ''}")
        self.url, self.reason, self.detail = url, reason, detail

    def __reduce__(self):
        return type(self), (self.url, self.reason, self.detail)


class Downloader:
    """Fetches into `cache`; safe to use from several threads and processes at once.

    Args:
        max_bytes: of one file.
        rate: at most this many downloads are started per second; 0 = no limit.
        verify: as in `requests`: True, or a file of certificates to trust.
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
    ):
        self.cache, self.max_bytes, self.rate = cache, max_bytes, rate
        self.retries, self.backoff, self.verify = retries, backoff, verify
        self._next = 0.0  # earliest start of the next download
        self._session: Any = None

    def __getstate__(self) -> dict[str, Any]:  # workers open their own connections
        return {**self.__dict__, "_session": None, "_next": 0.0}

    def fetch(self, url: str, sha256: str | None = None) -> Path:
        """The cached file of a URL, downloaded if it is not in the cache.

        Raises:
            DownloadError: not https, gone, too large, wrong checksum, or still failing after all tries.
            OSError: the cache cannot be written (the disk is full).
        """
        if not url.startswith("https://"):
            raise DownloadError(url, "not https", "only https is fetched")
        name = hashlib.sha256(url.encode()).hexdigest()
        path = self.cache / name[:2] / name
        gone = path.with_suffix(".gone")
        if not path.exists():
            if gone.exists():
                raise DownloadError(url, "gone", gone.read_text(errors="replace"))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._try(url, path, gone)
        if sha256 is not None and file_sha256(path) != sha256.lower():
            path.unlink(missing_ok=True)
            raise DownloadError(url, "wrong checksum", f"expected SHA-256 {sha256}")
        return path

    def _try(self, url: str, path: Path, gone: Path) -> None:
        """Download with all tries. A partial file is kept for the next run, unless it is refused."""
        part = path.with_suffix(".part")  # not files.atomic, which discards a partial file
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # one thread of one process downloads; the others wait
            if path.exists():
                part.unlink(missing_ok=True)
                return
            try:
                self._tries(url, file)
                os.replace(part, path)
            except DownloadError as error:
                if error.reason == "gone":
                    gone.write_text(error.detail)
                if error.reason != FAILED or not file.tell():
                    part.unlink(missing_ok=True)
                raise

    def _tries(self, url: str, file: Any) -> None:
        import requests

        problem = ""
        for attempt in range(self.retries):
            if attempt:
                self._wait(attempt, problem)
            self._pace()
            try:
                problem = self._once(url, file)
            except requests.exceptions.InvalidSchema as error:
                raise DownloadError(url, "not https", f"redirected: {error}") from None
            except (requests.RequestException, ConnectionError, TimeoutError) as error:
                problem = f"{type(error).__name__}: {str(error)[:120]}"
            if not problem:
                file.flush()
                return
        raise DownloadError(url, FAILED, f"{self.retries} tries, the last: {problem}")

    def _once(self, url: str, file: Any) -> str:
        """One try, which resumes where an earlier one stopped. Returns "" on success, else what failed."""
        have = file.seek(0, os.SEEK_END)
        headers = {"User-Agent": AGENT, "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with self._connection().get(url, headers=headers, stream=True, timeout=TIMEOUT, verify=self.verify) as answer:
            if answer.status_code in GONE:
                raise DownloadError(url, "gone", f"status {answer.status_code}")
            if answer.status_code == 416:  # the partial file is not the start of the current one
                file.truncate(0)
                return "status 416"
            if answer.status_code not in (200, 206):
                return f"status {answer.status_code} retry-after={answer.headers.get('Retry-After', '')}"
            if answer.status_code == 200:
                file.truncate(0)
                have = 0
            length = answer.headers.get("Content-Length", "")
            total = have + int(length) if length.isdigit() else None
            if total is not None and total > self.max_bytes:
                raise DownloadError(url, "too large", f"{total} bytes; at most {self.max_bytes}")
            for chunk in answer.iter_content(CHUNK):
                have += len(chunk)
                if have > self.max_bytes:
                    raise DownloadError(url, "too large", f"more than {self.max_bytes} bytes")
                file.write(chunk)
            if total is not None and have < total:
                return f"cut off after {have} of {total} bytes"
            return "" if have else "empty answer"

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

    def _wait(self, attempt: int, problem: str) -> None:
        wait = self.backoff * 2 ** (attempt - 1)
        asked = problem.partition("retry-after=")[2]
        if asked.isdigit():
            wait = max(wait, float(asked))
        # Not seeded: it spreads clients in time and does not affect the output.
        time.sleep(min(wait * (1 + random.random() / 2), LONGEST_WAIT))
