"""Files that appear whole or not at all: written under a temporary name beside their own, renamed when complete."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import writing


@contextmanager
def atomic(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Gives a temporary name to write to. When the block ends without an error, that file replaces `path`, else it is
    removed.

    The name is hidden, and no other process or thread gets the same one, so several may write one file: the last wins.

    Args:
        sync: the content is on the disk before the file gets its name, so that a power cut leaves no empty file.

    Raises:
        OSError: the file cannot be written; names `path`.
    """
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        with writing(path):
            yield part
            if sync:
                with part.open("rb") as file:
                    os.fsync(file.fileno())
            os.replace(part, path)
    except OSError as error:
        if error.filename == str(part):
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, sync: bool = False) -> None:
    """Write a file, UTF-8, whole or not at all; `sync` and errors are those of `atomic`."""
    with atomic(path, sync=sync) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        OSError: the file cannot be written; names `path`.
        TypeError: `value` holds something that JSON has no form for.
    """
    write_text(path, json.dumps(value, indent=indent) + "\n")
