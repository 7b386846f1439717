"""Finding and fetching media: media references -> files and bytes, looked at (probe.py)."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from data_prep.archive import ArchiveError, unpack
from data_prep.download import FAILED, Downloader, DownloadError
from data_prep.encode import encode_frames
from data_prep.media_kinds import NOT_FOUND, MediaError, StillImage, Video
from data_prep.no_file import is_file, why_not
from data_prep.probe import probe_image, probe_video
from data_prep.sources.base import (
    ArchiveMember,
    Cut,
    File,
    FilmFrames,
    FirstOf,
    Frames,
    HubFile,
    Inline,
    Lettered,
    Match,
    Media,
    Prepared,
    SourceError,
    Stored,
    Url,
)
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.record import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from molmo2_nemo.errors import DataError

T = TypeVar("T")
SUFFIXES = (*sorted(VIDEO_SUFFIXES), *sorted(IMAGE_SUFFIXES))
FETCH_THREADS = 16  # concurrent transfers in each worker


@dataclass
class Resolver:
    """Turns media references into local files and bytes.

    Args:
        folders: searched for `File`s in this order (--source).
        cache: downloads, unpacked archives, encoded frame folders.
        prepared: folder that holds other prepared data sets.
        max_bytes: largest media file.
        config: settings of the training that media are decoded for.
    """

    folders: tuple[Path, ...]
    cache: Path
    downloader: Downloader
    prepared: Path | None = None
    max_bytes: int = 4 * 2**30
    config: DataConfig = field(default_factory=DataConfig)
    _sets: dict[str, Any] = field(default_factory=dict, repr=False)

    def prefetch(self, media: list[Media]) -> None:
        """Download all URLs concurrently; a failure is reported when the media are read."""
        urls = [m for m in dict.fromkeys(self._leaves(media)) if isinstance(m, Url)]
        if len(urls) < 2:
            return
        with ThreadPoolExecutor(min(FETCH_THREADS, len(urls))) as pool:
            for result in [pool.submit(self.downloader.fetch, secure(m.url), m.sha256) for m in urls]:
                if isinstance(result.exception(), Exception) and not isinstance(result.exception(), DownloadError):
                    result.result()

    def _leaves(self, media: Iterable[Media]) -> Iterator[Media]:
        """The single references that have to be fetched; of alternatives, the first that is not a missing file."""
        for one in media:
            while isinstance(one, (FirstOf, Cut, ArchiveMember)):
                if isinstance(one, FirstOf):
                    possible = (m for m in one.media if not isinstance(m, File) or self._there(m) is not None)
                    one = next(possible, one.media[-1])
                else:
                    one = one.video if isinstance(one, Cut) else one.archive
            yield one

    def read(self, media: Media) -> tuple[bytes, str | None]:
        """(encoded bytes, suffix if the reference has one).

        Raises:
            MediaError: not found, refused, or too large.
            OSError: the cache cannot be written.
        """
        if isinstance(media, Inline):
            return media.data, media.suffix
        if isinstance(media, Stored):
            return self._stored(media), media.suffix
        if isinstance(media, Prepared):
            return self._from_prepared(media)
        if isinstance(media, FirstOf):
            return self.first(media, self.read)
        if isinstance(media, Lettered):
            return self._lettered(media)
        path, name = self.file(media)
        try:
            return path.read_bytes(), _suffix(name)
        except OSError as error:
            raise MediaError(NOT_FOUND, f"{path} cannot be read: {error.strerror}") from None

    def _stored(self, media: Stored) -> bytes:
        if media.size > self.max_bytes:
            raise MediaError("too large", f"{media.size} bytes; at most {self.max_bytes} (--max-media-mb)")
        try:
            return media.read()
        except (OSError, DataError) as error:
            raise MediaError(NOT_FOUND, f"cannot be read: {error}") from None

    def first(self, media: FirstOf, get: Callable[[Media], T]) -> T:
        """`get` of the first alternative that is found."""
        missing = MediaError(NOT_FOUND, "no alternatives")
        for one in media.media:
            try:
                return get(one)
            except MediaError as error:
                if error.reason != NOT_FOUND:
                    raise
                missing = error
        raise missing

    def _lettered(self, media: Lettered) -> tuple[bytes, str]:
        from data_prep.lettering import draw_letters

        content, _ = self.read(media.image)
        try:
            return draw_letters(content, media.boxes, beside=media.beside), "png"
        except (OSError, ValueError) as error:
            raise MediaError("image cannot be decoded", str(error)[:300]) from None

    def file(self, media: Media) -> tuple[Path, str]:
        """(local file, a name whose suffix gives the type) of media that are not in memory.

        Raises:
            MediaError: as `read`.
        """
        path, name = self._locate(media)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise MediaError(NOT_FOUND, f"{path} cannot be read: {error.strerror}") from None
        if size > self.max_bytes:
            raise MediaError("too large", f"{path}: {size} bytes; at most {self.max_bytes} (--max-media-mb)")
        return path, name

    def _locate(self, media: Media) -> tuple[Path, str]:
        """(local file, a name whose suffix gives the type); the size is not checked."""
        try:
            if isinstance(media, Url):
                return self.downloader.fetch(secure(media.url), media.sha256), media.url.partition("?")[0]
            if isinstance(media, File):
                path = self._find(media)
                return path, path.name
            if isinstance(media, HubFile):
                path = self._hub(media)
                return path, media.path
            if isinstance(media, ArchiveMember):
                path = self._member(media)
                return path, path.name
            if isinstance(media, Frames):
                path = encode_frames(self._folder(media.folder), media, self.cache / "frames")
                return path, path.name
            if isinstance(media, FilmFrames):
                from data_prep.film_cuts import encode_film_frames

                film, _ = self.file(media.video)
                path = encode_film_frames(film, media, self.cache / "frames", self.config.limits)
                return path, path.name
        except DownloadError as error:
            raise MediaError(error.reason, str(error)) from None
        except SourceError as error:  # of the Hub
            raise MediaError(FAILED, str(error)) from None
        except ArchiveError as error:
            raise MediaError("bad archive", str(error)) from None
        raise AssertionError(f"unknown medium {media!r}")

    def _find(self, media: File) -> Path:
        if not self.folders:
            raise MediaError(NOT_FOUND, f"{media.paths[0]}: give the folder that holds it with --source")
        found = self._there(media)
        if found is None:
            places: dict[Path, str] = {}  # each once, as it was named first
            for folder in self.folders:
                places.setdefault(folder.resolve(), str(folder))
            below = ", ".join(places.values())
            outside = any(is_file(Path(path)) for path in media.paths if Path(path).is_absolute())
            hint = "; it is there, but outside of these: name its folder with --source" if outside else ""
            candidates = (_below(folder, path) for folder in self.folders for path in media.paths)
            hint = hint or next((why for path in candidates if path is not None and (why := why_not(path))), "")
            raise MediaError(NOT_FOUND, f"{' or '.join(map(_shown, media.paths))} below {below}{hint}")
        return found

    def has(self, media: File | Frames) -> bool:
        """Whether a file or a folder of frames lies below one of the folders; nothing is opened."""
        if isinstance(media, File):
            return self._there(media) is not None
        found = (_below(folder, media.folder) for folder in self.folders)
        return any(path is not None and path.is_dir() for path in found)

    def below(self, name: str, *, folder: bool = False) -> tuple[Path, str] | None:
        """A file, or a folder, below one of the folders, and its path from there; None if there is none."""
        for root in self.folders:
            path = _below(root, name) if folder else find_below(root, name)
            if path is not None and (not folder or path.is_dir()):
                return path, os.path.relpath(path, root)
        return None

    def matching(self, pattern: str) -> tuple[Path, str] | None:
        """The file of a `Match` below one of the folders, and its path from there; None if there is none."""
        for root in self.folders:
            path = find_matching(root, pattern)
            if path is not None:
                return path, os.path.relpath(path, root)
        return None

    def local(self, media: File) -> Path | None:
        """Where a file lies below --source; None if it is not there. Nothing is opened."""
        return self._there(media)

    def _there(self, media: File) -> Path | None:
        """The first of a file's paths that exists below one of the folders; None if there is none."""
        find = find_matching if isinstance(media, Match) else find_below
        for path in media.paths:
            for folder in self.folders:
                found = find(folder, path)
                if found is not None:
                    return found
        return None

    def _folder(self, name: str) -> Path:
        for folder in self.folders:
            path = _below(folder, name)
            if path is not None and path.is_dir():
                return path
        raise MediaError(NOT_FOUND, f"folder {name} below {', '.join(map(str, self.folders)) or '--source'}")

    def _hub(self, media: HubFile) -> Path:
        for folder in self.folders:
            found = find_below(folder, media.path)
            if found is not None:
                return found
        from data_prep.hub import download_file

        return download_file(media.repo, media.path, media.revision)

    def _member(self, media: ArchiveMember) -> Path:
        archive, _ = self._locate(media.archive)
        stat = archive.stat()
        name = hashlib.sha256(f"{archive.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
        folder = unpack(archive, self.cache / "unpacked" / f"{archive.name[:40]}-{name}")
        found = find_below(folder, media.path)
        if found is None:
            raise MediaError(NOT_FOUND, f"{media.path} in {archive}")
        return found

    def _from_prepared(self, media: Prepared) -> tuple[bytes, str | None]:
        from molmo2_nemo.data.record import parse_record
        from molmo2_nemo.data.shards import ShardDataset

        if media.name not in self._sets:
            if self.prepared is None:
                raise MediaError(NOT_FOUND, f"data set {media.name} is not prepared here")
            self._sets[media.name] = ShardDataset(self.prepared / media.name, media.name)
        dataset = self._sets[media.name]
        label, members = dataset.read(media.record % len(dataset))
        record = parse_record(label, members)
        data = record.video if record.video is not None else None
        if data is None and record.images:
            data = record.images[media.image % len(record.images)]
        if data is None:
            raise MediaError(NOT_FOUND, f"record {label} of data set {media.name} has no image or video")
        suffix = next(s for s, content in members.items() if content is data)
        return data, suffix.rsplit(".", 1)[-1]

    # --- looking at them --------------------------------------------------------------------------------------------

    def image(self, media: Media) -> StillImage:
        """An image, decoded once to make sure that training can read it.

        Raises:
            MediaError: not found, not an image, truncated, or too many pixels.
        """
        data, _ = self.read(media)
        with _naming(media):
            return probe_image(data, self.config)

    def video(self, media: Media) -> Video:
        """A video, its packets scanned and its first frame decoded.

        Raises:
            MediaError: not found, not a video, damaged at the start, or too long.
        """
        if isinstance(media, FirstOf):
            return self.first(media, self.video)
        if isinstance(media, Cut):
            return self._cut(media)
        if isinstance(media, (Inline, Stored, Prepared)):
            content, suffix = self.read(media)
            with _naming(media):
                return probe_video(content, suffix, self.config)
        path, name = self.file(media)
        with _naming(media):
            return probe_video(path, _suffix(name), self.config)

    def _cut(self, media: Cut) -> Video:
        whole, part = self.video(media.video), (media.start, media.end)
        if media.whole_frames:
            from data_prep.film_cuts import whole_frames

            with _naming(media):
                part = whole_frames(whole.data, *part, self.config.limits)
        whole.part = part
        return whole


@contextmanager
def _naming(media: Media) -> Iterator[None]:
    """Errors say which medium they are about, as a record may have several."""
    try:
        yield
    except MediaError as error:
        name = name_of(media)
        raise MediaError(error.reason, f"{name}: {error.detail}" if name else error.detail) from None


def name_of(media: Media) -> str:
    """What a medium is called in its source; "" for bytes that came with a row."""
    if isinstance(media, Url):
        return media.url
    if isinstance(media, File):
        return " or ".join(media.paths)
    if isinstance(media, HubFile):
        return f"{media.repo}/{media.path}"
    if isinstance(media, Stored):
        return f"{media.name} in {PurePosixPath(media.path).name}"
    if isinstance(media, ArchiveMember):
        return f"{media.path} in {name_of(media.archive)}"
    if isinstance(media, Frames):
        return media.folder
    if isinstance(media, Prepared):
        return f"record {media.record} of data set {media.name}"
    if isinstance(media, FirstOf):
        return " or ".join(filter(None, map(name_of, media.media)))
    if isinstance(media, (Cut, FilmFrames)):
        return name_of(media.video)
    if isinstance(media, Lettered):
        return name_of(media.image)
    return ""


def secure(url: str) -> str:
    """The https form of an http address; most old links still work this way, and plain http is never fetched."""
    return f"https://{url.removeprefix('http://')}" if url.startswith("http://") else url


def _shown(path: str) -> str:
    """A path for a message, its middle left out where it is long."""
    return path if len(path) <= 300 else f"{path[:100]}...{path[-100:]} ({len(path)} characters)"


def _suffix(name: str) -> str | None:
    return PurePosixPath(name).suffix.lower().lstrip(".") or None


def find_below(folder: Path, name: str) -> Path | None:
    """The file `name` below `folder`. A name without a media suffix matches any; `x/` means its only media file."""
    path = _below(folder, name)
    if path is None:
        return None
    if is_file(path):
        return path
    if name.endswith("/") and path.is_dir():
        inside = sorted(entry for entry in path.iterdir() if entry.suffix.lower().lstrip(".") in SUFFIXES)
        return inside[0] if len(inside) == 1 else None
    if path.suffix.lower().lstrip(".") in SUFFIXES:
        return None
    for suffix in SUFFIXES:
        candidate = path.with_name(f"{path.name}.{suffix}")
        if is_file(candidate):
            return candidate
    return None


def find_matching(folder: Path, pattern: str) -> Path | None:
    """The first file below `folder`, by name, whose path matches; a pattern without a media suffix matches any."""
    ends = ("",) if PurePosixPath(pattern).suffix.lower().lstrip(".") in SUFFIXES else SUFFIXES
    found = sorted(
        {name for end in ends for name in glob.glob(f"{pattern}.{end}" if end else pattern, root_dir=folder)}
    )
    paths = (_below(folder, name) for name in found)
    return next((path for path in paths if path is not None and is_file(path)), None)


def _below(folder: Path, name: str) -> Path | None:
    """`folder / name` unless that leads outside: rows of a data set must not pick other files of this machine. Links in
    the folder were made by its owner and are followed."""
    if not name or "\0" in name:
        return None
    path = Path(os.path.normpath(folder / name))
    root = Path(os.path.normpath(folder))
    return path if path == root or root in path.parents else None
