"""A folder of texts of a user: JSON Lines or Parquet of documents without media, in it and in folders below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.own_files import LINES, OwnRows, columns_of, first_entries, json_lines, stem
from data_prep.own_tables import SPLIT, arrow_header, by_place, files_below, table_rows
from data_prep.sources.base import Row
from data_prep.sources.own import NOT_BESIDE_TEXT
from molmo2_nemo.errors import plural


def text_rows(path: Path, given: Mapping[str, Any] | None) -> OwnRows | None:
    """The rows of a folder of texts, one data set in the order of the files' paths; None for other folders.

    Of a folder with a folder `train` only that is read; where there are JSON Lines of texts, no Parquet is.

    Args:
        given: the map of `--map`.
    """
    lines, tables = files_below(path, LINES), files_below(path, (".parquet",))
    for all_files, made, others in ((lines, _lines, tables), (tables, _tables, lines)):
        files, left = _train(path, all_files)
        if files and (found := made(path, files, given)) is not None:
            return replace(found, unread=tuple(by_place(path, [*left, *others])))
    return None


def _train(path: Path, files: Sequence[Path]) -> tuple[Sequence[Path], list[Path]]:
    """(the files that are read, the others)"""
    train = [file for file in files if file.relative_to(path).parts[:-1][:1] == (SPLIT,)]
    return (train, [file for file in files if file not in set(train)]) if train else (files, [])


def _lines(path: Path, files: Sequence[Path], given: Mapping[str, Any] | None) -> OwnRows | None:
    rows = partial(_all_lines, path, files)
    names = {name for entry in first_entries(rows()) for name in entry}
    if not _are_texts(names, given):
        return None
    kind = f"{plural(len(files), 'file')} of JSON Lines"
    return OwnRows(kind, rows, tuple(files), (path.resolve(),), columns_of(rows(), given))


def _tables(path: Path, files: Sequence[Path], given: Mapping[str, Any] | None) -> OwnRows | None:
    names, _, _ = arrow_header(files[0])
    return table_rows(files, (path.resolve(),), given) if _are_texts(set(names), given) else None


def _are_texts(names: set[str], given: Mapping[str, Any] | None) -> bool:
    text = "text" if given is None else given.get("text", "text")
    return text in names and not (given is None and NOT_BESIDE_TEXT & names)


def _all_lines(path: Path, files: Sequence[Path]) -> Iterator[Row]:
    """The lines of several files, whose keys have the file's path below the folder."""
    for file in files:
        name = file.relative_to(path)
        start = name.with_name(stem(file)).as_posix()
        for row in json_lines(file):
            key = f"{start}-{row['line']:08d}"
            yield {**row, "file": name.as_posix(), "key": key, "apart": key}
