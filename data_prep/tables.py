"""Rows of a source: from the Hub, a copy of it, or files downloaded by hand. One row at a time."""

from __future__ import annotations

import csv
import glob
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep import hub
from data_prep.download import Downloader
from data_prep.sources.base import Hub, Manual, Row, Source, SourceError, Table
from molmo2_nemo.data.record import other_code

BATCH_ROWS = 64  # read from a parquet file at a time; a row may hold images
WHOLE_JSON_BYTES = 64 * 2**20  # larger JSON files are streamed
csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


class Tables:
    """Reads the rows of a data set from files below `folders` (--source), else from the Hub."""

    def __init__(self, folders: tuple[Path, ...] = (), downloader: Downloader | None = None):
        self.folders, self.downloader = folders, downloader
        self.revisions: dict[str, str] = {}  # repository on the Hub -> the revision that rows were read from

    def check(self, source: Source) -> None:
        """Raises SourceError when files that must be downloaded by hand are missing; the message names them."""
        if not isinstance(source.origin, Manual):
            return
        tables = [table for table in source.origin.tables if not table.repo and not table.url]
        missing = [table.path for table in tables if not self._paths(table)]
        if not missing:
            return
        looked = ", ".join(map(str, self.folders)) or "nowhere (give a folder with --source)"
        media = f" Its media: {', '.join(source.origin.media)}." if source.origin.media else ""
        raise SourceError(
            f"data set {source.name}: {', '.join(missing)} not found below {looked}. Download by hand: "
            f"{source.origin.fetch}.{media}"
        )

    def rows(self, origin: Hub | Manual | Table, columns: Iterable[str] = (), *, own: bool = True) -> Iterator[Row]:
        """All rows; of a parquet file only `columns`, where given.

        Args:
            own: these are the rows of the source itself. The rows of another repository are looked for below --source
                only in a folder with that repository's name.
        Raises:
            SourceError: a file is missing, or cannot be read as the type that its suffix names.
        """
        wanted = tuple(columns)
        if isinstance(origin, Table):
            yield from self._table(origin, wanted)
        elif isinstance(origin, Manual):
            for table in origin.tables:
                yield from self._table(table, wanted)
        else:
            for config in origin.configs or (None,):
                for file in hub.split_files(origin, config, hub.local_copy(origin, self.folders, own=own)):
                    if file.startswith(hub.HUB_PREFIX):
                        self.revisions[origin.repo] = hub.parts(file)[1]
                    for row in read_file(hub.open_file(file), columns=origin.columns or wanted):
                        row["__config__"] = config or ""
                        yield row

    def count(self, origin: Hub | Manual) -> int | None:
        """Number of rows, for estimating the time left; None where counting is expensive or files are not local."""
        try:
            if isinstance(origin, Manual):
                if not all(self._paths(table) for table in origin.tables):
                    return None
                return sum(_count(path, table) for table in origin.tables for path, _ in self._paths(table))
            total = 0
            for config in origin.configs or (None,):
                for file in hub.split_files(origin, config, hub.local_copy(origin, self.folders)):
                    if file.startswith(hub.HUB_PREFIX):
                        return None
                    total += _count(Path(file), None)
            return total
        except (SourceError, OSError, ValueError):
            return None

    def _paths(self, table: Table) -> list[tuple[Path, str]]:
        """The files below --source, each with its path there; those of a repository may be in FOLDER/<its name> too."""
        for folder in self.folders:
            for place in (folder, folder / table.repo.rpartition("/")[2]) if table.repo else (folder,):
                found = sorted(glob.glob(table.path, root_dir=place, recursive=True))
                if found:
                    return [(place / name, name) for name in found]
        return []

    def _fetched(self, table: Table) -> list[tuple[Path, str]]:
        if table.repo:
            names = hub.matching_files(table.repo, table.path) if glob.has_magic(table.path) else [table.path]
            return [(hub.download_file(table.repo, name, None), name) for name in names]
        if table.url and self.downloader is not None:
            return [(self.downloader.fetch(table.url), table.path)]
        return []

    def _table(self, table: Table, columns: tuple[str, ...]) -> Iterator[Row]:
        paths = self._paths(table) or self._fetched(table)
        if not paths:
            raise SourceError(f"{table.path} not found below {', '.join(map(str, self.folders)) or '--source'}")
        for path, name in paths:
            for row in read_file(path, table, columns):
                row["__table__"] = name
                yield row


def read_file(path: Path, table: Table | None = None, columns: tuple[str, ...] = ()) -> Iterator[Row]:
    """Rows of a .parquet, .arrow, .jsonl, .json, .csv or .tsv file.

    Raises:
        SourceError: missing, damaged, or of another type; names the file and the line.
    """
    # A cached download has no suffix.
    reader = _READERS.get(path.suffix.lower() or Path(table.path if table else "").suffix.lower())
    if reader is None:
        raise SourceError(f"{path}: rows are read from {', '.join(sorted(_READERS))} files")
    try:
        yield from reader(path, table or Table(path.name), columns)
    except SourceError:
        raise
    except FileNotFoundError:
        raise SourceError(f"{path} is not there") from None
    except Exception as error:  # csv, json and Arrow have no common error class
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise SourceError(f"{path} cannot be read: {str(error)[:300]}") from None


def _parquet(path: Path, table: Table, columns: tuple[str, ...]) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, memory_map=True) as file:
        there = set(file.schema_arrow.names)
        wanted = [name for name in dict.fromkeys(columns) if name in there] or None
        for batch in file.iter_batches(BATCH_ROWS, columns=wanted, use_threads=False):
            yield from batch.to_pylist()


def _arrow(path: Path, table: Table, columns: tuple[str, ...]) -> Iterator[Row]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        for batch in pa.ipc.open_stream(file):
            for start in range(0, len(batch), BATCH_ROWS):
                yield from batch.slice(start, BATCH_ROWS).to_pylist()


def _jsonl(path: Path, table: Table, columns: tuple[str, ...]) -> Iterator[Row]:
    names: list[str] | None = None
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise SourceError(f"{path}:{number}: cannot be parsed: {error}") from None
                if isinstance(row, list):  # a table: the first line names the columns
                    if names is None:
                        names = [str(name) for name in row]
                        continue
                    row = dict(zip(names, row, strict=False))
                yield _object(path, number, row)


def _json(path: Path, table: Table, columns: tuple[str, ...]) -> Iterator[Row]:
    """Entries of an object, or of a list. Large files are streamed, small ones read whole, which is more lenient."""
    large = path.stat().st_size > WHOLE_JSON_BYTES
    named, entries = (_streamed_json if large else _whole_json)(path, table)
    if named:
        for name, value in entries:
            yield {**(value if isinstance(value, dict) else {"value": value}), table.key: name}
    else:
        for number, row in enumerate(entries, 1):
            yield dict(_object(path, number, row))


def _whole_json(path: Path, table: Table) -> tuple[bool, Iterable[Any]]:
    """(whether the entries are (name, value) pairs, the entries) of a JSON file read whole."""
    data = json.loads(path.read_bytes())
    for name in table.at:
        if not isinstance(data, dict) or name not in data:
            raise _no_field(path, table, list(data) if isinstance(data, dict) else [f"a {type(data).__name__}"])
        data = data[name]
    if not isinstance(data, (dict, list)):
        raise SourceError(f"{path} holds a {type(data).__name__}, not a list of rows")
    return isinstance(data, dict), data.items() if isinstance(data, dict) else data


def _streamed_json(path: Path, table: Table) -> tuple[bool, Iterable[Any]]:
    """(whether the entries are (name, value) pairs, the entries) of a JSON file, streamed one entry at a time."""
    import ijson

    place, there = ".".join(table.at), []
    with path.open("rb") as file:
        for at, event, value in ijson.parse(file, use_float=True):
            if at == place and event != "map_key":
                break
            if at == "" and event == "map_key":
                there.append(str(value))
        else:
            raise _no_field(path, table, there)
    if event not in ("start_map", "start_array"):
        raise SourceError(f"{path} holds a {event}, not a list of rows")

    def entries() -> Iterator[Any]:
        with path.open("rb") as file:
            if event == "start_map":
                yield from ijson.kvitems(file, place, use_float=True)
            else:
                yield from ijson.items(file, f"{place}.item".lstrip("."), use_float=True)

    return event == "start_map", entries()


def _no_field(path: Path, table: Table, there: list[str]) -> SourceError:
    return SourceError(f"{path} has no field {'.'.join(table.at)!r} (there is: {', '.join(there[:8])})")


def _object(path: Path, number: int, row: Any) -> Row:
    if not isinstance(row, dict):
        raise SourceError(f"{path}:{number}: a row must be an object, not {str(row)[:60]!r}")
    return row


def _csv(path: Path, table: Table, columns: tuple[str, ...]) -> Iterator[Row]:
    delimiter = table.delimiter or ("\t" if table.path.lower().endswith(".tsv") else ",")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, fieldnames=table.header or None, delimiter=delimiter, strict=True)
        begins, there = 1, True
        while there:
            try:
                there = bool(rows.fieldnames)  # reads the first line
                begins = rows.line_num + 1
                row = next(rows)
            except StopIteration:
                return
            except UnicodeDecodeError:
                raise _not_utf8(path) from None
            except csv.Error as error:
                raise SourceError(f"{path}:{begins}: cannot be read: {error} in the row that begins there") from None
            yield row


def _not_utf8(path: Path) -> SourceError:
    """Names the first line of a file that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return SourceError(f"{path}:{number}: cannot be read: is not UTF-8{other_code(line)}")
    return SourceError(f"{path} cannot be read: is not UTF-8")


def _txt(path: Path, table: Table, columns: tuple[str, ...]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline=None) as file:
        for line in file:
            if line.strip():
                yield {"line": line.rstrip("\n")}


_READERS = {
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _txt,
}


def _count(path: Path, table: Table | None) -> int:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        return int(pq.read_metadata(path).num_rows)
    if suffix in (".jsonl", ".csv", ".tsv", ".txt"):
        with path.open("rb") as file:
            lines = sum(1 for line in file if line.strip())
        return lines - (suffix in (".csv", ".tsv") and not (table and table.header))
    return sum(1 for _ in read_file(path, table))
