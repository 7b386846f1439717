"""Settings that have been renamed: old run folders, configuration files and command lines keep working, and a message
gives the new name. Values that are no longer offered: the refusal says why. No torch here."""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Mapping
from typing import Any

from molmo2_nemo.errors import UserError

RENAMED = {  # old dotted key of a setting or group -> the new one
    "parallel.context_exchange": "parallel.cp_comm_type",
}

WITHDRAWN = {  # setting=value -> why it is refused
    "kernels.norm=te": "Transformer Engine's fused norm and linear layer is not built in; where it is installed, the "
    "decoder's linear layers on a GPU are its own whatever kernels.norm is, and norms are computed as that says",
}

_answered: set[str] = set()  # old names that this process has printed a message for


def new_name(key: str, where: str = "") -> str:
    """The current name of a setting. If `key` is an old one, a line on standard error says so, once per process.

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
    """Nested settings under their current names; `values` itself is not changed.

    Args:
        where: what holds them, for the message.
        unset: dotted key -> default. A setting with this value counts as not set, and an old name replaces it.
        first: dotted keys that take precedence over their old names.

    Raises:
        UserError: a setting has different values under its two names.
    """
    result = copy.deepcopy(values)
    for old, new in RENAMED.items():
        found, value = _take(result, old)
        if not found:
            continue
        _answer(old, new, where)
        there, present = _look(result, new)
        if new in first or (there and present == value):
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
        print(f"{where + ': ' if where else ''}{old} is now called {new}, and read as that", file=sys.stderr)


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
