"""One source -> one data set of shards: rows, samples, media, shards, manifest.

The main process turns rows into samples and writes the records, in the source's order; worker processes fetch and
decode media. The output depends only on rows, media and settings, not on the number of workers or on interruptions.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.download import FAILED, Downloader
from data_prep.media import NOT_FOUND, Resolver
from data_prep.output import Output
from data_prep.own_files import OwnRows, find_rows
from data_prep.record_builder import BuildOptions, Built, build_all
from data_prep.run_limits import changed
from data_prep.sources import own
from data_prep.sources.base import Context, Hub, Inline, Row, Sample, Skip, Source, SourceError, convert
from data_prep.tables import Tables
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.manifest import MANIFEST, read_head
from molmo2_nemo.errors import UserError
from molmo2_nemo.processes import die_with_parent

BATCH_ITEMS = 32  # samples sent to a worker together; videos count as more than one
VIDEO_WEIGHT = 8
BATCH_INLINE_BYTES = 32 * 2**20
BATCHES_PER_WORKER = 2  # in flight at once
GIVE_UP_AFTER = 200  # samples of which none became a record, all for one reason: the cause is a general one
OUTAGE_AFTER = 50  # consecutive failed downloads: the network is at fault, not the files
Item = Sample | Skip


@dataclass(frozen=True)
class Options:
    """The options of `molmo2 prepare`. Those in `settings` determine the output."""

    seed: int = 0
    limit: int = 0  # samples; 0 = all
    bytes_per_shard: int = 10**9
    records_per_shard: int = 10_000
    max_media_bytes: int = 4 * 2**30
    build: BuildOptions = field(default_factory=BuildOptions)
    workers: int = 0  # worker processes; 0 = work in the main process
    folders: tuple[Path, ...] = ()  # --source
    cache: Path = Path(".cache")
    rate: float = 0.0  # downloads per second, all workers together
    verify: bool | str = True  # certificates of https
    overwrite: bool = False
    repeat_media: bool = False  # write media into every record that shows them, not once
    strict: bool = False  # fail at the first sample that cannot be used
    config: DataConfig = field(default_factory=DataConfig)  # of the training that records are checked for

    def settings(self, source: Source) -> dict[str, Any]:
        """The settings that determine the output; a data set made with others is refused."""
        return {
            "name": source.name,
            "origin": _origin(source),
            "seed": self.seed,
            "limit": self.limit,
            "bytes_per_shard": self.bytes_per_shard,
            "records_per_shard": self.records_per_shard,
            "max_media_bytes": self.max_media_bytes,
            # Left out where it changes nothing: data sets prepared before it was known are the same.
            **({"repeat_media": True} if self.repeat_media else {}),
            **{name: value for name, value in asdict(self.build).items() if name != "gop" or value},
            **({"checked_for": checked} if (checked := changed(self.config)) else {}),
        }


@dataclass
class Summary:
    """The result of preparing one data set."""

    head: dict[str, Any]
    already: bool = False  # it had been prepared before


class Progress:
    """Receives the progress of `prepare`; this base class shows nothing."""

    def begin(self, name: str, rows: int | None) -> None:
        """A data set begins. `rows`: their total, or None if unknown."""

    def step(self, rows: int, output: Output) -> None:
        """`rows` rows have been read so far; `output` has the other counts."""

    def end(self) -> None:
        """The data set is done."""


def prepare(
    source: Source,
    out: Path,
    options: Options,
    *,
    rows: Callable[[], Iterable[Row]] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write a data set to the folder `out`, finish one that an earlier run began, or find it complete.

    Args:
        rows: used in place of the source's own rows.
    Raises:
        UserError, SourceError: missing files, another schema, other settings, a full disk, or no record at all.
    """
    progress = progress or Progress()
    settings = options.settings(source)
    downloader = Downloader(
        options.cache / "downloads",
        max_bytes=options.max_media_bytes,
        rate=options.rate / max(options.workers, 1),
        verify=options.verify,
    )
    with Output(
        out,
        settings,
        tool=tool_version(),
        bytes_per_shard=options.bytes_per_shard,
        records_per_shard=options.records_per_shard,
        overwrite=options.overwrite,
        repeat_media=options.repeat_media,
    ) as output:
        if output.done is not None:
            return Summary(output.done, already=True)
        tables = Tables(options.folders, downloader)
        if rows is None:
            tables.check(source)
        counter = _Counter(rows() if rows is not None else tables.rows(source.origin, source.fields))
        progress.begin(source.name, tables.count(source.origin) if rows is None else None)
        resolver = Resolver(
            options.folders, options.cache, downloader, out.parent, options.max_media_bytes, options.config
        )
        drawn_from: dict[str, int] = {}  # records of other data sets that samples take media from
        ctx = Context(
            source.name,
            seed=options.seed,
            tables=lambda origin: tables.rows(origin, own=False),
            prepared=lambda name: drawn_from.setdefault(name, _records(out.parent / name)),
            scratch=options.cache,
        )
        items = _limited(convert(source, counter, ctx), options.limit)
        try:
            for item in islice(items, output.resume_at):
                output.seen(item.key)
            if output.items < output.resume_at:
                raise UserError(
                    f"{output.work} was begun with more rows than there are now; start over with --overwrite"
                )
            failed, start = 0, _Start(output, options.strict)
            for item, built in _built(items, resolver, options):
                failed = failed + 1 if isinstance(built, Skip) and built.reason == FAILED else 0
                if failed >= OUTAGE_AFTER:  # no shard was closed since the first failure, so all are retried
                    raise UserError(
                        f"{failed} downloads in a row failed. Check the network and run the command again; complete "
                        f"shards are kept. The last failure: {built.detail if isinstance(built, Skip) else ''}"
                    )
                output.add(item.key, built)
                start.take(item, built)
                progress.step(counter.count, output)
        except OSError as error:
            raise output.full(error) from None
        finally:
            progress.end()
        return Summary(output.finish(_head(source, tables.revisions, drawn_from), source.counts_as))


def prepare_own(
    path: Path, out: Path, options: Options, progress: Progress | None = None, found: OwnRows | None = None
) -> Summary:
    """`prepare` for a user's own file or folder.

    Args:
        found: what `find_rows` has found there.
    Raises:
        UserError: nothing that can be read, or any error of `prepare`.
    """
    found = found or find_rows(path)
    source = own.own_source(path, out.name, found.columns)
    source = replace(source, notes=found.fingerprint())
    options = replace(options, folders=(*found.folders, *options.folders))
    return prepare(source, out, options, rows=found.rows, progress=progress)


def tool_version() -> str:
    """Name and version, as the manifest records them."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"molmo2_nemo {version('molmo2_nemo')}"
    except PackageNotFoundError:
        return "molmo2_nemo"


# --- parts -----------------------------------------------------------------------------------------------------------


class _Counter:
    """An iterable of rows that counts those it has yielded."""

    def __init__(self, rows: Iterable[Row]):
        self._rows, self.count = rows, 0

    def __iter__(self) -> Iterator[Row]:
        for row in self._rows:
            self.count += 1
            yield row


def _limited(items: Iterable[Item], limit: int) -> Iterator[Item]:
    samples = 0
    for item in items:
        yield item
        samples += isinstance(item, Sample)
        if limit and samples >= limit:
            return


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    weight = size = 0
    for item in items:
        batch.append(item)
        if isinstance(item, Sample):
            weight += 1 if item.video is None else VIDEO_WEIGHT
            size += sum(len(m.data) for m in (*item.images, item.video) if isinstance(m, Inline))
        if weight >= BATCH_ITEMS or size >= BATCH_INLINE_BYTES or len(batch) >= 64 * BATCH_ITEMS:
            yield batch
            batch, weight, size = [], 0, 0
    if batch:
        yield batch


def _built(items: Iterator[Item], resolver: Resolver, options: Options) -> Iterator[tuple[Item, Built | Skip]]:
    """Every item with its record or the reason why it is skipped, in order."""
    if options.workers < 1:
        for batch in _batches(items):
            yield from zip(batch, build_all(batch, resolver, options.build), strict=True)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(options.workers, context, _start_worker, (resolver, options.build))
    waiting: deque[tuple[list[Item], Future[list[Built | Skip]]]] = deque()
    try:
        for batch in _batches(items):
            waiting.append((_light(batch), pool.submit(_work, batch)))
            if len(waiting) > BATCHES_PER_WORKER * options.workers:
                done, future = waiting.popleft()
                yield from zip(done, future.result(), strict=True)
        while waiting:
            done, future = waiting.popleft()
            yield from zip(done, future.result(), strict=True)
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, most likely out of memory; run the command again with fewer --workers "
            "(complete shards are kept)"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _light(batch: list[Item]) -> list[Item]:
    """The items without their inline media, which have been sent to a worker."""
    return [Sample(item.key) if isinstance(item, Sample) else item for item in batch]


_worker: tuple[Resolver, BuildOptions] | None = None


def _start_worker(resolver: Resolver, options: BuildOptions) -> None:
    global _worker
    _worker = resolver, options
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    die_with_parent()


def _work(batch: list[Item]) -> list[Built | Skip]:
    assert _worker is not None
    return build_all(batch, *_worker)


class _Start:
    """Stops a run where further items would fail as well."""

    def __init__(self, output: Output, strict: bool):
        self.output, self.strict = output, strict
        self.samples, self.reasons = 0, Counter[tuple[str, str]]()
        self.patient = output.gave_up or output.records > 0  # asked to go on, or past the start

    def take(self, item: Item, built: Built | Skip) -> None:
        """Look at what has become of the next item.

        Raises:
            UserError: with `strict`, at the first item that is skipped because it cannot be used.
            SourceError: none of the first samples became a record, all for the same reason.
        """
        if not isinstance(built, Skip):
            self.patient = True
            return
        if self.strict:
            raise UserError(str(built))
        if self.patient or not isinstance(item, Sample):
            return
        self.samples += 1
        field = built.fault.field if built.fault is not None else ""
        self.reasons[built.reason, field.partition("[")[0] if field.startswith("images[") else field] += 1
        if len(self.reasons) > 1:
            self.patient = True
        elif self.samples >= GIVE_UP_AFTER:
            raise SourceError(self._words(built))

    def _words(self, last: Skip) -> str:
        hint = " Are the media below --source, as molmo2 prepare --list NAME says?" if last.reason == NOT_FOUND else ""
        return (
            f"none of the first {self.samples} samples became a record, all for one reason; the last, {last}.{hint} "
            f"{self.output.give_up()} lists them all. Mend the cause and run the command again; if nothing has "
            "changed, it then goes on with the rest"
        )


def _origin(source: Source) -> dict[str, Any]:
    origin = source.origin
    if isinstance(origin, Hub):
        return {
            "repo": origin.repo,
            "configs": list(origin.configs),
            "split": origin.split,
            "revision": origin.revision or "main",
        }
    return {"tables": [table.path for table in origin.tables], "notes": source.notes}


def _head(source: Source, revisions: dict[str, str], drawn_from: dict[str, int]) -> dict[str, Any]:
    found = {name: value for name, value in {"fetched": revisions, "drawn_from": drawn_from}.items() if value}
    return {
        "name": source.name,
        "source": _origin(source) | found,
        "licence": source.licence,
        "kind": source.kind,
        "published_as": source.published_as,
    }


def _records(folder: Path) -> int:
    path = folder / MANIFEST
    return int(read_head(path)["records"]) if path.is_file() else 0
