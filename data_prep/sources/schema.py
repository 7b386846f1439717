"""The types that a source declares for the columns it reads, and checking a row against them.

str, int, bool, float, bytes, dict, list    that type (float takes whole numbers too)
number                                      int or float, finite
image                                       an image or video column, undecoded: {bytes, path}, bytes, URL or path
object                                      anything, including None
[T]                                         a list of T
{"a": T, "b": U}                            an object with at least these fields
maybe(T)                                    T, None, or not there
one_of(T, U)                                any of these
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Maybe:
    kind: Any


@dataclass(frozen=True)
class AnyOf:
    kinds: tuple[Any, ...]


class _Named:
    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


number = _Named("number")
image = _Named("image")


def maybe(kind: Any) -> Maybe:
    """`kind`, None, or not there."""
    return Maybe(kind)


def one_of(*kinds: Any) -> AnyOf:
    """Any of `kinds`."""
    return AnyOf(kinds)


def check_row(row: Mapping[str, Any], fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first field that does not match, and why; None when all match. Undeclared fields may be anything."""
    known = _compiled.get(id(fields))
    if known is None:  # keeping the fields beside their test ensures that no other object gets their id
        known = _compiled[id(fields)] = fields, _test_of(fields)
    return None if known[1](row) else _check_fields(row, fields, "")


_compiled: dict[int, tuple[Mapping[str, Any], Callable[[Any], bool]]] = {}


def _test_of(kind: Any) -> Callable[[Any], bool]:
    """A fast test of whether a value matches: rows of tracks hold thousands of values, nearly all of which match."""
    if isinstance(kind, Maybe):
        inner = _test_of(kind.kind)
        return lambda value: value is None or inner(value)
    if isinstance(kind, AnyOf):
        tests = [_test_of(one) for one in kind.kinds]
        return lambda value: any(test(value) for test in tests)
    if isinstance(kind, list):
        each = _test_of(kind[0])
        return lambda value: isinstance(value, list) and all(map(each, value))
    if isinstance(kind, Mapping):
        parts = [(name, _test_of(one), isinstance(one, Maybe) or one is object) for name, one in kind.items()]
        return lambda value: (
            isinstance(value, Mapping)
            and all(test(value[name]) if name in value else may_lack for name, test, may_lack in parts)
        )
    exact = {str: str, int: int, float: float, number: float, bool: bool}.get(kind)
    if exact is float:
        return lambda value: (type(value) is float and math.isfinite(value)) or _is(value, kind)
    return lambda value: type(value) is exact or _is(value, kind)


def describe(kind: Any) -> str:
    """A type in words, for messages."""
    if isinstance(kind, Maybe):
        return f"{describe(kind.kind)} or nothing"
    if isinstance(kind, AnyOf):
        return " or ".join(describe(k) for k in kind.kinds)
    if isinstance(kind, list):
        return f"a list of {describe(kind[0])}"
    if isinstance(kind, Mapping):
        return "an object with " + ", ".join(kind)
    names = {str: "text", bytes: "bytes", int: "a whole number", float: "a number", bool: "true or false"}
    names |= {dict: "an object", list: "a list", object: "anything"}
    if kind in (number, image):
        return "a number" if kind is number else "an image (bytes, path or URL)"
    return names.get(kind, str(kind))


def _check_fields(row: Mapping[str, Any], fields: Mapping[str, Any], path: str) -> tuple[str, str] | None:
    for name, kind in fields.items():
        where = f"{path}.{name}" if path else name
        if name not in row:
            if isinstance(kind, Maybe) or kind is object:
                continue
            there = ", ".join(str(k) for k in list(row)[:12]) or "nothing"
            return where, f"is missing (there are: {there}); {describe(kind)} was expected"
        problem = _check(row[name], kind, where)
        if problem is not None:
            return problem
    return None


def _check(value: Any, kind: Any, path: str) -> tuple[str, str] | None:
    if isinstance(kind, Maybe):
        return None if value is None else _check(value, kind.kind, path)
    if isinstance(kind, AnyOf):
        return None if any(_check(value, k, path) is None for k in kind.kinds) else _wrong(value, kind, path)
    if isinstance(kind, list):
        if not isinstance(value, list):
            return _wrong(value, kind, path)
        for i, entry in enumerate(value):
            problem = _check(entry, kind[0], f"{path}[{i}]")
            if problem is not None:
                return problem
        return None
    if isinstance(kind, Mapping):
        return _check_fields(value, kind, path) if isinstance(value, Mapping) else _wrong(value, kind, path)
    return None if _is(value, kind) else _wrong(value, kind, path)


def _is(value: Any, kind: Any) -> bool:
    if kind is str:
        return isinstance(value, str)
    if kind is object:
        return True
    if kind is image:
        if isinstance(value, Mapping):
            return bool(value.get("bytes") or value.get("path"))
        return isinstance(value, (str, bytes)) and bool(value)
    if kind is number or kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _wrong(value: Any, kind: Any, path: str) -> tuple[str, str]:
    text = repr(value)
    return path, f"{describe(kind)} was expected, not {text if len(text) <= 60 else text[:57] + '...'}"
