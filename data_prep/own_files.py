"""What a user brings -> rows: JSON Lines, a JSON list, COCO, CSV, Parquet, Arrow, tars, folders of Hugging Face's.

A row is {"line": number, "content": bytes} of JSON Lines, unparsed, else {"line": number, "entry": dict}.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.sources.base import Row
from data_prep.sources.own_columns import Columns, find_columns
from molmo2_nemo.data.json_values import Fault, show
from molmo2_nemo.data.manifest import file_sha256
from molmo2_nemo.errors import UserError

BUFFER_BYTES = 2**20


def _zst(path: Path) -> io.BufferedReader:
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), BUFFER_BYTES)


PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zst,
}
DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error)  # what unpacking raises for a packed file that is not whole
LINES = (".jsonl", ".ndjson", ".jsonlines")
TABLES = (".csv", ".tsv", ".parquet", ".arrow")
ENDINGS = (*LINES, ".json", *TABLES)
HEAD = 4096
LARGE_BYTES = 2**30
TAR_BYTES = 64 * 2**20
END_BYTES = 2**20
WHOLE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class OwnRows:
    """What was found.

    Args:
        kind: in words.
        rows: an iterator over all rows, made anew by each call.
        files: they are read from, in this order.
        folders: paths in the rows are relative to the first of these that has them.
        columns: what each column is; None where rows are lines of JSON in our fields.
        unread: what is there but not read, in words.
    """

    kind: str
    rows: Callable[[], Iterable[Row]]
    files: tuple[Path, ...]
    folders: tuple[Path, ...]
    columns: Columns | None = None
    unread: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """What the manifest keeps of the source: files, their contents, and what the columns were taken for."""
        if len(self.files) == 1:
            said = f"{self.files[0].name} with SHA-256 {fingerprint(self.files[0])}"
        else:
            digest = hashlib.sha256("".join(map(fingerprint, self.files)).encode()).hexdigest()
            said = f"{len(self.files)} files of {self.folders[0].name} with SHA-256 {digest}"
        if self.columns is None:
            return said
        taken = {**self.columns.taken, **self.columns.literal()}
        return f"{said}; columns {json.dumps(taken, ensure_ascii=False)}"


def fingerprint(path: Path, large: int = LARGE_BYTES) -> str:
    """SHA-256 of a file's content; of a table with media in it, of more than `large` bytes, and of a tar of more than
    `TAR_BYTES`, of its size and its ends.

    The last part of a Parquet file has the places and statistics of all columns.
    """
    size = path.stat().st_size
    kind = ending(path)[0]
    if kind not in (".parquet", ".arrow", ".tar") or size <= (TAR_BYTES if kind == ".tar" else large):
        return file_sha256(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(END_BYTES))
        file.seek(max(size - END_BYTES, 0))
        digest.update(file.read())
    return f"{digest.hexdigest()} of size and ends"


def beside(path: Path) -> tuple[Path, ...]:
    """The folders of a file: that of the file itself where `path` is a link, and that of the link."""
    return tuple(dict.fromkeys((path.resolve().parent, path.parent.resolve())))


def ending(path: Path) -> tuple[str, str]:
    """(the ending that says the kind, the ending of what packed it, or "") of a file's name, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in PACKED else ""
    return suffixes[-1] if suffixes else "", packed


def stem(path: Path) -> str:
    """The name of a file without the endings that say its kind."""
    kind, packed = ending(path)
    name = path.name[: len(path.name) - len(packed)] if packed else path.name
    return name[: -len(kind)] if kind in ENDINGS else path.stem if not path.is_dir() else path.name


def find_rows(path: Path, given: Mapping[str, Any] | None = None) -> OwnRows:
    """The rows of a file or a folder.

    Args:
        given: the map of `--map`.
    Raises:
        UserError: nothing that can be read, or a map that does not fit.
    """
    if path.is_dir() or path.suffix.lower() == ".tar":
        from data_prep.own_tars import tar_rows, tars_of

        tars = tars_of(path) if path.exists() else None
        if tars is not None:
            return tar_rows(tars, given)
    if path.is_dir():
        from data_prep.own_tables import folder_rows

        return folder_rows(path, given)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a file of your own, or a name from molmo2 prepare --list")
    kind, packed = ending(path)
    folders = beside(path)
    if kind in TABLES and not (packed and kind in (".parquet", ".arrow")):
        from data_prep.own_tables import table_rows

        return table_rows([path], folders, given)
    if kind == ".json" and not packed and (found := _json_file(path, given)) is not None:
        return found
    if kind in (*LINES, ".json"):
        rows = partial(json_lines, path)
        if given is None:
            return OwnRows("JSON Lines", rows, (path,), folders)
        return OwnRows("JSON Lines", rows, (path,), folders, columns_of(rows(), given))
    raise UserError(
        f"{path}: own data is read from {', '.join(ENDINGS)} files, text also packed as {', '.join(PACKED)}"
    )


def open_file(path: Path) -> Any:
    """A file as bytes, unpacked where its name says that it is packed."""
    opener = PACKED.get(path.suffix.lower())
    return opener(path) if opener is not None else path.open("rb")


def of_the_machine(error: Exception) -> bool:
    """Whether one of `DAMAGED` is the operating system's, of a disk, not of what was read."""
    return isinstance(error, OSError) and error.errno is not None


def json_lines(path: Path) -> Iterator[Row]:
    """The non-empty lines, unparsed, so that a malformed line does not affect the others.

    Raises:
        UserError: a packed file that is damaged.
    """
    with open_file(path) as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield {"line": number, "content": line.removeprefix(b"\xef\xbb\xbf")}
        except DAMAGED as error:
            if of_the_machine(error):
                raise
            raise UserError(f"{path} is damaged after line {number}: {error}") from None


def first_entries(rows: Iterable[Row], count: int = 100) -> list[dict[str, Any]]:
    found = []
    for row, _ in zip(rows, range(count), strict=False):
        try:
            entry = row["entry"] if "entry" in row else json.loads(row["content"])
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def columns_of(rows: Iterable[Row], given: Mapping[str, Any] | None) -> Columns:
    """What the fields of the first objects are, as columns."""
    entries = first_entries(rows)
    names = dict.fromkeys(name for entry in entries for name in entry)
    inner = {name for entry in entries for name, value in entry.items() if isinstance(value, dict)}
    return find_columns(list(names), given, inner=inner, mixed=True)


# --- JSON ------------------------------------------------------------------------------------------------------------


def _json_file(path: Path, given: Mapping[str, Any] | None) -> OwnRows | None:
    """A JSON list, or COCO's object; None for a file of lines."""
    folders = beside(path)
    with path.open("rb") as file:
        head = file.read(HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"["):
        rows = partial(_listed, path)
        columns = None if given is None else columns_of(rows(), given)
        return OwnRows("a JSON list", rows, (path,), folders, columns)
    if head.startswith(b"{") and _is_coco(path):
        from data_prep.own_coco import coco_rows

        if given is not None:
            raise UserError(f"--map is for columns; {path} has the fields of COCO")
        return OwnRows("COCO", partial(coco_rows, path), (path,), folders)
    return None


def _is_coco(path: Path) -> bool:
    """Whether a JSON file is one object with COCO's fields; a first line that is whole says what the others are.

    Raises:
        UserError: one object over several lines, with other fields.
    """
    from data_prep.own_coco import FIELDS, is_coco

    with path.open("rb") as file:
        first = file.readline(WHOLE_BYTES).removeprefix(b"\xef\xbb\xbf")
        try:
            return is_coco(json.loads(first))
        except ValueError:
            pass
        try:
            found = json.loads(first + file.read())
        except ValueError:
            return False
    if is_coco(found):
        return True
    raise UserError(
        f"{path} is one object ({', '.join(found)}); a list of records is read, one record a line, or COCO's object "
        f"({', '.join(sorted(FIELDS))}; of captions without categories)"
    )


def _listed(path: Path) -> Iterator[Row]:
    """The entries of a JSON list, one at a time.

    Raises:
        UserError: it is damaged.
    """
    import ijson

    number = 0
    try:
        with path.open("rb") as file:
            if file.read(3) != b"\xef\xbb\xbf":
                file.seek(0)
            for number, entry in enumerate(ijson.items(file, "item", use_float=True), 1):
                if isinstance(entry, dict):
                    yield {"line": number, "content": json.dumps(entry).encode()}
                else:
                    yield {"line": number, "fault": Fault("", show(entry), "an object, a record")}
    except ijson.JSONError as error:
        raise UserError(f"{path} cannot be parsed after entry {number}: {error}") from None
