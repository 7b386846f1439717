"""`molmo2 prepare --fetch`: brings archives and files to the folders below --source that sources read."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from data_prep.archive import ArchiveError
from data_prep.bringing.catalogue import FETCHED, Catalogue, Item
from data_prep.bringing.journal import WORK, Journal
from data_prep.bringing.needs import filled, is_there
from data_prep.bringing.placing_files import is_archive_name, join, move, move_file, place_archive, wrong_kind
from data_prep.download import Downloader, DownloadError, Expected
from data_prep.sources.base import SourceError
from molmo2_nemo.errors import UserError
from molmo2_nemo.files import atomic

MAX_BYTES = 4 * 2**40  # of one archive
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BROUGHT, THERE, FAILED = "brought", "there", "failed"


@dataclass(frozen=True)
class Job:
    """One file to bring."""

    item: Item
    name: str  # as shown
    urls: tuple[str, ...]  # tried in this order; the first is its address in the journal
    into: str  # folder below --source
    file: str = ""  # its name there; "" = an archive that is unpacked
    expected: Expected = Expected()
    headers: dict[str, str] = field(default_factory=dict, hash=False)
    alone: bool = True  # nothing else belongs to its item


@dataclass(frozen=True)
class Result:
    """What became of a file, or of an item."""

    item: Item
    name: str
    state: str
    size: int = 0  # bytes brought now
    detail: str = ""


@dataclass
class Fetcher:
    """Brings items to `root`; a second call brings only what is missing."""

    root: Path
    downloader: Downloader
    catalogue: Catalogue
    parallel: int = 4
    keep_archives: bool = False
    begun: Callable[[Job], None] = lambda job: None
    ended: Callable[[Result], None] = lambda result: None

    def __post_init__(self) -> None:
        self.journal = Journal(self.root)
        self.work = self.root / WORK

    def bring(self, items: Sequence[Item]) -> list[Result]:
        """Bring everything of these items that may be fetched, several at once.

        Raises:
            UserError: the disk is full; what has come stays.
        """
        results, jobs = [], list[tuple[Job, ...]]()
        for item in items:
            if item.how not in FETCHED:
                continue
            if self.is_done(item):
                results.append(Result(item, item.what, THERE))
                continue
            try:
                found = list(self._jobs(item))
            except SourceError as error:
                results.append(Result(item, item.what, FAILED, detail=str(error)))
                continue
            jobs += [tuple(found)] if item.joined else [(job,) for job in found]
        for result in results:
            self.ended(result)
        return results + self._all(jobs)

    def is_done(self, item: Item) -> bool:
        """All its files came, or it lay there before anything was brought."""
        overlapping = {other.name for other in self.catalogue.items.values() if set(other.there) & set(item.there)}
        if not self.journal.knows(overlapping | {item.name}):
            return is_there(item, self.root)
        return self.journal.state(item.name, "") == "done" and (is_there(item, self.root) or not item.there)

    def _all(self, jobs: list[tuple[Job, ...]]) -> list[Result]:
        results: list[Result] = []
        with ThreadPoolExecutor(self.parallel) as pool:
            running: list[Future[list[Result]]] = [pool.submit(self._run, together) for together in jobs]
            try:
                for future in as_completed(running):
                    results += future.result()
            except BaseException as error:
                self.downloader.cancel()
                pool.shutdown(cancel_futures=True)
                if isinstance(error, OSError) and error.errno in FULL:
                    raise UserError(
                        f"{error.filename or self.root}: {error.strerror}. What has come stays in {self.work}; "
                        "make room and run the command again"
                    ) from None
                raise
        for item in {result.item.name: result.item for result in results}.values():
            if all(result.state != FAILED for result in results if result.item.name == item.name):
                self.journal.note(item.name, "", "done")
        return results

    # --- one file ----------------------------------------------------------------------------------------------------

    def _run(self, jobs: tuple[Job, ...]) -> list[Result]:
        """Bring one file, or the pieces of one archive."""
        first = jobs[0]
        known = all(self.journal.state(job.item.name, job.urls[0]) == "done" for job in jobs)
        says = bool(first.item.there) and first.alone  # the item itself says whether this is there
        if known and (is_there(first.item, self.root) if says else filled(self.root / first.into / first.file)):
            return [Result(job.item, job.name, THERE) for job in jobs]
        try:
            paths = [self._fetch(job) for job in jobs]
            size = sum(path.stat().st_size for path in paths)
            whole = paths[0]
            if first.item.joined:
                whole = join(paths, self.work / f"{first.item.name}.joined")
            problem = wrong_kind(whole, archive=not first.file, name=first.file)
            if problem:
                for path in {whole, *paths}:
                    path.unlink(missing_ok=True)
                raise DownloadError(first.urls[0], "not the file", problem)
            self._place(first, whole)
            for job in jobs:
                self.journal.note(job.item.name, job.urls[0], "done", size=size, into=job.into)
            self._tidy(first, {whole, *paths})
            result = Result(first.item, first.name, BROUGHT, size)
        except (DownloadError, ArchiveError) as error:
            result = Result(first.item, first.name, FAILED, detail=str(error))
        self.ended(result)
        return [result]

    def _fetch(self, job: Job) -> Path:
        """The downloaded file, from the first address that has it.

        Raises:
            DownloadError: none has; says what each answered.
        """
        self.begun(job)
        failures = []
        for url in job.urls:
            try:
                return self.downloader.fetch(url, expected=job.expected, headers=job.headers)
            except DownloadError as error:
                failures.append(error)
        closed = job.item.how == "hub" and any(code in failures[0].detail for code in ("401", "403"))
        hint = f"accept the terms of {job.item.repo} on its page and log in (hf auth login)" if closed else ""
        if len(failures) == 1 and not hint:
            raise failures[0]
        raise DownloadError(
            job.urls[0], failures[0].reason, "; ".join([*(f.detail for f in failures), hint]).strip("; ")
        )

    def _place(self, job: Job, path: Path) -> None:
        into = self.root / job.into
        if job.file:
            into.mkdir(parents=True, exist_ok=True)
            if self.keep_archives:
                with atomic(into / job.file) as part:
                    shutil.copyfile(path, part)
            else:
                move_file(path, into / job.file)
            return
        unpacked = self._unpacked(job)
        self.journal.note(job.item.name, job.urls[0], "placing")
        place_archive(path, job.item, into, unpacked)
        for inner, to in job.item.nested.items():
            archive = self.root / inner
            if not archive.is_file():
                raise ArchiveError(f"{job.urls[0]}: it was expected to hold {inner}")
            self._nested(archive, self.root / to)

    def _nested(self, archive: Path, to: Path) -> None:
        from data_prep.archive import unpack

        unpacked = self.work / "unpacked" / f"{archive.name}-{_short(str(archive))}"
        move(unpack(archive, unpacked), to)
        shutil.rmtree(unpacked, ignore_errors=True)
        archive.unlink(missing_ok=True)

    def _unpacked(self, job: Job) -> Path:
        return self.work / "unpacked" / f"{job.item.name}-{_short(job.urls[0])}"

    def _tidy(self, job: Job, paths: set[Path]) -> None:
        """Remove what is not needed any more."""
        shutil.rmtree(self._unpacked(job), ignore_errors=True)
        if not self.keep_archives:
            for path in paths:
                path.unlink(missing_ok=True)

    # --- which files -------------------------------------------------------------------------------------------------

    def _jobs(self, item: Item) -> Iterator[Job]:
        """The files of an item.

        Raises:
            SourceError: the repository cannot be listed, or has no such files.
        """
        if item.how == "fetch":
            yield Job(item, item.what, item.urls, item.into, item.file, Expected(sha1=item.sha1 or None))
            return
        files = hub_files(item.repo, item.files)
        for file in files:
            path = PurePosixPath(file.path)
            stem = path.name.split(".")[0]
            folder = "" if str(path.parent) == "." else str(path.parent)
            into = item.into.format(dir=folder, top=path.parts[0], stem=stem)
            archive = item.joined or is_archive_name(path.name)
            expected, alone = Expected(file.size, file.sha256), item.joined or len(files) == 1
            yield Job(item, file.path, (file.url,), into, "" if archive else path.name, expected, file.headers, alone)


@dataclass(frozen=True)
class HubFileInfo:
    """A file of a repository on the Hub, as its listing has it."""

    path: str
    url: str
    size: int | None
    sha256: str | None
    headers: dict[str, str] = field(hash=False)


def hub_files(repo: str, patterns: Sequence[str]) -> list[HubFileInfo]:
    """Files of a data set repository that match a pattern, by name.

    Raises:
        SourceError: the Hub cannot be reached, the terms are not accepted, or no file matches.
    """
    from huggingface_hub import HfApi, constants, get_token

    endpoint, token = constants.ENDPOINT, get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        api = HfApi(endpoint=endpoint)
        tree = api.list_repo_tree(repo, recursive=True, repo_type="dataset")
        listed: list[Any] = [entry for entry in tree if hasattr(entry, "size")]  # files, not folders
    except Exception as error:  # the library raises many types with helpful messages
        hint = ""
        if type(error).__name__ in ("GatedRepoError", "RepositoryNotFoundError"):
            hint = f"; accept its terms at {endpoint}/datasets/{repo}, and log in (hf auth login)"
        raise SourceError(f"files of {repo} cannot be listed: {' '.join(str(error).split())[:200]}{hint}") from None
    found = [entry for entry in listed if any(fnmatch.fnmatchcase(entry.path, pattern) for pattern in patterns)]
    if not found:
        there = ", ".join(sorted(entry.path for entry in listed)[:6]) or "none"
        raise SourceError(f"{repo} has no file {' or '.join(patterns)} (there are: {there})")
    return [
        HubFileInfo(
            entry.path,
            f"{endpoint}/datasets/{repo}/resolve/main/{quote(entry.path)}",
            entry.size,
            entry.lfs.sha256 if entry.lfs else None,
            headers,
        )
        for entry in sorted(found, key=lambda entry: entry.path)
    ]


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
