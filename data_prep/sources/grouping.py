"""Grouping rows on disk, for `Context.grouped` when there are too many rows to hold in memory."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def grouped_on_disk(
    held: dict[str, list[Row]], rows: Iterator[Row], get: Callable[[Row], Any], scratch: Path | None
) -> Iterator[tuple[str, list[Row]]]:
    """(key, its rows in order) in order of first appearance, through a temporary database below `scratch`.

    Args:
        held: rows that were read before `rows`, by key; emptied here.
        get: the key of a row.
    """
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="grouping-", dir=scratch) as folder:
        base = sqlite3.connect(Path(folder) / "rows.sqlite")
        try:
            base.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-65536;")
            base.executescript(
                "CREATE TABLE keys (id INTEGER PRIMARY KEY, name TEXT UNIQUE);"
                "CREATE TABLE rows (id INTEGER, place INTEGER, content TEXT);"
            )
            place = 0

            def add(name: str, row: Row) -> None:
                nonlocal place
                base.execute("INSERT OR IGNORE INTO keys (name) VALUES (?)", (name,))
                content = json.dumps(row, default=_pack_bytes)
                base.execute(
                    "INSERT INTO rows SELECT id, ?, ? FROM keys WHERE name = ?",
                    (place, content, name),
                )
                place += 1

            while held:
                first = next(iter(held))
                for row in held.pop(first):
                    add(first, row)
            for row in rows:
                add(str(get(row)), row)
            base.execute("CREATE INDEX by_key ON rows (id, place)")
            base.commit()
            # `INSERT OR IGNORE` may leave gaps in the ids, but they grow with first appearance.
            for number_, name in base.execute("SELECT id, name FROM keys ORDER BY id"):
                found = base.execute("SELECT content FROM rows WHERE id = ? ORDER BY place", (number_,))
                yield name, [json.loads(content, object_hook=_unpack_bytes) for (content,) in found]
        finally:
            base.close()


def _pack_bytes(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray)):
        return {"__bytes__": b64encode(value).decode()}
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"a row holds a {type(value).__name__}, which cannot be grouped")


def _unpack_bytes(value: dict[str, Any]) -> Any:
    return b64decode(value["__bytes__"]) if set(value) == {"__bytes__"} else value
