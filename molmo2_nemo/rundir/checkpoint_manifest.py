"""manifest.json of a checkpoint: its files with sizes and checksums, written last, by which the checkpoint is verified
later. (The manifest of a data set is another one: data/manifest.py.)

A checkpoint is whole if its folder has a manifest and no mark of an unfinished one beside it. `molmo2 status` reads
these folders while a run writes them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from molmo2_nemo import compat
from molmo2_nemo.errors import UserError
from molmo2_nemo.files import write_json

MANIFEST = "manifest.json"
WEIGHTS, WEIGHTS_METADATA = "weights", "metadata.json"  # of a checkpoint: the folder, and a file in it
UNFINISHED = "-unfinished"  # NeMo's mark: an empty file beside the folder, named like it with this at the end
STEP = "step="  # and the optimizer step: the name of a checkpoint's folder
VERSION = 1
READERS = 4  # files hashed at once; hashing leaves the interpreter's lock alone
BLOCK = 1 << 22


def step_folder(step: int) -> str:
    """The name of the checkpoint of an optimizer step."""
    return f"{STEP}{step}"


def step_of(checkpoint: Path) -> int:
    """The optimizer step in the name of a folder that `finished` found."""
    return int(checkpoint.name.removeprefix(STEP))


def refuse_converted(checkpoint: Path) -> None:
    """Refuses a checkpoint that modelopt has converted, by the state that it adds; NeMo would unpickle that, and so run
    what somebody put there.

    Args:
        checkpoint: its folder, or that of its weights.

    Raises:
        UserError: names the state.
    """
    for state in (checkpoint / WEIGHTS / "modelopt_state", checkpoint / "modelopt_state"):
        if state.exists():
            raise UserError(
                f"{checkpoint} was converted by modelopt (quantised, pruned or distilled; it has {state}), which this "
                "project neither trains nor reads; name the checkpoint that it was made from"
            )


def finished(folder: Path) -> list[Path]:
    """Checkpoints of a stage's checkpoints/ folder that no run is still writing or removing, newest first."""
    named = [p for p in folder.glob(f"{STEP}*") if re.fullmatch(rf"{STEP}\d+", p.name)]
    found = [p for p in named if p.is_dir() and not p.with_name(p.name + UNFINISHED).exists()]
    return sorted(found, key=step_of, reverse=True)


def newest_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint of a stage's checkpoints/ folder, by names and sizes; None where there is none."""
    return next((path for path in finished(folder) if not damage(path)), None)


def share(checkpoint: Path, rank: int, size: int) -> list[Path]:
    """Files of the checkpoint that process `rank` of `size` answers for, about equal in bytes."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST)
    files.sort(key=lambda p: p.stat().st_size, reverse=True)  # stable: every process sees the same order
    return files[rank::size]


def describe(checkpoint: Path, files: Iterable[Path]) -> dict[str, list[Any]]:
    """`{name: [bytes, SHA-256]}` of the files."""
    names = list(files)
    with ThreadPoolExecutor(READERS) as pool:
        sums = list(pool.map(_sha256, names))
    return {p.relative_to(checkpoint).as_posix(): [p.stat().st_size, s] for p, s in zip(names, sums, strict=True)}


def write(checkpoint: Path, files: dict[str, list[Any]]) -> None:
    """Write the manifest, whole or not at all, with the versions of the libraries that wrote the checkpoint."""
    values = {"version": VERSION, "stack": compat.versions(), "files": dict(sorted(files.items()))}
    write_json(checkpoint / MANIFEST, values)


def written_with(checkpoint: Path) -> dict[str, str]:
    """Library -> version that wrote the checkpoint; empty where that is not known."""
    try:
        return dict(json.loads((checkpoint / MANIFEST).read_text())["stack"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def other_versions(checkpoint: Path) -> str:
    """Says so where another line of Megatron-core or torch wrote the checkpoint than is here: formats change between
    them. Empty where none did, or it is not known."""
    written, here = written_with(checkpoint), compat.versions()
    return "; ".join(
        f"it was written with {name} {written[name]}, and {here.get(name)} is installed here"
        for name in ("megatron-core", "torch")
        if compat.line_of(written.get(name)) not in ((0, 0), compat.line_of(here.get(name)))
    )


def read(checkpoint: Path) -> dict[str, list[Any]] | None:
    """The manifest's files; None where there is no manifest that can be read."""
    try:
        values = json.loads((checkpoint / MANIFEST).read_text())
        return dict(values["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def damage(checkpoint: Path, *, sums: bool = False, rank: int = 0, size: int = 1) -> list[str]:
    """What is wrong with a checkpoint, in words; empty if it is whole.

    Args:
        sums: compare contents too, not only names and sizes.
        rank, size: with several processes, the share of the files whose contents this one compares.
    """
    listed = read(checkpoint)
    if listed is None:
        return [f"no readable {MANIFEST}: it was not written to its end, or copied in part"]
    wrong = []
    for name, (count, _) in listed.items():
        path = checkpoint / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != count:
            wrong.append(f"{name} has {path.stat().st_size} bytes, not {count}")
    if wrong or not sums:
        return wrong
    mine = sorted(listed, key=lambda n: -listed[n][0])[rank::size]
    try:
        now = describe(checkpoint, [checkpoint / name for name in mine])
    except OSError as error:
        return [f"it cannot be read: {error}"]
    return [f"{name} has changed since it was written" for name in mine if now[name] != listed[name]]


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()
