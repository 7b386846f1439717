"""Tars that another tool wrote -> rows: img2dataset, Megatron-Energon, any webdataset of media and texts.

A record's columns are its members by their suffixes (`jpg`, `txt`, `detail.json`), and the fields of its `.json`, by
their own names. Headers are scanned once per tar; texts are read where they are needed, and media by their offset when
the record is made: nothing is unpacked.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.energon import META, energon_set, field_map
from data_prep.own_files import OwnRows
from data_prep.sources.base import Row
from data_prep.sources.own_cells import CHATS, MEDIA
from data_prep.sources.own_columns import NAMES, Columns, find_columns, starts
from data_prep.sources.own_shapes import not_read
from data_prep.sources.references import Stored
from molmo2_nemo.data.json_values import Fault, show
from molmo2_nemo.data.manifest import MANIFEST, Member, ShardError
from molmo2_nemo.data.record import IMAGE_SUFFIXES, VIDEO_SUFFIXES, BadRecord
from molmo2_nemo.data.tar_index import index_tar
from molmo2_nemo.errors import UserError

KEY = "__key__"
WEBDATASET, ENERGON = "webdataset", "Megatron-Energon"
NUMBERED = "numbered images"  # the column of KEY.0.jpg, KEY.1.jpg, ...
NUMBER = re.compile(r"(?:[a-z_]*)(\d+)\.([a-z0-9]+)")
SAMPLED = 100  # records that say what the columns are
TEXT_BYTES = 16 * 2**20
# What img2dataset writes of a download: nothing of it is learned from.
OF_DOWNLOADS = frozenset(
    ("url", "key", "status", "error_message", "width", "height", "original_width", "original_height", "exif")
    + ("sha256", "md5", "sha512", "shard_id")
)
MEDIA_NAMES = frozenset(name for field in MEDIA for name in NAMES[field])


@dataclass(frozen=True)
class TarFiles:
    """Tars and what is known of them.

    Args:
        root: names in messages are relative to it.
        excluded: keys of records that are left out, by tar.
    """

    root: Path
    tars: tuple[Path, ...]
    kind: str
    unread: tuple[str, ...] = ()
    excluded: Mapping[str, frozenset[str]] | None = None

    def name(self, tar: Path) -> str:
        return tar.relative_to(self.root).as_posix()


def tar_rows(files: TarFiles, given: Mapping[str, Any] | None) -> OwnRows:
    """The records of tars as rows.

    Args:
        given: the map of `--map`; of an Energon data set its field map where there is none.
    Raises:
        UserError: nothing to learn from, several media without a word of which is meant, or a map that does not fit.
    """
    sample = list(islice(_sampled(files), SAMPLED))
    if not sample:
        raise UserError(f"{files.root}: its tars hold no record")
    fields = {name for record in sample if isinstance(record.get(""), dict) for name in record[""]}
    downloads = files.kind == WEBDATASET and {"url", "status", "error_message"} <= fields
    kind = "img2dataset" if downloads else files.kind
    said = field_map(files.root) if files.kind == ENERGON and given is None else None
    try:
        only = {field: None for field in NAMES if field != "key"}
        columns = _columns(sample, downloads, given if said is None else only | said)
    except UserError as error:
        raise (UserError(str(error).replace("--map", "field_map of dataset.yaml", 1)) if said else error) from None
    if said is not None:
        columns = replace(columns, mapped=frozenset())
    words = f"{kind}, {len(files.tars)} tar{'s' * (len(files.tars) > 1)}"
    quiet = OF_DOWNLOADS if downloads else frozenset()
    return OwnRows(
        words, partial(_rows, files, Reading.of(columns, quiet)), files.tars, (files.root,), columns, files.unread
    )


def tars_of(path: Path) -> TarFiles | None:
    """The tars of a folder, or of a single file; None if there are none.

    Raises:
        UserError: a data set of this project, compressed tars, or an Energon data set that cannot be read.
    """
    if path.is_file():
        return TarFiles(path.resolve().parent, (path.resolve(),), WEBDATASET)
    root = path.resolve()
    if (root / META).is_dir():
        found = energon_set(root)
        return TarFiles(root, found.tars, ENERGON, found.unread, found.excluded)
    tars = sorted(root.glob("*.tar")) or sorted(root.glob("*/*.tar"))
    if not tars:
        packed = [file for end in ("*.tar.gz", "*.tgz", "*.tar.zst") for file in root.glob(end)]
        if packed:
            raise UserError(f"{packed[0]} is compressed; records are read by their place in a plain tar: unpack it")
        return None
    if (root / MANIFEST).is_file():
        raise UserError(f"{path} is a data set of molmo2 already: name it as data.sources.NAME.path, or --out's folder")
    beside = [file.name for end in ("*.parquet", "*_stats.json") for file in sorted(root.glob(end))]
    unread = (f"{beside[0]} and {len(beside) - 1} more files beside the tars",) if len(beside) > 1 else tuple(beside)
    return TarFiles(root, tuple(tars), WEBDATASET, unread)


def _indexed(
    tar: Path, bad: dict[str, BadRecord], passed: Counter[str] | None = None
) -> list[tuple[str, list[Member]]]:
    """`index_tar`, which says of a tar that cannot be read how to go on without it."""
    try:
        return index_tar(tar, bad, passed)
    except ShardError as error:
        raise UserError(f"{str(error).rstrip('.')}. To go on without this tar, move it to another folder") from None


# --- columns ---------------------------------------------------------------------------------------------------------


def _sampled(files: TarFiles) -> Iterator[dict[str, Any]]:
    """Of each record its members by suffix, and under "" the fields of its JSON."""
    for tar in files.tars:
        for key, members in _indexed(tar, {}):
            record: dict[str, Any] = {member.suffix: member for member in members}
            if "json" in record:
                try:
                    record[""] = _json(tar, key, record["json"])
                except BadRecord:
                    record[""] = {}
            yield record


def _column(column: Any, objects: bool, there: Collection[str]) -> Any:
    """A column as a map may write it (json.meta.caption, json:meta.caption, json[meta][caption]), named meta.caption.
    Of alternatives (jpg,png) it is the first that is there.

    Args:
        objects: whether .json holds objects, whose fields have their own names here.
        there: members and fields.
    """
    if not isinstance(column, str):
        return None if column is None else [_column(one, objects, there) for one in column]
    if "," in column and column not in there:
        several = [_column(one.strip(), objects, there) for one in column.split(",")]
        return next((one for one in several if {one, *starts(one)} & set(there)), several[0])
    made = re.sub(r"\[([^\]]*)\]", r".\1", re.sub("^json:", "json.", column))
    return made.removeprefix("json.") if objects else made


def _columns(sample: Sequence[Mapping[str, Any]], downloads: bool, given: Mapping[str, Any] | None) -> Columns:
    objects = [record[""] for record in sample if isinstance(record.get(""), dict)]
    values = {name: value for entry in objects for name, value in entry.items() if value is not None}
    members = sorted({suffix for record in sample for suffix in record} - {""})
    mapped = {field: _column(column, bool(objects), {*members, *values}) for field, column in (given or {}).items()}
    media = {} if set(mapped) & set(MEDIA) else _media_columns(sample, values)
    hidden = (MEDIA_NAMES - set(media.values()) if media else set()) | (OF_DOWNLOADS if downloads else set())
    hidden |= {"caption"} if downloads and "txt" in members else set()
    names = list(dict.fromkeys([*(column for column in media.values()), *members, *values, KEY]))
    inner = {name for name, value in values.items() if isinstance(value, (dict, list))}
    inner |= {name for name in members if name.endswith("json")}
    named = {str(column).partition(".")[0] for column in mapped.values()} | set(map(str, mapped.values()))
    free = [name for name in names if name not in hidden or name in named]
    chat = {"conversations": "json"} if "json" in members and not objects and not set(mapped) & set(CHATS) else {}
    try:
        found = find_columns(free, {**media, **chat, **mapped}, inner=inner)
    except UserError as error:
        if "cls" in members and given is None:
            raise UserError(
                "the tars hold pictures and .cls, the numbers of classes: Molmo2 learns from words. Write a caption, "
                "or a question and its answer, for each picture (KEY.txt, or fields of KEY.json)"
            ) from None
        raise UserError(f"{error} (members have their suffix as a name, fields of .json their own)") from None
    read = {start for column in found.read() for start in (column, *starts(column))}
    left = tuple(name for name in names if name not in read and name not in (KEY, "json"))
    return replace(found, left=left, mapped=frozenset(mapped))


def _media_columns(sample: Sequence[Mapping[str, Any]], fields: Mapping[str, Any]) -> dict[str, str]:
    """Which column is the record's medium: {"image": suffix}, {"video": suffix}, {"images": NUMBERED}, the field of the
    JSON that names members, or nothing.

    Raises:
        UserError: a record has several that are not numbered.
    """
    for field in ("images", "image", "video"):
        if field in fields and any(_names_members(record, field) for record in sample):
            return {field: field}
    found: dict[str, str] = {}
    for record in sample:
        images, videos = _plain(record)
        numbered = _numbered(record)
        one = [*images, *videos, *([NUMBERED] if numbered else [])]
        if len(one) > 1:
            seen = ", ".join(f".{suffix}" for suffix in (*images, *videos))
            line = f"video: {videos[0]}" if videos else f"image: {images[0]}"
            raise UserError(
                f"a record has several media ({seen}); say which is meant in a file for --map, such as {line}"
            )
        if one:
            found.setdefault("video" if videos else "images" if numbered else "image", one[0])
    if len(found) > 1:
        raise UserError(
            f"some records have {' and others '.join(found.values())}; divide the tars, or name one in a file for --map"
        )
    return found


def _names_members(record: Mapping[str, Any], field: str) -> bool:
    """Whether a field of a record's JSON names members by their suffix, as this project's own tars do."""
    value = record[""].get(field) if isinstance(record.get(""), dict) else None
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(one, str) and one.lower() in record for one in values)


def _plain(record: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Suffixes of a record's images, and of its videos, that are not numbered and have no other name before them."""
    images = [suffix for suffix in record if suffix in IMAGE_SUFFIXES]
    return images, [suffix for suffix in record if suffix in VIDEO_SUFFIXES - IMAGE_SUFFIXES]


def _numbered(record: Mapping[str, Any]) -> list[str]:
    """Suffixes of a record's numbered images, in the order of their numbers."""
    found = [(match, suffix) for suffix in record if (match := NUMBER.fullmatch(suffix)) is not None]
    return [s for _, s in sorted((int(match[1]), s) for match, s in found if match[2] in IMAGE_SUFFIXES)]


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What is read of each record, and what nobody needs to be told that it is not."""

    columns: Columns
    read: frozenset[str]  # the columns, and what stands before their dots
    quiet: frozenset[str]

    @classmethod
    def of(cls, columns: Columns, quiet: frozenset[str]) -> Reading:
        read = {start for column in columns.read() for start in (column, *starts(column))}
        return cls(columns, frozenset(read), quiet)


def _rows(files: TarFiles, reading: Reading) -> Iterator[Row]:
    for tar in files.tars:
        bad: dict[str, BadRecord] = {}
        passed: Counter[str] = Counter()
        excluded = (files.excluded or {}).get(files.name(tar), frozenset())
        number = 0
        for number, (key, members) in enumerate(_indexed(tar, bad, passed), 1):
            if key in excluded:
                continue
            row = {"line": number, "file": files.name(tar), "apart": f"{tar.stem}-{number}"}
            notes = [f"a tar with {kind}, passed over" for kind in sorted(passed)] if number == 1 else []
            yield row | _row(tar, key, members, reading, notes)
        for i, (key, error) in enumerate(bad.items(), number + 1):
            yield {"line": i, "file": files.name(tar), "fault": error.fault or Fault(key, error.detail, "a record")}


def _row(tar: Path, key: str, members: Sequence[Member], reading: Reading, notes: list[str]) -> Row:
    columns, read = reading.columns, reading.read
    by_suffix = {member.suffix: member for member in members}
    entry: dict[str, Any] = {KEY: key}
    try:
        if "json" in by_suffix and (read - set(by_suffix) - {KEY, NUMBERED} or "json" in read):
            fields = _json(tar, key, by_suffix["json"])
            entry |= fields if isinstance(fields, dict) else {}
            entry["json"] = fields
        for suffix, member in by_suffix.items():
            if suffix != "json" and suffix in read:
                entry[suffix] = _value(tar, key, member)
        _place_media(tar, key, by_suffix, columns, entry)
    except BadRecord as error:
        assert error.fault is not None
        return {"fault": Fault(f"{key}.{error.fault.field}", error.fault.seen, error.fault.expected)}
    lacking = [one for name, one in columns.taken.items() if name in MEDIA and _is_member(one) and one not in entry]
    if lacking and not set(CHATS) & set(columns.taken):
        seen = ", ".join(f".{suffix}" for suffix in by_suffix)
        return {"fault": Fault(str(lacking[0]), f"only {seen} in {key}", f"a member or field {lacking[0]}")}
    there = {*by_suffix, *entry}
    notes += [not_read(name) for name in columns.left if name in there and name not in reading.quiet]
    return {"entry": {name: value for name, value in entry.items() if name in read}, "notes": notes}


def _is_member(column: Any) -> bool:
    """Whether a column is one of media members, not a field of the JSON."""
    return column == NUMBERED or str(column).rpartition(".")[2] in IMAGE_SUFFIXES | VIDEO_SUFFIXES


def _place_media(tar: Path, key: str, members: Mapping[str, Member], columns: Columns, entry: dict[str, Any]) -> None:
    """Put the media of a record where its columns are: numbered ones in a list, a .png where others have a .jpg, and
    members that the JSON names."""
    for field in set(MEDIA) & set(columns.taken):
        column = columns.taken[field]
        if column == NUMBERED:
            if found := _numbered(members):
                entry[NUMBERED] = [_stored(tar, key, members[suffix]) for suffix in found]
        elif isinstance(column, str) and column in entry:
            entry[column] = _named(tar, key, members, entry[column])
        elif isinstance(column, str) and field not in columns.mapped:
            images, videos = _plain(members)
            alike = videos if field == "video" else images
            if len(alike) == 1:
                entry[column] = _stored(tar, key, members[alike[0]])


def _named(tar: Path, key: str, members: Mapping[str, Member], value: Any) -> Any:
    """A path, or a list of paths, with members of the record in place of their names."""
    if isinstance(value, list):
        return [_named(tar, key, members, one) for one in value]
    if not isinstance(value, str):
        return value
    base = value.rpartition("/")[2]
    for suffix in (base.lower(), base.removeprefix(f"{key.rpartition('/')[2]}.").lower()):
        if suffix in members:
            return _stored(tar, key, members[suffix])
    return value


def _stored(tar: Path, key: str, member: Member) -> Stored:
    return Stored(str(tar), member.offset, member.size, f"{key}.{member.suffix}")


def _value(tar: Path, key: str, member: Member) -> Any:
    """What a member holds: a medium by its place, JSON, or a text."""
    kind = member.suffix.rpartition(".")[2]
    if kind in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
        return _stored(tar, key, member)
    if kind == "json":
        return _json(tar, key, member)
    try:
        return _content(tar, key, member).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        fault = Fault(member.suffix, f"bytes that are not UTF-8 (byte {error.start})", "a text")
        raise BadRecord(key, "bad record", f".{member.suffix} is not UTF-8", fault) from None


def _json(tar: Path, key: str, member: Member) -> Any:
    """What a .json holds; NaN, which Python's json writes, is nothing."""
    content = _content(tar, key, member)
    try:
        value = json.loads(content, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        fault = Fault(member.suffix, f"no JSON: {str(error)[:100]}", "JSON")
        raise BadRecord(key, "bad json", "", fault) from None
    if not isinstance(value, (dict, list, str)):
        raise BadRecord(key, "bad record", "", Fault(member.suffix, show(value), "a JSON object"))
    return value


def _content(tar: Path, key: str, member: Member) -> bytes:
    if member.size > TEXT_BYTES:
        fault = Fault(member.suffix, f"{member.size} bytes", f"at most {TEXT_BYTES} of text")
        raise BadRecord(key, "too large", "", fault)
    return Stored(str(tar), member.offset, member.size, f"{key}.{member.suffix}").read()
