"""JSON-lines files of a run: a line that a killed process left half written spoils none before or after it.

No torch here: `molmo2 status` reads these files while a run writes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import writing
from molmo2_nemo.files import write_text
from molmo2_nemo.rundir.paths import METRICS

RENAMED = {  # file -> old key of its lines -> the current one
    METRICS: {"slots": "padded_tokens"},
}


def read_lines(path: Path, **needed: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """The objects of the file, in order, under their current keys; empty where there is no file.

    Args:
        needed: keys that a line must have, with the type of their values. Other lines are left out, as are those that
            are no JSON.
    """
    if not path.is_file():
        return []
    found, names = [], RENAMED.get(path.name, {})
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            line = {names.get(key, key): value for key, value in line.items()}
        if isinstance(line, dict) and all(isinstance(line.get(key), kind) for key, kind in needed.items()):
            found.append(line)
    return found


def read_metrics(folder: Path, **needed: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """One dictionary per logged step of the stage in `folder`, in order; of a step that was run again after a crash,
    its last line.

    Args:
        needed: keys that a line must have besides the step, with the type of their values; others are left out.
    """
    steps = {line["step"]: line for line in read_lines(folder / METRICS, step=int, **needed)}
    return [steps[step] for step in sorted(steps)]


def has_step(path: Path, step: int) -> bool:
    """Whether the file has a line of this step."""
    return any(line["step"] == step for line in read_lines(path, step=int))


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line, on a line of its own whatever stands before it; in one write, as processes may share a file.

    Raises:
        OSError: the file cannot be written, or not in full; names `path`.
    """
    with writing(path), path.open("ab+", buffering=0) as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - 1))
        whole = file.read(1) in (b"", b"\n")
        text = ("" if whole else "\n").encode() + json.dumps(line).encode() + b"\n"
        if (written := file.write(text)) < len(text):  # the system takes what it has room for
            file.write(text[written:])  # and says why only when asked again


def cut_lines(path: Path, step: int) -> None:
    """Drop lines of later steps, which a resumed run will write again. Those that stay get their current keys."""
    if path.exists():
        kept = (line for line in read_lines(path, step=int) if line["step"] <= step)
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
