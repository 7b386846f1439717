"""Settings that had another name once. Old run folders, files of one's own and command lines keep working, and the new
name is answered. No torch here."""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Mapping
from typing import Any

from molmo2_nemo.errors import UserError

RENAMED = {  # old dotted key of a setting or group -> the one it has
    "parallel.context_exchange": "parallel.cp_comm_type",
}

_answered: set[str] = set()  # old names, of this process


def new_name(key: str, where: str = "") -> str:
    """The name of a setting, which may be given by an old one; that is answered on standard error, once.

    Args:
        key: dotted, a setting or a group of them.
        where: what names it, such as a file; default: the command line.
    """
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            _answer(old, new, where)
            return new + key[len(old) :]
    return key


def with_new_names(
    values: dict[str, Any], where: str, unset: Mapping[str, Any] | None = None, first: Collection[str] = ()
) -> dict[str, Any]:
    """Nested settings with the names that they have; `values` itself stays as it is.

    Args:
        where: what holds them, for the answer.
        unset: dotted key -> value, for settings that are there though nobody set them: an old name replaces such a one.
        first: dotted keys that overrule their old names.

    Raises:
        UserError: a setting stands there under both names, with different values.
    """
    result = copy.deepcopy(values)
    for old, new in RENAMED.items():
        found, value = _take(result, old)
        if not found:
            continue
        _answer(old, new, where)
        there, present = _look(result, new)
        if there and (new in first or present == value):
            continue
        if there and not (unset is not None and new in unset and present == unset[new]):
            raise UserError(
                f"{where}: {old}={value!r} and {new}={present!r}, which are one setting under its old and its new "
                f"name; remove {old}"
            )
        _put(result, new, value)
    return result


def _answer(old: str, new: str, where: str) -> None:
    if old not in _answered:
        _answered.add(old)
        print(f"{where + ': ' if where else ''}{old} is called {new} now, and taken as that", file=sys.stderr)


def _group(values: Any, key: str) -> tuple[Any, str]:
    """The mapping that holds the key's last part (None if there is none), and that part."""
    *groups, last = key.split(".")
    for group in groups:
        values = values.get(group) if isinstance(values, dict) else None
    return (values if isinstance(values, dict) else None), last


def _look(values: dict[str, Any], key: str) -> tuple[bool, Any]:
    group, last = _group(values, key)
    return (True, group[last]) if group is not None and last in group else (False, None)


def _take(values: dict[str, Any], key: str) -> tuple[bool, Any]:
    found, value = _look(values, key)
    if found:
        group, last = _group(values, key)
        del group[last]
    return found, value


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *groups, last = key.split(".")
    for group in groups:
        values = values.setdefault(group, {})
    values[last] = value
