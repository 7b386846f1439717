"""Shards that are intact but were renamed or swapped: found by the manifest's SHA-256, and renamed back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from molmo2_nemo.data.manifest import file_sha256


def elsewhere(folder: Path, shards: list[dict[str, Any]], off: set[str]) -> dict[str, str]:
    """Listed name -> name of the file that holds exactly the bytes listed, for the shards that are not in their place.

    Files are hashed only where their size is that of such a shard. Every visible file is looked at, as downloads are
    called `x.tar.1` too.

    Args:
        shards: those of the manifest's head.
        off: the names of those whose files are missing or are not what the manifest says.
    """
    wanted = {shard["sha256"]: shard["name"] for shard in shards if shard["name"] in off}
    sizes = {shard["bytes"] for shard in shards if shard["name"] in off}
    in_place = {shard["name"] for shard in shards} - off
    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()) if wanted else ():
        hidden = path.name.startswith(".") or path.is_symlink() or not path.is_file()
        if hidden or path.name in in_place or path.stat().st_size not in sizes:
            continue
        name = wanted.get(file_sha256(path))
        if name is not None and name != path.name:
            found.setdefault(name, path.name)
    return found


def rename_back(folder: Path, moves: dict[str, str]) -> list[Path]:
    """Give the files their listed names (listed name -> present name); returns, under new names, what lay there.

    Names are exchanged by way of free names that end in `.tar`, so that after an interruption `elsewhere` finds the
    files again; no file is ever replaced.
    """
    between = {name: free_path(folder / f"{Path(name).stem}.renamed.tar") for name in moves}
    for name, present in moves.items():
        os.rename(folder / present, between[name])
    displaced = []
    for name, path in between.items():
        if (folder / name).exists():
            displaced.append(free_path(folder / f"{Path(name).stem}.displaced.tar"))
            os.rename(folder / name, displaced[-1])
        os.rename(path, folder / name)
    return displaced


def free_path(path: Path) -> Path:
    """`path`, or with a number before its suffix, such that nothing is there."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free
