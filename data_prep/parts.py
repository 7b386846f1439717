"""One data set over several machines: `molmo2 prepare --part 3/16` makes a part, `molmo2 shards join` the whole.

Samples are dealt out in chunks of the source's order, so that the parts of one command are disjoint and have all of it,
whichever machine runs when. A part is a data set of its own beside its siblings, NAME.part-03-of-16.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_prep.noticed import Notes
from data_prep.other_settings import change
from data_prep.output import EMPTY, SKIPPED
from data_prep.sources.base import Sample, Skip
from molmo2_nemo.data.manifest import (
    MANIFEST,
    SHARED,
    Entry,
    read_entries,
    read_head,
    renumber,
    write_manifest_file,
)
from molmo2_nemo.data.shard_writer import LOCK, lock_file, replace_folder, shard_stem
from molmo2_nemo.errors import UserError
from molmo2_nemo.files import atomic

CHUNK = 64  # samples dealt out together; more, while neighbours have the same media
MOST = 16 * CHUNK
FROM = ("fetched", "drawn_from")  # of a head's source: revisions of the Hub, sizes of other data sets
FOLDER = re.compile(r"(.+)\.part-(\d+)-of-(\d+)")
T = TypeVar("T", bound=Sample | Skip)


@dataclass(frozen=True)
class Part:
    """Part `number` (from 1) of `of`."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """The part that `--part` names.

        Raises:
            UserError: no such part.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--part {text}: expected K/N, the number of this part and that of all, from 1/N to N/N")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def folder(self, out: Path) -> Path:
        """Where this part of the data set `out` is made."""
        digits = len(str(self.of))
        return out.with_name(f"{out.name}.part-{self.number:0{digits}d}-of-{self.of:0{digits}d}")

    def select(self, items: Iterable[T]) -> Iterator[T]:
        """The items of this part, in their order."""
        for chunk, item in _dealt(items):
            if chunk % self.of == self.number - 1:
                yield item


def _dealt(items: Iterable[T]) -> Iterator[tuple[int, T]]:
    """Each item with the number of its chunk; what is skipped goes with its neighbours."""
    chunk = size = 0
    last: Any = None
    for item in items:
        media = (item.images, item.video) if isinstance(item, Sample) and (item.images or item.video) else None
        same = not isinstance(item, Sample) or (media is not None and media == last)
        if size >= CHUNK and (not same or size >= MOST):
            chunk, size = chunk + 1, 0
        last = media if isinstance(item, Sample) else last
        size += 1
        yield chunk, item


def remove_empty(folder: Path) -> None:
    """Remove a part without records: it is prepared again, as its media may have come."""
    if (folder / EMPTY).is_file():
        shutil.rmtree(folder)


# --- joining ---------------------------------------------------------------------------------------------------------


def joinable(folder: Path) -> list[Path]:
    """The data sets that have parts beside them: `folder`, or those in it.

    Raises:
        UserError: none has.
    """
    if _parts(folder):
        return [folder]
    inside = {match[1] for path in folder.glob("*.part-*-of-*") if (match := FOLDER.fullmatch(path.name)) is not None}
    if not inside:
        raise UserError(f"{folder} has no parts: neither {folder.name}.part-1-of-N beside it nor others in it")
    return [folder / name for name in sorted(inside)]


def join(out: Path) -> tuple[dict[str, Any], list[Path]]:
    """Make the data set `out` of all its parts, whose shards it shares with them (hard links).

    Returns:
        The manifest's head, and the folders of the parts, which may be removed.
    Raises:
        UserError: a part is missing, unfinished or prepared with other settings; `out` is something else already.
    """
    folders = _complete_parts(out)
    heads = [_head(folder) for folder in folders]
    settings = _same_settings(folders, heads)
    if not any(head["records"] for head in heads):
        raise UserError(f"none of the {len(folders)} parts of {out} has a record; their {SKIPPED} say why")
    if out.exists():
        return _joined_before(out, heads), folders
    work = out.with_name(f"{out.name}.joining")
    work.mkdir(exist_ok=True)
    lock = lock_file(work / LOCK)
    if lock is None:
        raise UserError(f"another molmo2 shards join is writing {work}; wait for it, or stop it")
    with lock:
        names = _link_shards(out, work, folders, heads)
        head = _whole(heads, settings, names)
        _join_texts(folders, work)
        with atomic(work / MANIFEST) as path:
            write_manifest_file(path, head, _entries(folders, heads))
        (work / LOCK).unlink()
        replace_folder(work, out)
    return head, folders


def _head(folder: Path) -> dict[str, Any]:
    if (folder / EMPTY).is_file():
        return dict(json.loads((folder / EMPTY).read_bytes()))
    return read_head(folder / MANIFEST)


def _parts(out: Path) -> dict[int, dict[int, Path]]:
    """Number of parts -> number of the part -> its folder, finished or not."""
    found: dict[int, dict[int, Path]] = {}
    for path in out.parent.glob(f"{out.name}.part-*-of-*"):
        match = FOLDER.fullmatch(path.name.removesuffix(".partial"))
        if path.is_dir() and match is not None and match[1] == out.name:
            known = found.setdefault(int(match[3]), {})
            if not path.name.endswith(".partial") or int(match[2]) not in known:
                known[int(match[2])] = path
    return found


def _complete_parts(out: Path) -> list[Path]:
    found = _parts(out)
    if not found:
        raise UserError(f"{out} has no parts beside it (such as {out.name}.part-1-of-4): molmo2 prepare --part 1/4")
    if len(found) > 1:
        counts = " and ".join(f"{sorted(known)} of {of}" for of, known in sorted(found.items()))
        raise UserError(f"{out} has parts of several divisions ({counts}): remove those that do not belong together")
    ((of, known),) = found.items()
    missing = [number for number in range(1, of + 1) if number not in known]
    open_ = [number for number, path in sorted(known.items()) if not _is_complete(path)]
    said = [f"{_numbers(missing)} missing"] * bool(missing) + [f"{_numbers(open_)} not finished"] * bool(open_)
    if said or any(number > of for number in known):
        raise UserError(
            f"{out}: of its {of} parts {' and '.join(said)}: run molmo2 prepare ... --part K/{of} for each of these"
        )
    return [known[number] for number in range(1, of + 1)]


def _is_complete(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() or (folder / EMPTY).is_file()


def _numbers(several: list[int]) -> str:
    shown = ", ".join(map(str, several[:20])) + (", ..." if len(several) > 20 else "")
    return f"{shown} {'is' if len(several) == 1 else 'are'}"


def _same_settings(folders: list[Path], heads: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings that all parts have.

    Raises:
        UserError: they differ, or are no parts.
    """
    made: list[dict[str, Any]] = []
    for number, (folder, head) in enumerate(zip(folders, heads, strict=True), 1):
        settings = dict(head.get("settings") or {})
        if settings.pop("part", None) != f"{number}/{len(folders)}":
            raise UserError(f"{folder} was not prepared with --part {number}/{len(folders)}")
        settings |= {name: head.get("source", {}).get(name, {}) for name in FROM}
        if made and settings != made[0]:
            names = sorted(n for n in {*settings, *made[0]} if settings.get(n) != made[0].get(n))
            places = ("in part 1", f"in part {number}")
            changes = "; ".join(change(n, made[0].get(n), settings.get(n), places) for n in names)
            raise UserError(f"{folder} was prepared with other settings than part 1 ({changes}): prepare it again")
        made.append(settings)
    return {name: value for name, value in made[0].items() if name not in FROM}


def _joined_before(out: Path, heads: list[dict[str, Any]]) -> dict[str, Any]:
    """The head of a data set that these parts were joined to."""
    if not (out / MANIFEST).is_file():
        raise UserError(f"{out} exists and is not a molmo2 data set; move it away")
    head = read_head(out / MANIFEST)
    if [s["sha256"] for s in head["shards"]] != [s["sha256"] for part in heads for s in part["shards"]]:
        raise UserError(f"{out} exists and is not made of these parts; move it away, or remove it, and join again")
    return head


def _link_shards(out: Path, work: Path, folders: list[Path], heads: list[dict[str, Any]]) -> list[str]:
    """Give every shard its name in the whole: by a hard link, or, where there are none, by moving it. Can be repeated.

    Raises:
        UserError: a shard is missing.
    """
    names: list[str] = []
    for folder, head in zip(folders, heads, strict=True):
        for shard in head["shards"]:
            name = f"{shard_stem(out.name)}-{len(names):06d}.tar"
            names.append(name)
            old, new = folder / shard["name"], work / name
            if new.exists() and new.stat().st_size == shard["bytes"] and not (old.exists() and not old.samefile(new)):
                continue
            if not old.is_file() or old.stat().st_size != shard["bytes"]:
                raise UserError(f"{old} is missing or has another size than its manifest says: prepare that part again")
            new.unlink(missing_ok=True)
            try:
                os.link(old, new)
            except OSError:  # a file system without hard links
                os.rename(old, new)
    return names


def _whole(heads: list[dict[str, Any]], settings: dict[str, Any], names: list[str]) -> dict[str, Any]:
    notes, skipped = Notes(), Counter[str]()
    for head in heads:
        notes.update({text: (count, first) for text, (count, first) in head.get("notes", {}).items()})
        skipped.update(head.get("skipped", {}))
    shards = [shard for head in heads for shard in head["shards"]]
    made = {
        **next(head for head in heads if head["records"]),
        "settings": settings,
        "records": sum(head["records"] for head in heads),
        "length": sum(head["length"] for head in heads),
        "skipped": dict(sorted(skipped.items())),
        "notes": notes.json(),
        "shards": [{**shard, "name": name} for shard, name in zip(shards, names, strict=True)],
        "parts": len(heads),
    }
    made.pop(SHARED, None)
    shared = [head[SHARED] for head in heads if SHARED in head]
    if shared:
        made[SHARED] = {name: sum(one[name] for one in shared) for name in shared[0]}
    return made


def _entries(folders: list[Path], heads: list[dict[str, Any]]) -> Iterator[list[Entry]]:
    """The entries of all shards; the tars of shared media get their numbers in the whole."""
    first = 0
    for folder, head in zip(folders, heads, strict=True):
        if not head["shards"]:
            continue
        numbers = {number: first + number for number in range(len(head["shards"]))}
        for entries in read_entries(folder / MANIFEST):
            renumber([entries], numbers)
            yield entries
        first += len(numbers)


def _join_texts(folders: list[Path], work: Path) -> None:
    """The lists of what was skipped or missing, one after the other."""
    names = {path.name for folder in folders for path in folder.iterdir() if path.name.endswith((".jsonl", ".txt"))}
    for name in sorted(names | {SKIPPED}):
        there = [folder / name for folder in folders if (folder / name).is_file()]
        if not there:
            continue
        with atomic(work / name) as path, path.open("wb") as file:
            for one in there:
                with one.open("rb") as source:
                    shutil.copyfileobj(source, file)
