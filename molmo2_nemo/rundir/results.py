"""Results of tasks in a folder, as `molmo2 evaluate` writes them (evaluation/results.py): read and checked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import UserError, read_text

COUNTS = ("questions", "failed", "unscored")


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of the file without its ending -> the result of a task, in the order of the names. JSON files that hold
    something else, such as needle_map.json, are left out.

    Raises:
        UserError: a damaged file; names it.
    """
    found = {path.stem: read_result(path) for path in sorted(folder.glob("*.json"))}
    return {name: result for name, result in found.items() if result is not None}


def read_result(path: Path) -> dict[str, Any] | None:
    """A task's result; None where the file holds an object that is none.

    Raises:
        UserError: a damaged file.
    """
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(_said(path, str(error))) from None
    if isinstance(value, dict) and not {"task", "scores"} & set(value):
        return None
    if (fault := _fault(value)) is not None:
        raise UserError(_said(path, fault))
    return dict(value)


def _said(path: Path, fault: str) -> str:
    return f"{path} is not a result of molmo2 evaluate, or damaged ({fault}); remove it, or score that task again"


def _fault(value: Any) -> str | None:
    """What of a result is not as it is written; None where all is. Counts and `score` are newer than the rest."""
    if not isinstance(value, dict):
        return "no object"
    for name, kind in (("task", str), ("group", str), ("settings", dict), ("scores", dict)):
        if not isinstance(value.get(name), kind):
            return f"{name} is {value.get(name)!r}"
    for name, found in value["scores"].items():
        if not isinstance(found, dict) or not _is_share(found.get("score")):
            return f"scores.{name} is {found!r}"
    if value.get("score") is not None and not _is_share(value["score"]):
        return f"score is {value['score']!r}"
    return next((f"{n} is {value[n]!r}" for n in COUNTS if not isinstance(value.get(n, 0), int)), None)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
