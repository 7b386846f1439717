"""One source -> one data set of shards: rows, samples, media, shards, manifest.

The main process turns rows into samples and writes the records, in the source's order; worker processes fetch and
decode media. The output depends only on rows, media and settings, not on the number of workers or on interruptions.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.addition import Addition, Kept, finish_plan, removed_by_repair
from data_prep.disk import own_bytes, published_bytes, room_line
from data_prep.download import Downloader
from data_prep.giving_up import Patience
from data_prep.held_out import HeldOut, validation_folder
from data_prep.ledger import LEDGER, Line, is_of, mark_of, read_lines
from data_prep.look import Look, look
from data_prep.media import Resolver
from data_prep.output import Output, OwnContent
from data_prep.own_files import OwnRows, find_rows
from data_prep.parts import Part, remove_empty
from data_prep.record_builder import BuildOptions, Built, build_all, member_key
from data_prep.run_limits import changed
from data_prep.shrink import tile_limits
from data_prep.sources import own
from data_prep.sources.base import Context, Hub, Inline, Row, Sample, Skip, Source, convert
from data_prep.tables import Tables
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.manifest import MANIFEST, read_head
from molmo2_nemo.errors import UserError
from molmo2_nemo.processes import die_with_parent

BATCH_ITEMS = 32  # samples sent to a worker together; videos count as more than one
VIDEO_WEIGHT = 8
BATCH_INLINE_BYTES = 32 * 2**20
BATCHES_PER_WORKER = 2  # in flight at once
LATER = ("gop", "max_image_side")  # build options that older data sets do not have
Item = Sample | Skip


@dataclass(frozen=True)
class Options:
    """The options of `molmo2 prepare`. Those in `settings` determine the output."""

    seed: int = 0
    limit: int = 0  # samples; 0 = all
    split: str = "train"  # of a published data set, or "validation"
    held_out: HeldOut | None = None  # the side of a user's own data that is prepared; None = all of it
    part: Part | None = None  # of the samples, those that this machine prepares; None = all
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
    keep_going: bool = False  # never give up because the first samples all fail
    config: DataConfig = field(default_factory=DataConfig)  # of the training that records are checked for

    def settings(self, source: Source) -> dict[str, Any]:
        """The settings that determine the output; a data set made with others is refused."""
        return {
            "name": source.name,
            "origin": _origin(source),
            "seed": self.seed,
            "limit": self.limit,
            **({"part": str(self.part)} if self.part is not None else {}),
            **({"split": self.split} if self.split != "train" else {}),
            **({"held_out": asdict(self.held_out)} if self.held_out is not None else {}),
            "bytes_per_shard": self.bytes_per_shard,
            "records_per_shard": self.records_per_shard,
            "max_media_bytes": self.max_media_bytes,
            # Left out where it changes nothing: data sets prepared before it was known are the same.
            **({"repeat_media": True} if self.repeat_media else {}),
            **{name: value for name, value in asdict(self.build).items() if name not in LATER or value},
            **({"tiles": list(tile_limits(self.config))} if self.build.max_image_side else {}),
            **({"checked_for": checked} if (checked := changed(self.config)) else {}),
        }

    def place(self, out: Path) -> Path:
        """The folder of the data set `out`, or of the part of it that is asked for."""
        if self.held_out is not None:
            out = self.held_out.folder(out)
        if self.split != "train":
            out = validation_folder(out)
        return out if self.part is None else self.part.folder(out)


@dataclass
class Summary:
    """The result of preparing one data set."""

    head: dict[str, Any]
    already: bool = False  # it had been prepared before, and nothing was added or replaced
    look: Look | None = None  # what a later call has seen; None: a first call, or nothing to compare with
    counts: dict[str, int] = field(default_factory=dict)  # what it has added; see addition.COUNTS


class Progress:
    """Receives the progress of `prepare`; this base class shows nothing."""

    def begin(self, name: str, rows: int | None) -> None:
        """A data set begins. `rows`: their total, or None if unknown."""

    def room(self, words: str) -> None:
        """The data set will take more room than there is, or much of it."""

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
    own: OwnContent | None = None,
) -> Summary:
    """Write a data set to the folder `out` (a part of it: beside that), finish one that an earlier run began, or add to
    a complete one what can be added: samples whose media have come, records whose media have changed, new rows.

    Args:
        rows: used in place of the source's own rows.
        own: what is known of a user's own file.
    Raises:
        UserError, SourceError: missing files, another schema, other settings, a full disk, or no record at all.
    """
    out = options.place(out)
    if options.part is not None:
        own = None  # of a part, only the whole file tells whether it has grown
        remove_empty(out)
    work = _Work(source, out, options, rows, progress or Progress())
    finish_plan(out)
    with Output(out, **work.output_options(own), overwrite=options.overwrite) as output:
        if output.done is None:
            return Summary(work.fill(output, own))
        grown, head = output.grown, output.done
    return work.again(head, grown, own)


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
    held = options.held_out
    source = own.own_source(path, out.name if held is None else held.folder(out).name, found.columns, found.files)
    source = replace(source, notes=found.fingerprint())
    if held is not None:
        source = held.source(source)
    options = replace(options, folders=(*found.folders, *options.folders))
    return prepare(source, out, options, rows=found.rows, progress=progress, own=_Own(source, found))


def tool_version() -> str:
    """Name and version, as the manifest records them."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"molmo2_nemo {version('molmo2_nemo')}"
    except PackageNotFoundError:
        return "molmo2_nemo"


# --- parts -----------------------------------------------------------------------------------------------------------


@dataclass
class _Own:
    """A user's own file, compared with what a ledger knows of it."""

    source: Source
    found: OwnRows

    def compare(self, ledger: Path) -> tuple[bool, str]:
        if not ledger.is_file():
            return False, ""
        items = iter(self.source.records(self.found.rows(), Context(self.source.name)))
        for line in read_lines(ledger):
            item = next(items, None)
            if item is None:
                return False, ": lines are missing at its end"
            if item.place is None or not item.place.mark:
                return False, ""
            if not is_of(line, item):
                return False, f": line {item.place.line} is the first that differs (lines may be added at its end)"
        return True, ""

    def bytes(self, resolver: Resolver) -> tuple[float, str]:
        return own_bytes(self.source, self.found, resolver)


class _Work:
    """What it takes to prepare one source."""

    def __init__(
        self,
        source: Source,
        out: Path,
        options: Options,
        rows: Callable[[], Iterable[Row]] | None,
        progress: Progress,
    ):
        self.source, self.out, self.options, self.rows, self.progress = source, out, options, rows, progress
        downloader = Downloader(
            options.cache / "downloads",
            max_bytes=options.max_media_bytes,
            rate=options.rate / max(options.workers, 1),
            verify=options.verify,
        )
        self.tables = Tables(options.folders, downloader)
        self.resolver = Resolver(
            options.folders, options.cache, downloader, out.parent, options.max_media_bytes, options.config
        )
        self.drawn_from: dict[str, int] = {}  # records of other data sets that samples take media from
        self.counter = _Counter(())

    def output_options(self, own: OwnContent | None) -> dict[str, Any]:
        return {
            "settings": self.options.settings(self.source),
            "tool": tool_version(),
            "bytes_per_shard": self.options.bytes_per_shard,
            "records_per_shard": self.options.records_per_shard,
            "repeat_media": self.options.repeat_media,
            "own": own,
        }

    def items(self) -> Iterator[Item]:
        """All items of the source, from the first. The progress begins."""
        source, tables, rows = self.source, self.tables, self.rows
        if rows is None:
            tables.check(source)
        self.counter = _Counter(rows() if rows is not None else tables.rows(source.origin, source.fields))
        self.progress.begin(source.name, tables.count(source.origin) if rows is None else None)
        ctx = Context(
            source.name,
            seed=self.options.seed,
            tables=lambda origin: tables.rows(origin, own=False),
            prepared=lambda name: self.drawn_from.setdefault(name, _records(self.out.parent / name)),
            scratch=self.options.cache,
            validation=self.options.split == "validation",
        )
        items = _limited(convert(source, self.counter, ctx), self.options.limit)
        return items if self.options.part is None else self.options.part.select(items)

    def fill(self, output: Output, own: OwnContent | None) -> dict[str, Any]:
        """Write a new data set; returns its head."""
        if not output.resume_at:
            self._say_room(own)
        items = self.items()
        with self._writing(output):
            for item in islice(items, output.resume_at):
                output.seen(item.key)
            if output.items < output.resume_at:
                raise UserError(
                    f"{output.work} was begun with more rows than there are now; start over with --overwrite"
                )
            start = self._patience(output)
            for made, built in _built(items, self.resolver, self.options):
                assert not isinstance(made, Kept) and not isinstance(built, Kept)
                start.downloaded(built)
                output.add(made.key, built, mark_of(made))
                start.take(made, built)
                self.progress.step(self.counter.count, output)
            output.hint = start.hint() if not output.records else ""
        return output.finish(_head(self.source, self.tables.revisions, self.drawn_from), self.source.counts_as)

    def _say_room(self, own: OwnContent | None) -> None:
        if self.options.limit or (own is None and self.rows is not None):
            return
        wanted, basis = published_bytes(self.source.name) if own is None else own.bytes(self.resolver)
        if words := room_line(wanted, basis, self.out.parent):
            self.progress.room(words)

    def again(self, head: dict[str, Any], grown: bool, own: OwnContent | None) -> Summary:
        """Add to a complete data set what can be added."""
        ledger = self.out / LEDGER
        if not ledger.is_file():
            return Summary(head, already=True)
        seen = look(ledger, self.resolver)
        if not grown and not seen.due and not removed_by_repair(self.out):
            return Summary(head, already=True, look=seen)
        with Addition(self.out, look=seen, **self.output_options(own)) as output:
            with self._writing(output):
                self._add(output, ledger, seen)
            head = output.finish(_head(self.source, self.tables.revisions, self.drawn_from), self.source.counts_as)
            moved = any(count for name, count in output.counts.items() if name != "unread")
            return Summary(head, not moved, seen, output.counts)

    def _add(self, output: Addition, ledger: Path, seen: Look) -> None:
        before = _beside(self.items(), read_lines(ledger), seen, output.removed, self.out)
        for item, line, due in islice(before, output.resume_at):
            output.passed(item.key, line, due)
        waiting: deque[tuple[Line | None, str]] = deque()

        def items() -> Iterator[Item | Kept]:
            for item, line, due in before:
                waiting.append((line, mark_of(item)))
                yield item if line is None or due else Kept(item.key, line)

        start = self._patience(output)
        for made, built in _built(items(), self.resolver, self.options):
            line, mark = waiting.popleft()
            if isinstance(built, Kept):
                output.keep(built)
            else:
                start.downloaded(built)
                output.take(made.key, built, mark, line)
                start.take(made, built)
            self.progress.step(self.counter.count, output)

    def _patience(self, output: Output) -> Patience:
        options = self.options
        return Patience(output, options.folders, strict=options.strict, keep_going=options.keep_going)

    @contextmanager
    def _writing(self, output: Output) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise output.full(error) from None
        finally:
            self.progress.end()


def _beside(
    items: Iterable[Item], lines: Iterator[Line], seen: Look, removed: set[str], out: Path
) -> Iterator[tuple[Item, Line | None, bool]]:
    """(item, its line of the ledger, None if it is new, whether it is to be prepared anew) for each item.

    Args:
        removed: member keys of records that `molmo2 shards repair` took out.

    Raises:
        UserError: the source has other rows than when the ledger was written.
    """
    for number, item in enumerate(items):
        line = next(lines, None)
        if line is not None and not is_of(line, item):
            raise UserError(
                f"the source's rows have changed since {out} was prepared: there, {item.key!r} is the first that "
                "differs; replace it with --overwrite"
            )
        gone = line is not None and not line.reason and member_key(item.key) in removed
        yield item, line, gone or seen.is_due(number)
    if next(lines, None) is not None:
        raise UserError(f"the source has fewer rows than when {out} was prepared; replace it with --overwrite")


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


def _batches(items: Iterable[Item | Kept]) -> Iterator[list[Item | Kept]]:
    batch: list[Item | Kept] = []
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


def _built(
    items: Iterator[Item | Kept], resolver: Resolver, options: Options
) -> Iterator[tuple[Item | Kept, Built | Skip | Kept]]:
    """Every item with its record or the reason why it is skipped, in order."""
    if options.workers < 1:
        for batch in _batches(items):
            yield from zip(batch, build_all(batch, resolver, options.build), strict=True)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(options.workers, context, _start_worker, (resolver, options.build))
    waiting: deque[tuple[list[Item | Kept], Future[list[Built | Skip | Kept]]]] = deque()
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


def _light(batch: list[Item | Kept]) -> list[Item | Kept]:
    """The items without their inline media, which have been sent to a worker."""
    return [Sample(item.key, place=item.place) if isinstance(item, Sample) else item for item in batch]


_worker: tuple[Resolver, BuildOptions] | None = None


def _start_worker(resolver: Resolver, options: BuildOptions) -> None:
    global _worker
    _worker = resolver, options
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    die_with_parent()


def _work(batch: list[Item | Kept]) -> list[Built | Skip | Kept]:
    assert _worker is not None
    return build_all(batch, *_worker)


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
