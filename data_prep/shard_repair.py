"""Repairing data sets: intact shards get their names back, damaged ones are written anew with every record that is
whole anywhere in the folder, and nothing that may hold more is deleted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.misnamed import elsewhere, free_path, rename_back
from data_prep.output import SKIPPED
from data_prep.shard_rewriting import Rewriting, Spare, shared_by_whole
from data_prep.shard_tools import INDEXED, Problem, Terms, check_shard, whole_shards
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.manifest import (
    MANIFEST,
    SHARED,
    Entry,
    ShardError,
    read_entries,
    read_head,
    renumber,
    shared_head,
    write_manifest_file,
)
from molmo2_nemo.data.shard_writer import lock_file
from molmo2_nemo.files import atomic

REMOVED = "removed by repair"
LOCK = ".repairing"  # locked while a repair is at work
KEPT = "kept-by-repair"  # folder in the data set: the files that repair replaced, and the manifests before


def repair(folder: Path, config: DataConfig | None = None, said: list[str] | None = None) -> list[Problem]:
    """Rename shards back and rewrite damaged ones without the records that cannot be used; returns their problems.

    A new shard has a new name, the manifest is replaced atomically, and then the old shard goes to KEPT, with the old
    manifest; it is deleted only if all it held is in the new one. Whenever this is interrupted, the data set is the old
    or the new one, and another call finishes the repair; `check` names a tar that is then left over.

    Args:
        said: gets a line for each file renamed or written anew, and where the replaced files are.
    Raises:
        ShardError: no record would be left, shards of another tool were renamed, or another process repairs the folder.
    """
    with _alone(folder):
        return _repair(folder, config, [] if said is None else said)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raises ShardError while another repair of the folder is at work."""
    read_head(folder / MANIFEST)  # a folder without one is named as such
    path = folder / LOCK
    lock = lock_file(path)
    if lock is None:
        raise ShardError(f"{folder} is being repaired by another process ({path} is locked); wait for it to end")
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _repair(folder: Path, config: DataConfig | None, said: list[str]) -> list[Problem]:
    head, listed = read_head(folder / MANIFEST), list(read_entries(folder / MANIFEST))
    terms = Terms.of(head, config, repair=True)
    places = dict(zip((shard["name"] for shard in head["shards"]), listed, strict=True))
    tars = {number: folder / shard["name"] for number, shard in enumerate(head["shards"])}
    found = {s["name"]: check_shard(folder, s, places[s["name"]], False, terms, tars) for s in head["shards"]}
    off = whole_shards([problem for problems in found.values() for problem in problems])
    moves = elsewhere(folder, head["shards"], off)
    said += [f"{present} is the manifest's {name} (SHA-256): renamed back" for name, present in moves.items()]
    if moves and head.get(INDEXED):
        raise ShardError(f"{folder}: {_told(moves)}. Nothing was changed, as another tool wrote these tars")
    old = rename_back(folder, moves)
    for shard in head["shards"] if moves else ():
        if found[shard["name"]]:  # renamed, or with media in one that was
            found[shard["name"]] = check_shard(folder, shard, places[shard["name"]], False, terms, tars)
    spares = [Spare(path) for path in sorted(folder.glob("*.tar")) if path.name in off - set(moves) or path in old]
    spares += [Spare(path) for path in sorted(folder.glob("*.tar")) if path.name not in places and path not in old]
    bad = {name: problems for name, problems in found.items() if problems}
    there = [(tar.name, places[tar.name]) for tar in tars.values() if tar.is_file()]
    wanted = shared_by_whole(there, {(p.shard, p.key) for problems in found.values() for p in problems})
    again = {number for number, tar in tars.items() if tar.name in bad and not head.get(INDEXED)}
    rewriting = Rewriting(tars, again, terms, spares, wanted)
    lost = _replace(folder, head, places, bad, rewriting, old, said) if bad else []
    _put_aside(folder, old, said)
    return lost


def _told(moves: dict[str, str]) -> str:
    return ", ".join(f"rename {present} to {name}" for name, present in moves.items())


def _replace(
    folder: Path,
    head: dict[str, Any],
    places: dict[str, list[Entry]],
    bad: dict[str, list[Problem]],
    rewriting: Rewriting,
    old: list[Path],
    said: list[str],
) -> list[Problem]:
    """Write new shards and the manifest; `old` gets the files to put aside, `said` a line for each tar written anew.
    Returns the problems of records lost."""
    shards, kept, lost, numbers = [], [], [], []
    whole: list[Path] = []
    for number, shard in enumerate(head["shards"]):
        path, entries = folder / shard["name"], places[shard["name"]]
        state: dict[str, Any] | None = shard
        if shard["name"] in bad:
            borrowed: list[str] = []
            there = path.is_file()  # a new tar may get the name of one that is missing
            if head.get(INDEXED):  # its tars are somebody else's: records are left out of the manifest
                state, entries, problems = rewriting.without(number, shard, entries)
            else:
                state, entries, problems = rewriting.rewritten(number, entries, borrowed)
                said.append(_anew(bad[shard["name"]][0], state, len(places[shard["name"]])))
            if there and not head.get(INDEXED):
                all_here = not problems and not borrowed and path.stat().st_size == shard["bytes"]
                (whole if all_here else old).append(path)
            lost += problems
        if state is not None:
            shards.append(state)
            kept.append(entries)
            numbers.append(number)
        elif path.is_file() and head.get(INDEXED):
            head["unused"] = [*head.get("unused", ()), path.name]
    if not any(kept):
        raise ShardError(
            f"{folder}: none of its records can be used; nothing was changed. Prepare the data set again; if its "
            f"{MANIFEST} is another data set's, bring the right one"
        )
    if lost or old:
        (folder / KEPT).mkdir(exist_ok=True)
        shutil.copy2(folder / MANIFEST, free_path(folder / KEPT / MANIFEST))
    for number, entries in zip(numbers, kept, strict=True):
        if number not in rewriting.again:
            rewriting.followed(entries)
    renumber(kept, {number: new for new, number in enumerate(numbers)})
    _replace_manifest(folder, head, shards, kept, lost)
    for path in whole:
        path.unlink(missing_ok=True)
    return lost


def _anew(problem: Problem, state: dict[str, Any] | None, records: int) -> str:
    """What became of a tar with this problem, the first of it, and with so many records."""
    why = f"{problem.key}: {problem.text}" if problem.key else problem.text
    if state is None:
        return f"{problem.shard} is left out, none of its {records:,} records can be used: {why}"
    return f"{problem.shard} is written anew as {state['name']} with {state['records']:,} of {records:,} records: {why}"


def _put_aside(folder: Path, old: list[Path], said: list[str]) -> None:
    """Move files to KEPT."""
    for path in old:
        (folder / KEPT).mkdir(exist_ok=True)
        os.rename(path, free_path(folder / KEPT / path.name))
    if old:
        names = ", ".join(path.name for path in old)
        said.append(f"what was replaced is in {folder / KEPT}: {names} (delete it when you no longer want it)")


def _replace_manifest(
    folder: Path, head: dict[str, Any], shards: list[dict[str, Any]], kept: list[list[Entry]], lost: list[Problem]
) -> None:
    records = sum(shard["records"] for shard in shards)
    skipped = dict(head.get("skipped", {}))
    if lost:
        skipped[REMOVED] = skipped.get(REMOVED, 0) + len(lost)
    factor = head["length"] // max(head.get("records", head["length"]), 1)
    head = {name: value for name, value in head.items() if name != SHARED} | shared_head(kept)
    head |= {"shards": shards, "records": records, "length": records * max(factor, 1), "skipped": skipped}
    with atomic(folder / MANIFEST) as part:
        write_manifest_file(part, head, kept)
        with (folder / SKIPPED).open("a", encoding="utf-8") as file:
            for problem in lost:
                file.write(json.dumps(problem.line(REMOVED)) + "\n")
