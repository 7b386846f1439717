"""Repairing data sets: intact shards get their names back, damaged ones are written anew with every record that is
whole anywhere in the folder, and nothing that may hold more is deleted."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.misnamed import elsewhere, free_path, rename_back
from data_prep.output import SKIPPED
from data_prep.shard_tools import INDEXED, Problem, Terms, check_shard, judged, record_problem, whole_shards
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.manifest import (
    MANIFEST,
    Entry,
    Member,
    ShardError,
    read_entries,
    read_head,
    write_manifest_file,
)
from molmo2_nemo.data.shard_writer import TarShard, file_state, lock_file, read_records
from molmo2_nemo.data.tar_index import index_tar
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
        said: gets a line for each file renamed, and where the replaced files are.
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
    found = {s["name"]: check_shard(folder, s, places[s["name"]], False, terms) for s in head["shards"]}
    off = whole_shards([problem for problems in found.values() for problem in problems])
    moves = elsewhere(folder, head["shards"], off)
    said += [f"{present} is the manifest's {name} (SHA-256): renamed back" for name, present in moves.items()]
    if moves and head.get(INDEXED):
        raise ShardError(f"{folder}: {_told(moves)}. Nothing was changed, as another tool wrote these tars")
    old = rename_back(folder, moves)
    for shard in head["shards"]:
        if shard["name"] in moves:
            found[shard["name"]] = check_shard(folder, shard, places[shard["name"]], False, terms)
    spares = [Spare(path) for path in sorted(folder.glob("*.tar")) if path.name in off - set(moves) or path in old]
    spares += [Spare(path) for path in sorted(folder.glob("*.tar")) if path.name not in places and path not in old]
    bad = {name for name, problems in found.items() if problems}
    lost = _replace(folder, head, places, bad, terms, spares, old) if bad else []
    _put_aside(folder, old, said)
    return lost


def _told(moves: dict[str, str]) -> str:
    return ", ".join(f"rename {present} to {name}" for name, present in moves.items())


class Spare:
    """A tar in which records of a damaged shard may be whole: a damaged shard, or one that no manifest lists."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def places(self) -> dict[str, list[Member]]:
        """Where its records lie; nothing if the tar is damaged."""
        try:
            return dict(index_tar(self.path, {}))
        except ShardError:
            return {}

    def versions(self, entry: Entry) -> Iterator[dict[str, bytes]]:
        """What the record may be here: the bytes where the manifest has it, and the record of that key."""
        for members in (entry.members, self.places.get(entry.key)):
            if members and {m.suffix for m in members} == {m.suffix for m in entry.members}:
                for _, content in read_records(self.path, [Entry(entry.key, members)]):
                    yield content


def _saved(shard: str, entry: Entry, terms: Terms, spares: list[Spare]) -> dict[str, bytes] | None:
    """The members of a record as they were written (CRC-32), from another tar; None if they are nowhere."""
    for spare in spares if entry.crc is not None else ():
        for content in spare.versions(entry):
            if record_problem(shard, entry, content, terms) is None:
                return content
    return None


def _replace(
    folder: Path,
    head: dict[str, Any],
    places: dict[str, list[Entry]],
    bad: set[str],
    terms: Terms,
    spares: list[Spare],
    old: list[Path],
) -> list[Problem]:
    """Write new shards and the manifest; `old` gets the files to put aside. Returns the problems of records lost."""
    shards, kept, lost = [], [], []
    whole: list[Path] = []
    for shard in head["shards"]:
        path, entries = folder / shard["name"], places[shard["name"]]
        if shard["name"] not in bad:
            shards.append(shard)
            kept.append(entries)
            continue
        if head.get(INDEXED):  # its tars are somebody else's: records are left out of the manifest
            state, good, problems = _without(path, shard, entries, terms)
        else:
            borrowed: list[str] = []
            state, good, problems = _rewritten(path, entries, terms, spares, borrowed)
            if path.is_file():
                all_here = not problems and not borrowed and path.stat().st_size == shard["bytes"]
                (whole if all_here else old).append(path)
        lost += problems
        if state is not None:
            shards.append(state)
            kept.append(good)
        elif path.is_file() and head.get(INDEXED):
            head["unused"] = [*head.get("unused", ()), path.name]
    if not shards:
        raise ShardError(
            f"{folder}: none of its records can be used; nothing was changed. Prepare the data set again; if its "
            f"{MANIFEST} is another data set's, bring the right one"
        )
    if lost or old:
        (folder / KEPT).mkdir(exist_ok=True)
        shutil.copy2(folder / MANIFEST, free_path(folder / KEPT / MANIFEST))
    _replace_manifest(folder, head, shards, kept, lost)
    for path in whole:
        path.unlink(missing_ok=True)
    return lost


def _put_aside(folder: Path, old: list[Path], said: list[str]) -> None:
    """Move files to KEPT."""
    for path in old:
        (folder / KEPT).mkdir(exist_ok=True)
        os.rename(path, free_path(folder / KEPT / path.name))
    if old:
        names = ", ".join(path.name for path in old)
        said.append(f"what was replaced is in {folder / KEPT}: {names} (delete it when you no longer want it)")


Repaired = tuple[dict[str, Any] | None, list[Entry], list[Problem]]  # shard for the head, good, problems of the others


def _without(path: Path, shard: dict[str, Any], entries: list[Entry], terms: Terms) -> Repaired:
    """The same tar, listed without the records that training cannot read or use."""
    if not path.is_file():
        return None, [], [Problem(path.name, entry.key, "its shard is missing") for entry in entries]
    found = [(entry, problem) for entry, problem, _ in judged(path, entries, terms, headers=True)]
    good, bad = [e for e, problem in found if problem is None], [p for _, p in found if p is not None]
    state = {**shard, **file_state(path), "records": len(good), "left_out": shard.get("left_out", 0) + len(bad)}
    return (state if good else None), good, bad


def _read(path: Path, entries: list[Entry], terms: Terms) -> Iterator[tuple[Entry, Problem | None, dict[str, bytes]]]:
    if path.is_file():
        yield from judged(path, entries, terms)
    else:
        yield from ((entry, Problem(path.name, entry.key, "its shard is missing"), {}) for entry in entries)


def _rewritten(path: Path, entries: list[Entry], terms: Terms, spares: list[Spare], borrowed: list[str]) -> Repaired:
    """A new tar of the records that can be used; `borrowed` gets the keys of those that come from another tar."""
    number, stem = 1, re.sub(r"-r\d+$", "", path.stem)
    while (target := path.with_name(f"{stem}-r{number}.tar")).exists():
        number += 1
    new, bad = TarShard(target), []
    others = [spare for spare in spares if spare.path != path]
    try:
        for entry, problem, content in _read(path, entries, terms):
            whole = content if problem is None else _saved(path.name, entry, terms, others)
            if whole is not None:
                new.add(entry.key, whole).take(entry)
                borrowed += [entry.key] if problem is not None else []
            elif problem is not None:
                bad.append(problem)
    except BaseException:
        new.discard()
        raise
    if new.entries:
        return new.close(), new.entries, bad
    new.discard()
    return None, [], bad


def _replace_manifest(
    folder: Path, head: dict[str, Any], shards: list[dict[str, Any]], kept: list[list[Entry]], lost: list[Problem]
) -> None:
    records = sum(shard["records"] for shard in shards)
    skipped = dict(head.get("skipped", {}))
    if lost:
        skipped[REMOVED] = skipped.get(REMOVED, 0) + len(lost)
    factor = head["length"] // max(head.get("records", head["length"]), 1)
    head = {**head, "shards": shards, "records": records, "length": records * max(factor, 1), "skipped": skipped}
    with atomic(folder / MANIFEST) as part:
        write_manifest_file(part, head, kept)
        with (folder / SKIPPED).open("a", encoding="utf-8") as file:
            for problem in lost:
                file.write(json.dumps(problem.line(REMOVED)) + "\n")
