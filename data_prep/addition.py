"""Adding to a complete data set: new shards are made beside it, then it is replaced, the manifest last.

What is added is written to `<name>.adding`, resumable like a new data set. When all of it is there, a plan of the last
steps is written down; a call that finds the plan of one that was killed carries it out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.download import FAILED
from data_prep.ledger import Line
from data_prep.look import Look
from data_prep.media_kinds import NOT_FOUND
from data_prep.output import SETTINGS, SIDE_FILES, SKIPPED, Output, OwnContent
from data_prep.record_builder import Built, member_key
from data_prep.shard_repair import REMOVED
from data_prep.sources.base import Skip
from data_prep.taking_out import Remains
from molmo2_nemo.data.manifest import (
    MANIFEST,
    SHARED,
    Entry,
    file_sha256,
    read_head,
    renumber,
    shared_head,
    write_manifest_file,
)
from molmo2_nemo.data.shard_writer import LOCK, lock_file
from molmo2_nemo.errors import UserError
from molmo2_nemo.files import write_text

PLAN = "plan.json"
TEMPORARY = frozenset({NOT_FOUND, FAILED})  # a record whose new media are not had stays as it was
# Media that cannot be read now, of a record that had readable ones: it stays, as where they are gone
UNREADABLE = frozenset(
    {"image cannot be decoded", "video cannot be decoded", "video cannot be re-encoded", "subtitles cannot be read"}
)
# Items that became records: skipped ones, new ones, records prepared anew; records that are skipped from then on; and
# records that `molmo2 shards repair` had taken out; records that stay, as their new media cannot be read.
COUNTS = ("mended", "added", "replaced", "lost", "restored", "unread")


@dataclass(frozen=True, slots=True)
class Kept:
    """An item that stays what it is: a record or skipped."""

    key: str
    line: Line


class Addition(Output):
    """Like `Output`, for a data set that is complete: `add` takes what is prepared now, `keep` what stays as it is.

    Records that are prepared anew are taken out of their shards, which are written anew without them, and stand in the
    new shards, in the source's order. All other shards keep their bytes.
    """

    def __init__(
        self,
        out: Path,
        settings: dict[str, Any],
        look: Look,
        *,
        tool: str = "",
        bytes_per_shard: int = 10**9,
        records_per_shard: int = 10_000,
        own: OwnContent | None = None,
        repeat_media: bool = False,
    ):
        self.head = read_head(out / MANIFEST)
        self.base = file_sha256(out / MANIFEST)
        self.due = hashlib.sha256(look.due.tobytes()).hexdigest()
        self.anew: set[str] = set()  # member keys of records that are taken out of their shards
        self.counts = dict.fromkeys(COUNTS, 0)
        self._stay: list[str] = []  # keys of records whose new media could not be had
        self.removed = removed_by_repair(out)
        self.first_shard = 1 + max((_number(shard["name"]) for shard in self.head["shards"]), default=-1)
        self._listed_before = _Listed(out / SKIPPED)
        super().__init__(
            out,
            settings,
            tool=tool,
            bytes_per_shard=bytes_per_shard,
            records_per_shard=records_per_shard,
            own=own,
            repeat_media=repeat_media,
        )
        self.done = None

    @staticmethod
    def work_of(out: Path) -> Path:
        return out.with_name(f"{out.name}.adding")

    def _complete(self, overwrite: bool) -> bool:
        return False

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "adds_to": self.base, "due": self.due}

    def _keeps(self, before: dict[str, Any]) -> bool:
        return False  # what was begun under other conditions is begun anew; the data set itself is complete

    def _has_grown(self, before: Any, folder: Path) -> bool:
        return False

    # --- items ------------------------------------------------------------------------------------------------------

    def passed(self, key: str, before: Line | None, due: bool) -> None:
        """Pass an item that an earlier call of this addition has processed, as `seen`."""
        if before is not None and before.reason:
            self._listed_before.take(key)
        elif before is not None and due and key not in self._stay:
            self.anew.add(member_key(key))
        self.seen(key)

    def keep(self, kept: Kept) -> None:
        """Pass the next item, which stays what it is."""
        self._follow(kept.key)
        if kept.line.reason:
            self._skips.write(self._listed_before.take(kept.key) or _thin(kept))
            self.skipped[kept.line.reason] += 1
        else:
            self.notes.add(kept.line.notes, member_key(kept.key))
        if self._ledger is not None:
            self._ledger.add(kept.line)

    def take(self, key: str, item: Built | Skip, mark: str, before: Line | None) -> None:
        """Write an item that was prepared now.

        Args:
            before: what it was; None: it is new.
        """
        record = before is not None and not before.reason
        if before is not None and record and isinstance(item, Skip) and item.reason in TEMPORARY | UNREADABLE:
            self._stay.append(key)
            self.counts["unread"] += item.reason in UNREADABLE
            self.keep(Kept(key, before))
            return
        if before is not None and not record:
            self._listed_before.take(key)
        self.add(key, item, mark)  # may close a shard, whose journal counts what stands before this item
        if record:
            self.anew.add(member_key(key))
            back = "restored" if member_key(key) in self.removed else "replaced"
            self.counts[back if isinstance(item, Built) else "lost"] += 1
        elif isinstance(item, Built):
            self.counts["added" if before is None else "mended"] += 1

    def _counts(self) -> dict[str, Any]:
        return {"counts": self.counts, "stay": self._stay}

    def _take_counts(self, journal: dict[str, Any]) -> None:
        self.counts, self._stay = journal["counts"], journal["stay"]

    # --- the end ----------------------------------------------------------------------------------------------------

    def finish(self, head: dict[str, Any], counts_as: int = 1) -> dict[str, Any]:
        """Replace the data set by the one with the additions; returns the manifest's head.

        Raises:
            UserError: the disk is full, a shard that must be written anew is damaged, or no record would be left.
        """
        try:
            if self._shard is not None:
                self._close_shard()
            for line in self._listed_before.rest():
                if json.loads(line).get("key") in self.anew:
                    continue  # a record that repair had taken out stands in the new shards
                self._skips.write(line)
                self.skipped[str(json.loads(line)["reason"])] += 1
            remains = Remains(self.out, self.work, self.anew)
            shards = [*remains.shards, *self._shards]
            records = sum(shard["records"] for shard in shards)
            if not records:
                raise UserError(
                    f"{self.out}: the changed media give no record that can be used, and none would be left; nothing "
                    "was changed"
                )
            self._side_files()
            described = self._described({**self.head, **head}, records, counts_as, shards)
            described.pop(SHARED, None)
            described |= shared_head(self._all_entries(remains))
            write_manifest_file(self.work / MANIFEST, described, self._all_entries(remains))
            _sync(self.work / MANIFEST)
            plan = {"base": self.base, "made": file_sha256(self.work / MANIFEST), "old": remains.old}
            plan["files"] = sorted(path.name for path in self.work.glob("*.tar"))
            write_text(self.work / PLAN, json.dumps(plan), sync=True)
            carry_out(self.out, self.work)
            return described
        except OSError as error:
            raise self.full(error) from None

    def _all_entries(self, remains: Remains) -> Iterator[list[Entry]]:
        """The records of all shards; the new ones share media among themselves."""
        yield from remains.entries()
        first = len(remains.shards)
        for entries in self._entries():
            renumber([entries], {number: first + number for number in range(len(self._shards))})
            yield entries


def carry_out(out: Path, work: Path) -> None:
    """Put what an addition has made in its place, as its plan says; nothing happens without a plan.

    Whenever this is interrupted, the data set is the old or the new one. Another call goes on with it; of a data set
    that was replaced meanwhile, the addition is dropped.
    """
    path = work / PLAN
    if not path.is_file():
        return
    plan = json.loads(path.read_bytes())
    now = file_sha256(out / MANIFEST) if (out / MANIFEST).is_file() else ""
    if now in (plan["base"], plan["made"]):
        for name in plan["files"]:
            _move(work / name, out / name)
        for name in SIDE_FILES if now == plan["base"] else ():
            if (work / name).exists():
                shutil.copy2(work / name, work / f"{name}.copy")
                os.replace(work / f"{name}.copy", out / name)
            else:
                (out / name).unlink(missing_ok=True)
        _move(work / MANIFEST, out / MANIFEST)
        for name in plan["old"]:
            (out / name).unlink(missing_ok=True)
    for other in sorted(work.iterdir(), key=lambda other: other == path):  # the plan last
        other.unlink()
    work.rmdir()


def finish_plan(out: Path) -> None:
    """Carry out the plan of an addition that was killed; remove one to a data set that was replaced meanwhile."""
    work = Addition.work_of(out)
    if not work.is_dir() or (lock := lock_file(work / LOCK)) is None:
        return
    with lock:
        if (work / PLAN).is_file():
            carry_out(out, work)
        elif [path.name for path in work.iterdir()] == [LOCK] or _is_stale(out, work):
            shutil.rmtree(work)


def _is_stale(out: Path, work: Path) -> bool:
    try:
        base = json.loads((work / SETTINGS).read_bytes())["adds_to"]
    except (OSError, ValueError, KeyError):  # `Output` says what is wrong with it
        return False
    return not (out / MANIFEST).is_file() or bool(file_sha256(out / MANIFEST) != base)


def _move(source: Path, target: Path) -> None:
    if source.exists():
        os.replace(source, target)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _number(name: str) -> int:
    """The number of a shard's file name; -1 where it has none."""
    found = re.search(r"-(\d{6,})(-r\d+)?\.tar$", name)
    return int(found[1]) if found else -1


class _Listed:
    """The lines of a skipped.jsonl, taken in their order."""

    def __init__(self, path: Path):
        self._lines = _lines(path)
        self._next = next(self._lines, b"")

    def take(self, key: str) -> bytes:
        """The next line if it is about this item, else b""."""
        line = self._next
        if not line or json.loads(line).get("key") != key:
            return b""
        self._next = next(self._lines, b"")
        return line

    def rest(self) -> Iterator[bytes]:
        """What no item was found for: records that `molmo2 shards repair` took out."""
        if self._next:
            yield self._next
        yield from self._lines


def _lines(path: Path) -> Iterator[bytes]:
    if path.is_file():
        with path.open("rb") as file:
            yield from file


def removed_by_repair(out: Path) -> set[str]:
    """Member keys of the records that `molmo2 shards repair` took out of a data set."""
    if REMOVED not in read_head(out / MANIFEST).get("skipped", {}):
        return set()
    lines = map(json.loads, _lines(out / SKIPPED))
    return {str(line["key"]) for line in lines if line.get("reason") == REMOVED}


def _thin(kept: Kept) -> bytes:
    """The line of an item that is listed no longer."""
    return json.dumps(Skip(kept.key, kept.line.reason).line()).encode() + b"\n"
