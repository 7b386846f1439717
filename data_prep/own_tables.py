"""Tables and folders that a user brings: CSV, Parquet, Arrow, and what Hugging Face's datasets writes or reads."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn

from data_prep.own_files import (
    DAMAGED,
    ENDINGS,
    LINES,
    PACKED,
    OwnRows,
    columns_of,
    ending,
    json_lines,
    of_the_machine,
    open_file,
)
from data_prep.sources.base import Row
from data_prep.sources.own_columns import Columns, find_columns
from data_prep.sources.own_shapes import not_read
from molmo2_nemo.data.json_values import Fault, show
from molmo2_nemo.data.record import IMAGE_SUFFIXES, VIDEO_SUFFIXES, other_code
from molmo2_nemo.errors import UserError, plural, read_text

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of Hugging Face's folders of images or videos
SPLIT = "train"
LOOKED_AT = 1000  # files below a folder, to name where they are
DELIMITERS = ",;\t"
UNCLOSED = "unexpected end of data"  # the csv module's words
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # bytes that `surrogateescape` lets through
SEVERAL_LINES = (
    "rows with a cell over several lines, the first begins in line {}: its own line breaks, or a quote that is "
    "not closed in its line has swallowed rows"
)


def table_rows(
    files: Sequence[Path], folders: tuple[Path, ...], given: Mapping[str, Any] | None, unread: Sequence[str] = ()
) -> OwnRows:
    """The rows of files with the same columns.

    Raises:
        UserError: columns that nothing can be learned from, or a map that does not fit them.
    """
    kind = ending(files[0])[0]
    if kind in (".csv", ".tsv"):
        columns = find_columns(_csv_header(files[0]), given)
    else:
        names, classes, inner = arrow_header(files[0])
        columns = find_columns(names, given, classes, inner)
    words = {".csv": "CSV", ".tsv": "TSV", ".parquet": "Parquet", ".arrow": "Arrow"}[kind]
    if len(files) > 1:
        words = f"{words}, {len(files)} files"
    return OwnRows(words, partial(_rows, tuple(files), columns), tuple(files), folders, columns, tuple(unread))


def _rows(files: Sequence[Path], columns: Columns) -> Iterator[Row]:
    number = 0
    for path in files:
        if ending(path)[0] in (".csv", ".tsv"):
            yield from _csv_rows(path)
            continue
        for row in _arrow_rows(path, columns):
            number += 1
            yield {"line": number, "entry": row, "notes": [not_read(name) for name in columns.left if name not in row]}


class _Unclosed(csv.Error):
    """A quote that is opened and not closed to the end of the file."""


class _Rows:
    """Rows of a CSV as lists of cells, or what is wrong with one; bytes that are not UTF-8 stay in them as lone
    surrogates.

    Args:
        before: lines of the file before the first of `lines`.
    """

    def __init__(self, lines: Iterator[str], delimiter: str, before: int):
        self._reader, self._before = csv.reader(lines, delimiter=delimiter, strict=True), before
        self.begins = self.ends = before  # the lines of the last row, from 1

    def __iter__(self) -> Iterator[list[str] | Fault]:
        return self

    def __next__(self) -> list[str] | Fault:
        self.begins = self._before + self._reader.line_num + 1
        try:
            return next(self._reader)
        except csv.Error as error:
            if str(error) == UNCLOSED:
                raise _Unclosed from None
            last = self._before + self._reader.line_num
            several = f", with the lines to {last}" if last > self.begins else ""
            seen = f"a row that cannot be read ({error}){several}"
            return Fault("", seen, 'cells, quoted whole or not at all, a quote in them as ""')
        finally:
            self.ends = self._before + self._reader.line_num


@contextmanager
def _csv(path: Path, behind: int = 0) -> Iterator[_Rows]:
    """The rows of a CSV, whose cells are apart by what its first line has most of: comma, semicolon or tabulator.

    Args:
        behind: of the file only what comes after so many lines.
    Raises:
        UserError: a first line that is not UTF-8, a packed file that is damaged.
    """
    rows = None
    with TextIOWrapper(open_file(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        try:
            first = file.readline()
            if NOT_UTF8.search(first) or "\0" in first[:4]:
                raw = first.encode("utf-8", "surrogateescape")
                raise UserError(f"{path}, line 1: is not UTF-8{other_code(raw)}")
            rows = _Rows(islice(chain([first], file), behind, None), max(DELIMITERS, key=first.count), behind)
            yield rows
        except DAMAGED as error:
            if of_the_machine(error):
                raise
            after = f" after line {rows.ends}" if rows is not None else ""
            raise UserError(f"{path} cannot be read{after}: {error}") from None


def _csv_header(path: Path) -> list[str]:
    try:
        with _csv(path) as reader:
            names = next(reader, [])
    except _Unclosed:
        raise _swallowed(path, 1) from None
    if isinstance(names, Fault):
        raise UserError(f"{path}, line 1: holds {names.seen}, not {names.expected}")
    if not names or len(set(names)) != len(names) or "" in names:
        raise UserError(f"{path}: the first line must name the columns, each once, not {', '.join(names)[:100]!r}")
    return names


def _csv_rows(path: Path) -> Iterator[Row]:
    """Rows, with the number of the line that each ends in; those with a cell over several lines have a note. Of a row
    with a quote that is never closed the first line is left out, where the lines after it are rows.

    Raises:
        UserError: they are not, so that nobody knows how many rows are lost.
    """
    names, behind = _csv_header(path), 0
    while True:
        with _csv(path, behind) as rows:
            if not behind:
                next(rows)
            try:
                yield from _rows_of(rows, names)
                return
            except _Unclosed:
                behind = rows.begins
        if not _are_rows(path, behind, len(names)):
            raise _swallowed(path, behind)
        fault = Fault("", "a quote that is opened and never closed", 'a quote that is closed, or "" for one in a cell')
        yield {"line": behind, "fault": fault}


def _rows_of(rows: _Rows, names: Sequence[str]) -> Iterator[Row]:
    several = ""
    for cells in rows:
        if isinstance(cells, Fault):
            yield {"line": rows.begins, "fault": cells}
            continue
        broken = rows.ends > rows.begins and any("\n" in cell.strip("\r\n") for cell in cells)
        if broken and not several:
            several = SEVERAL_LINES.format(rows.begins)
        bad = next((i for i, cell in enumerate(cells) if NOT_UTF8.search(cell)), None)
        if cells and len(cells) != len(names):
            begins = f", in a row over several lines that begins in line {rows.begins}" if broken else ""
            fault = Fault("", f"{plural(len(cells), 'cell')}{begins}", f"{len(names)}, as many as the first line")
            yield {"line": rows.ends, "fault": fault}
        elif bad is not None:
            yield {"line": rows.ends, "fault": _bytes_fault(names[bad], cells[bad])}
        elif cells:
            row = {"line": rows.ends, "entry": dict(zip(names, cells, strict=True))}
            yield row | {"notes": [several]} if broken else row


def _are_rows(path: Path, behind: int, count: int) -> bool:
    """Whether what comes after so many lines of a CSV are rows with so many cells, more than one, and nothing else."""
    try:
        with _csv(path, behind) as rows:
            return count > 1 and all(isinstance(cells, list) and len(cells) in (0, count) for cells in rows)
    except _Unclosed:
        return False


def _swallowed(path: Path, line: int) -> UserError:
    says = "a quote opened in it is not closed, so that all lines after it are one cell"
    return UserError(f"{path}, line {line}: the row that begins there cannot be read: {says}")


def _bytes_fault(column: str, cell: str) -> Fault:
    raw = cell.encode("utf-8", "surrogateescape")
    shown = raw.decode("utf-8", "backslashreplace")
    return Fault(column, f"'{shown[:60]}'", f"UTF-8{other_code(raw)}")


def arrow_header(path: Path) -> tuple[list[str], dict[str, list[str]], set[str]]:
    """(columns, names of the classes that numbers stand for, columns of objects) of a Parquet or Arrow file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if ending(path)[0] == ".parquet":
            schema = pq.read_schema(path)
        else:
            with pa.memory_map(str(path)) as file:
                schema = pa.ipc.open_stream(file).schema
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} cannot be read: {str(error)[:200]}") from None
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    classes = dict(_classes(features))
    inner = {entry.name for entry in schema if pa.types.is_struct(entry.type)}
    return list(schema.names), classes, inner


def _classes(features: Any, start: str = "") -> Iterator[tuple[str, list[str]]]:
    """(column, names) of the class labels among Hugging Face's features, also inside objects and lists."""
    if not isinstance(features, dict):
        return
    if features.get("_type") == "ClassLabel":
        yield start, features["names"]
    elif "_type" in features:
        yield from _classes(features.get("feature"), start)
    else:
        for name, inner in features.items():
            yield from _classes(inner, f"{start}.{name}" if start else name)


def _arrow_rows(path: Path, columns: Columns) -> Iterator[dict[str, Any]]:
    from data_prep.tables import read_file

    read = columns.read()  # a.b may be a field b of the column a, or a column
    return read_file(path, columns=tuple(dict.fromkeys([*read, *(name.partition(".")[0] for name in read)])))


# --- folders ---------------------------------------------------------------------------------------------------------


def folder_rows(path: Path, given: Mapping[str, Any] | None) -> OwnRows:
    """A folder that Hugging Face's datasets wrote or reads: save_to_disk, Parquet files, or metadata beside media.

    Raises:
        UserError: another folder.
    """
    if (path / "dataset_dict.json").is_file():
        splits = _parts(path / "dataset_dict.json", "splits")
        name = SPLIT if SPLIT in splits else splits[0]
        others = [f"the split {other}: name {path / other}" for other in splits if other != name]
        return _saved(path / name, given, others)
    if (path / "state.json").is_file():
        return _saved(path, given, ())
    for place in (path, path / SPLIT):
        for name in METADATA:
            if (place / name).is_file():
                return _metadata(path, place / name, given)
    files = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    train = [file for file in files if file.name.startswith(SPLIT)]
    if train or files:
        read = train or files
        left = [one for one in files_below(path, (*LINES, ".parquet")) if one not in read]
        return table_rows(read, (path.resolve(),), given, tuple(by_place(path, left)))
    from data_prep.own_texts import text_rows

    if (found := text_rows(path, given)) is not None:
        return found
    raise UserError(f"{path} is a folder without tars or a data set of Hugging Face's in it; {_instead(path)}")


def files_below(path: Path, endings: Collection[str]) -> list[Path]:
    """The files of these kinds in a folder and those below it, in the order of their paths. Links are followed, each
    folder is read once, and what begins with a dot is left out; a link whose file is gone is among them, so that who
    reads it hears of it.

    Raises:
        OSError: a folder that cannot be read.
    """
    found, seen = [], set()
    for folder, inside, names in os.walk(path, onerror=_refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        here = (Path(folder, name) for name in names if not name.startswith("."))
        found += [file for file in here if ending(file)[0] in endings and (file.is_file() or not file.exists())]
    return sorted(found)


def _refuse(error: OSError) -> NoReturn:
    raise error


def by_place(path: Path, files: Sequence[Path]) -> Iterator[str]:
    """Files that are not read, in words: by the folder in `path` that they are in."""
    counts: dict[Path, int] = {}
    for file in files:
        first = path / file.relative_to(path).parts[0]
        counts[first] = counts.get(first, 0) + 1
    for place, count in sorted(counts.items()):
        if place.is_dir():
            yield f"{plural(count, 'file')} in {place}"
        else:
            yield f"the file {place}"


def _instead(path: Path) -> str:
    """What can be named in place of a folder that is not read."""
    inside = sorted(one for one in path.iterdir() if not one.name.startswith("."))
    files = [one for one in inside if one.is_file() and ending(one)[0] in ENDINGS]
    if files:
        named = f"name one of its files: {', '.join(map(str, files[:6]))}{', ...' if len(files) > 6 else ''}"
        if all(ending(one)[0] in LINES for one in files):
            named += "; lines of texts have a field text, or one that --map names (text: NAME), and no medium"
        return named
    deeper = (one for one in path.glob("*/**/*") if ending(one)[0] in (*LINES, ".parquet") and one.is_file())
    below = sorted({str(one.parent) for one in islice(deeper, LOOKED_AT)})
    if below:
        named = ", ".join(below[:3]) + (", ..." if len(below) > 3 else "")
        return (
            f"files of folders below it are not read, as they are no texts (a field text, or one that --map names, and "
            f"no medium): name a file, or for Parquet the folder that holds it ({named})"
        )
    folders = [one.name for one in inside if one.is_dir()]
    if folders and not any(one.is_file() for one in inside):
        names = ", ".join(folders[:3]) + (", ..." if len(folders) > 3 else "")
        return (
            f"folders ({names}) say nothing that can be trained: write a file with a line for each picture, with the "
            f"columns file_name and caption: {path / METADATA[1]}"
        )
    return f"name a file ({', '.join(ENDINGS)}; text also packed as {', '.join(PACKED)})"


def _saved(path: Path, given: Mapping[str, Any] | None, unread: Sequence[str]) -> OwnRows:
    files = [path / entry["filename"] for entry in _parts(path / "state.json", "_data_files")]
    return table_rows(files, (path.resolve(),), given, unread)


def _parts(path: Path, name: str) -> list[Any]:
    """The list `name` in a JSON file that save_to_disk wrote.

    Raises:
        UserError: there is none.
    """
    try:
        found = json.loads(read_text(path))[name]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} is not what save_to_disk writes: {type(error).__name__} {error}") from None
    if not isinstance(found, list) or not found:
        raise UserError(f"{path} is not what save_to_disk writes: {name} is {show(found)}")
    return found


def _metadata(path: Path, file: Path, given: Mapping[str, Any] | None) -> OwnRows:
    """The rows of metadata.csv (.jsonl, .parquet) beside images or videos."""
    folders = tuple(dict.fromkeys((file.parent.resolve(), path.resolve())))
    if file.suffix != ".jsonl":
        made = table_rows([file], folders, given)
    else:
        rows = partial(json_lines, file)
        made = OwnRows("JSON Lines", rows, (file,), folders, columns_of(rows(), given))
    return replace(made, unread=(*made.unread, *_unnamed(file, made)))


def _unnamed(file: Path, made: OwnRows) -> Iterator[str]:
    """In words, the pictures and films beside a metadata file that no row of it names."""
    named = {str(row.get("entry", {}).get("file_name")) for row in map(_entry, made.rows())} - {"None"}
    if not named:
        return
    media = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    found = (one for one in sorted(file.parent.rglob("*")) if one.suffix.lower().lstrip(".") in media)
    left = [one.relative_to(file.parent).as_posix() for one in found]
    left = [name for name in left if name not in named]
    if left:
        media_left = plural(len(left), "picture or film", "pictures or films")
        yield f"{media_left} that {file.name} does not name, such as {left[0]}"


def _entry(row: Row) -> Row:
    """A row whose line of JSON is read; one that cannot be read is told elsewhere."""
    if "content" not in row:
        return row
    try:
        entry = json.loads(row["content"])
    except ValueError:
        entry = {}
    return {"entry": entry if isinstance(entry, dict) else {}}
