"""The interface of sources: small declarative modules that say where a data set comes from and what its rows mean.

The framework (data_prep/) loads and checks the rows, finds or fetches the media, probes them, writes the shards, counts
and reports. A source does none of that: it opens no file, downloads nothing and imports nothing heavy. It maps rows to
`Sample`s, and reports with a `Skip` what it leaves out and why.

A module below data_prep/sources/ holds `SOURCES: tuple[Source, ...]` and is listed in data_prep/sources/__init__.py:

    from data_prep.sources.base import Context, File, Hub, Row, Sample, Skip, Source
    from data_prep.sources.shapes import shuffled_choice

    def _records(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
        for video, group in ctx.grouped(rows, "video_id"):          # all rows of a video, in bounded memory
            rng = ctx.rng(video)                                     # the only randomness: (seed, source, key)
            branches = []
            for i, row in enumerate(group):
                if not row["Answer"].strip():
                    yield Skip(f"{video}#{i}", "empty answer")       # counted, and listed in skipped.jsonl
                    continue
                branches.append(shuffled_choice(row["Question"], row["Answer"], row["NegativeAnswers"], rng))
            if branches:
                yield Sample(video, branches, video=File(f"youtube-cc/{video}", f"koala/{video}"))

    SOURCES = (
        Source(
            name="molmo2_syn_captions_qa",
            mixes={"sft": "video_academic"},
            kind="video, multiple choice",
            origin=Hub("allenai/Molmo2-VideoCapQA", split="CapQA", media="youtube-cc/ID.mp4 or koala/ID.mp4"),
            licence="ODC-BY 1.0",
            fields={"video_id": str, "Question": str, "Answer": str, "NegativeAnswers": [str], "Category": maybe(str)},
            records=_records,
            published_as="vixmo_syn_video_capqa_v2",
            resolvable=False,
        ),
    )

Rules
- Keys are unique in the data set. Any text will do; the framework turns them into member names (`member_key`).
- One `Sample` is one visual input with all its annotations (a message tree). Media are stored once.
- Where the published loader draws at every access (which transcript, point or point_count), give `variants`:
  the lists of annotations of which training draws one per access, and `variant_weights` if not all are equally likely.
- Several annotations in one conversation (multi-turn) are one annotation {"style": ..., "turns": [annotation, ...]}:
  `shapes.turns`.
- `clip` and `subtitles` are in seconds of the whole video; the framework cuts subtitles to the clip and counts them
  from its start. Timestamps of points, however, are seconds from the start of the clip.
- Annotations are those of molmo2_nemo/data/prompts.py; make them with data_prep/sources/shapes.py.
- The mixture counts `records * counts_as` as the length of the data set.

Tests need no network: `convert(source, rows, Context.for_tests(tmp_path))` runs the schema check, `records` and the
check of every annotation, as `molmo2 prepare` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.sources.grouping import grouped_on_disk
from data_prep.sources.references import (  # noqa: F401 - part of what sources import from here
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
    Stored,
    Url,
    column_media,
)
from data_prep.sources.schema import check_row, maybe, number  # noqa: F401 - part of what sources import from here
from molmo2_nemo.data.coverage import OWN as OWN  # `Source.kind` of a user's own files
from molmo2_nemo.data.json_values import Fault, FieldError, show
from molmo2_nemo.data.meant import check_names
from molmo2_nemo.data.places import early_times
from molmo2_nemo.data.record import BadRecord, read_tree
from molmo2_nemo.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from data_prep.sources.own_boxes import Boxes

Row = dict[str, Any]
AnnotationJson = dict[
    str, Any
]  # as stored in a record; written by `shapes.py`, read by molmo2_nemo/data/annotations.py
GROUP_ROWS_IN_MEMORY = 50_000  # more rows than this are grouped on disk
STOP_AFTER_BAD_ROWS = 20  # if this many first rows are all bad, the schema has changed


class SourceError(DataError):
    """A whole data set cannot be prepared: its rows are not what the source expects, or files are missing."""


# --- what a source yields --------------------------------------------------------------------------------------------


def unit_of(file: str) -> str:
    """What is counted in a user's own file: lines, or records of a tar."""
    return "record" if file.endswith(".tar") else "line"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample of a user's own file stands."""

    file: str
    line: int  # from 1
    names: Mapping[str, str] = field(default_factory=dict)  # path of a field in the record -> its name in the line
    mark: str = field(default="", compare=False)  # of the line's content; "" where it is not known
    unit: str = ""  # what `line` is the number of; "": a line, or the record of a tar

    def of(self, path: str) -> str:
        """The path of a record's field as the line has it."""
        for start, name in self.names.items():
            if path == start or path.startswith((f"{start}[", f"{start}.")):
                return name + path[len(start) :]
        return path

    def inner(self, names: Mapping[str, str]) -> Place:
        """The place of a record whose fields have these names in a line whose fields have the names of this place."""
        return replace(self, names={**self.names, **{start: self.of(name) for start, name in names.items()}})


@dataclass(frozen=True, slots=True)
class Sample:
    """One future record: a visual input (images, one video, or nothing) and its annotations.

    Set either `annotations` or `variants`, which are lists of annotations; every access in training draws one of them.
    """

    key: str
    annotations: Sequence[AnnotationJson] = ()
    images: Sequence[Media] = ()
    video: Media | None = None
    clip: tuple[float, float] | None = None  # seconds of the video
    # (start, end, text) in seconds of the whole video, or a file of them; a text without times is shown as it is
    subtitles: Sequence[tuple[float, float, str]] | str | File | Url = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)  # overrides of frame sampling
    weight: float | None = None  # flat loss weight of every answer
    weight_factor: float | None = None  # a factor on the loss weight of every answer
    variants: Sequence[Sequence[AnnotationJson]] = ()
    variant_weights: Sequence[float] | None = None
    place: Place | None = None  # in a user's own file
    notes: tuple[str, ...] = ()  # what was converted; the summary counts records per text
    boxes: Boxes | None = None  # of a user's own data, which points are the centres of

    @property
    def media(self) -> tuple[Media, ...]:
        """All it shows."""
        return (*self.images, *((self.video,) if self.video is not None else ()))

    def trees(self) -> Sequence[Sequence[AnnotationJson]]:
        """Every list of annotations that training may draw."""
        return self.variants or (self.annotations,)


@dataclass(frozen=True, slots=True)
class Skip:
    """A row, an annotation of a sample (`key#3`), or a whole sample that is left out."""

    key: str
    reason: str  # a few fixed words, as reasons are counted
    detail: str = ""
    fault: Fault | None = None  # the field, what was seen and expected
    place: Place | None = None  # in a user's own file
    media: tuple[Any, ...] = field(default=(), compare=False)  # of a sample: what it takes from --source (ledger.py)

    def line(self) -> dict[str, Any]:
        """The line of skipped.jsonl: key, reason and detail; field, seen and expected where they are known; and of a
        user's own data all of these, file and line."""
        made: dict[str, Any] = {"key": self.key, "reason": self.reason, "detail": self.detail}
        if self.place is not None:
            made |= {"file": self.place.file, "line": self.place.line}
            made |= {"unit": self.place.unit} if self.place.unit else {}
        fault = self.fault
        if fault is None and self.place is not None:
            fault = Fault("", self.detail, "a record that training can use")
        if fault is not None:
            path = fault.field if self.place is None else self.place.of(fault.field)
            made |= {"field": path, "seen": fault.seen, "expected": fault.expected}
        return made

    def __str__(self) -> str:
        place = self.place
        where = self.key if place is None else f"{place.file}, {place.unit or unit_of(place.file)} {place.line}"
        field = f", {self.line()['field']}" if self.fault is not None and self.fault.field else ""
        return f"{where}{field}: {self.reason}{f': {self.detail}' if self.detail else ''}"


# --- where rows come from --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hub:
    """A data set on the Hugging Face Hub, or the same parquet / JSON files in a folder given by --source.

    Every row gets `__config__`, the name of its configuration ("" without one).
    """

    repo: str
    configs: tuple[str, ...] = ()  # concatenated in this order; () = the default configuration
    split: str = "train"
    revision: str | None = None
    columns: tuple[str, ...] = ()  # () = those of the source's `fields`
    media: str = ""  # in words: which media must be below --source, and where to get them; "" = none
    copies: tuple[str, ...] = ()  # other names that a folder with its files may have below --source


@dataclass(frozen=True, slots=True)
class Table:
    """A file of rows below --source: .json, .jsonl, .csv, .tsv, .parquet, .arrow or .txt. The path may be a glob.

    `at` first descends into a JSON object. A JSON object in place of a list gives one row per entry, with the entry's
    name under `key` (an entry that is not an object itself becomes {key: name, "value": entry}). In a .jsonl whose
    lines are lists, the first line names the columns. A .txt gives a row {"line": text} per non-empty line. Every row
    gets `__table__`, the path relative to --source.

    With `repo` (a Hugging Face data set repository that holds it at `path`) or `url` (https) a file that is neither
    below --source nor in a copy of the repository there is fetched.
    """

    path: str
    at: tuple[str, ...] = ()
    key: str = "__key__"
    header: tuple[str, ...] = ()  # column names of a CSV without a header line
    delimiter: str = ""  # of a CSV; "" = comma, or TAB for .tsv
    repo: str = ""
    url: str = ""


@dataclass(frozen=True, slots=True)
class Manual:
    """A data set that must be downloaded by hand (a form to sign, a site to log in to)."""

    fetch: str  # in words: what, from where
    tables: tuple[Table, ...]  # their rows are concatenated in this order
    media: tuple[str, ...] = ()  # expected below --source, e.g. "videos/ID.mp4"


Origin = Hub | Manual


@dataclass(frozen=True)
class Source:
    """One data set of the mixture; the docstring of this module explains how to write one."""

    name: str  # the folder of shards, and the name in conf/data/
    mixes: Mapping[str, str]  # stage ("pretrain", "sft") -> group of the mixture; {} = in no published mixture
    kind: str  # description for users: "image, question and answer"
    origin: Origin
    licence: str  # of the annotations, and what is known of the media
    fields: Mapping[str, Any]  # column -> type, see data_prep/sources/schema.py; others are not read
    records: Callable[[Iterable[Row], Context], Iterator[Sample | Skip]]
    counts_as: int = 1  # examples of the mixture per record
    published_as: str | None = None  # the name in the released mixture, where it differs
    resolvable: bool = True  # False: the released registry does not know `published_as` (or `name`)
    notes: str = ""  # for users: filters, and differences from the published loader


# --- what a source may ask for ---------------------------------------------------------------------------------------


class Context:
    """What `Source.records` gets besides its rows: randomness, grouping, and other tables."""

    def __init__(
        self,
        source: str,
        *,
        seed: int = 0,
        tables: Callable[[Hub | Table], Iterable[Row]] | None = None,
        prepared: Callable[[str], int] | None = None,
        scratch: Path | None = None,
        validation: bool = False,
    ):
        self.source, self.seed, self.scratch = source, seed, scratch
        self.validation = validation  # the validation split is wanted, not the training split
        self._tables, self._prepared = tables, prepared

    @classmethod
    def for_tests(
        cls,
        scratch: Path | None = None,
        *,
        source: str = "test",
        seed: int = 0,
        tables: Mapping[str, Sequence[Row]] | None = None,
        prepared: Mapping[str, int] | None = None,
        validation: bool = False,
    ) -> Context:
        """A context with the given contents of other tables: by path for a `Table`, by repo for a `Hub`."""
        known = dict(tables or {})
        sizes = dict(prepared or {})
        return cls(
            source,
            seed=seed,
            scratch=scratch,
            validation=validation,
            tables=lambda o: known[o.repo if isinstance(o, Hub) else o.path],
            prepared=lambda name: sizes.get(name, 0),
        )

    def rng(self, key: str) -> np.random.Generator:
        """A generator that depends only on the seed, the source and `key`."""
        import numpy as np

        from molmo2_nemo.data.mixture import stable_key

        return np.random.Generator(np.random.Philox(key=stable_key("prepare", self.seed, self.source, key)))

    def rows(self, table: Hub | Table) -> Iterator[Row]:
        """Rows of another table, such as answers in a separate file or keys to hold out. Not schema-checked."""
        if self._tables is None:
            raise SourceError(f"{self.source}: no other table can be read here ({table})")
        yield from self._tables(table)

    def prepared(self, name: str) -> int:
        """Number of records of the data set `name`, prepared beside this one; 0 if it does not exist."""
        return self._prepared(name) if self._prepared is not None else 0

    def grouped(self, rows: Iterable[Row], key: str | Callable[[Row], str]) -> Iterator[tuple[str, list[Row]]]:
        """(key, its rows in order) for every key, in order of first appearance.

        Keys are compared as text. Memory is bounded by `GROUP_ROWS_IN_MEMORY` rows and the largest group; further rows
        go through a temporary database on disk.
        """
        get = (lambda row: row[key]) if isinstance(key, str) else key
        held: dict[str, list[Row]] = {}
        count = 0
        iterator = iter(rows)
        for row in iterator:
            held.setdefault(str(get(row)), []).append(row)
            count += 1
            if count >= GROUP_ROWS_IN_MEMORY:
                break
        else:
            while held:
                first = next(iter(held))
                yield first, held.pop(first)
            return
        yield from grouped_on_disk(held, iterator, get, self.scratch)


# --- rows -> checked samples -----------------------------------------------------------------------------------------


def convert(source: Source, rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    """Convert rows to samples and check them: schema, unique keys, fields of every annotation.

    Bad rows and bad samples become `Skip`s. The order is the source's.

    Raises:
        SourceError: the first rows are all bad, so the schema has changed; the message names the field.
    """
    skipped: list[Skip] = []
    seen: dict[int, int] = {}  # fingerprint of a key -> its line in a user's own file, 0 elsewhere
    for item in source.records(_checked_rows(source, rows, skipped), ctx):
        yield from skipped
        skipped.clear()
        yield item if isinstance(item, Skip) else _judged(item, seen)
    yield from skipped


def _judged(item: Sample, seen: dict[int, int]) -> Sample | Skip:
    """The sample, or why it cannot be used."""
    fingerprint = hash(item.key)  # 64 bits: a false alarm once in 10**8 data sets of a million records
    if fingerprint in seen:
        if item.place is None:
            return Skip(item.key, "duplicate key")
        says = f"line {seen[fingerprint]} has the key {item.key!r} as well"
        fault = Fault("key", repr(item.key), "a key that no other line has")
        return Skip(item.key, "duplicate key", says, fault, item.place)
    seen[fingerprint] = item.place.line if item.place is not None else 0
    problem = sample_problem(item)
    return item if problem is None else Skip(item.key, "bad sample", problem.detail, problem.fault, item.place)


def _checked_rows(source: Source, rows: Iterable[Row], skipped: list[Skip]) -> Iterator[Row]:
    good, fields = 0, Counter[str]()
    details: dict[str, str] = {}
    for place, row in enumerate(rows):
        problem = check_row(row, source.fields)
        if problem is None:
            good += 1
            yield row
            continue
        name, detail = problem
        fields[name] += 1
        details.setdefault(name, detail)
        if not good and place + 1 >= STOP_AFTER_BAD_ROWS:
            break
        skipped.append(Skip(f"row-{place}", "bad row", f"field {name!r}: {detail}"))
    if not good and fields:
        name = fields.most_common(1)[0][0]
        raise SourceError(
            f"data set {source.name}: none of its first {sum(fields.values())} rows fits; "
            f"field {name!r}: {details[name]}. The expected columns are {', '.join(source.fields)}"
        )


def sample_problem(sample: Sample) -> BadRecord | None:
    """The problem of a sample; None when there is none."""
    problem: FieldError | str | None = None
    weights = sample.variant_weights
    if sample.images and sample.video is not None:
        problem = "both images and a video"
    elif bool(sample.annotations) == bool(sample.variants):
        problem = "neither annotations nor variants" if not sample.variants else "annotations and variants"
    elif weights is not None and not sample.variants:
        alone = Fault("variant_weights", show(weights), "left out, or beside variants")
        problem = FieldError(alone, "belongs to variants, and there are none")
    elif weights is not None and (not isinstance(weights, Sequence) or len(weights) != len(sample.variants)):
        problem = FieldError.wrong("variant_weights", f"{len(sample.variants)} numbers, one for each variant", weights)
    if problem is not None:
        fault = problem.fault if isinstance(problem, FieldError) else None
        return BadRecord(sample.key, "bad sample", str(problem), fault)
    try:
        if sample.place is not None:  # a name that is wrong says more than what is missing in its place
            trees = {"variants": sample.variants} if sample.variants else {"annotations": sample.annotations}
            check_names(sample.key, {**trees, "sampling": sample.sampling})
        for number, tree in enumerate(sample.trees()):
            if sample.place is not None:  # how early a time may be depends on the film, which is not read yet
                tree = early_times({"annotations": list(tree)}, 1.0, set())["annotations"]
            path = f"variants[{number}]" if sample.variants else "annotations"
            read_tree(sample.key, list(tree), len(sample.images), sample.video is not None, path)
    except BadRecord as error:
        return error
    return None
