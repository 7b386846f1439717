"""JSON that others wrote: whatever is wrong with it ends in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import ConversionError


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Args:
        where: names the text in messages.

    Raises:
        ConversionError: not JSON, nested too deeply to be read, or not an object.
    """
    try:
        data = json.loads(text)
    except RecursionError as error:
        raise ConversionError(f"{where} is nested too deeply to be read") from error
    except ValueError as error:  # UnicodeDecodeError is one
        raise ConversionError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConversionError(f"{where} holds a {type(data).__name__}, expected an object")
    return data


def is_present(path: Path) -> bool:
    """Whether a file that may be missing is there.

    Raises:
        ConversionError: something else has its name: a folder, or a link to nothing.
    """
    if path.is_file():
        return True
    if os.path.lexists(path):
        what = (
            "folder" if path.is_dir() else "link to a file that is not there" if path.is_symlink() else "special file"
        )
        raise ConversionError(f"{path} is a {what}, expected a file; repair or remove it")
    return False


def read_object(path: Path, expected: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        expected: what the file's folder should be, in messages.

    Raises:
        ConversionError: no such file, or see `parse_object`.
    """
    if not path.is_file():
        raise ConversionError(f"{path} does not exist; expected {expected}")
    return parse_object(path.read_bytes(), str(path))
