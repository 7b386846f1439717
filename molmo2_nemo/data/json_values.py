"""Helpers for reading a record's JSON: what a value is, how messages show it, and the error that names its field."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from molmo2_nemo.errors import DataError, nearest

UNSEEN = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # fillers of Hangul and braille without dots: drawn as nothing


def is_number(value: Any) -> bool:
    """Whether a value is a finite int or float; booleans are not numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int too large for a float
        return False


def show(value: Any) -> str:
    """The `repr` of a value, cut to at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_blank(text: str) -> bool:
    """Whether nothing of a text would be seen: white space, control and format characters (a byte order mark, a space
    of no width), and letters that are drawn as nothing."""
    return not text or all(c.isspace() or c in UNSEEN or unicodedata.category(c) in ("Cc", "Cf") for c in text)


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a record: the path of the field (`annotations[1].answer`), what it holds, what it should."""

    field: str
    seen: str
    expected: str


class FieldError(DataError):
    """A field is wrong. The message is its path and `says`."""

    def __init__(self, fault: Fault, says: str):
        super().__init__(f"{fault.field} {says}")
        self.fault, self.says = fault, says

    def __reduce__(self) -> tuple[Any, ...]:  # keeps the arguments when the error crosses a process boundary
        return type(self), (self.fault, self.says)

    @classmethod
    def wrong(cls, field: str, expected: str, value: Any) -> FieldError:
        """`field` has another value than it should."""
        return cls(Fault(field, show(value), expected), f"must be {expected}, not {show(value)}")

    @classmethod
    def missing(cls, field: str, expected: str) -> FieldError:
        """`field` is not there."""
        return cls(Fault(field, "nothing", expected), f"is missing: {expected}")

    @classmethod
    def unknown(cls, field: str, known: Iterable[str], value: Any) -> FieldError:
        """Nothing reads `field`."""
        name = field.rpartition(".")[2]
        hint = nearest(name, known)
        named = "" if name.strip() == name != "" else f", {name!r}"  # blanks cannot be seen in the path
        return cls(Fault(field, show(value), hint), f"is an unknown field{named}; {hint}")

    def inside(self, where: str) -> FieldError:
        """The same error, for a field of `where`."""
        path = f"{where}{self.fault.field}" if self.fault.field.startswith("[") else f"{where}.{self.fault.field}"
        return FieldError(Fault(path, self.fault.seen, self.fault.expected), self.says)


def without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object without the fields that are null, at every depth: null means left out.

    Raises:
        FieldError: a null inside a list, where nothing can be left out.
    """
    return {name: _without(entry, name) for name, entry in value.items() if entry is not None}


def _without(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {name: _without(entry, f"{where}.{name}") for name, entry in value.items() if entry is not None}
    if not isinstance(value, list):
        return value
    for i, entry in enumerate(value):
        if entry is None:
            raise FieldError(Fault(f"{where}[{i}]", "null", "a value"), "is null; only a named field is left out so")
    if not any(isinstance(entry, (dict, list)) for entry in value):
        return value
    return [_without(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
