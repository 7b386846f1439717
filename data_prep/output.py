"""Writing the shards of one data set: resumable, and either complete or absent.

The shards are written to `<name>.partial` beside the data set. A shard gets its final name when it is complete and on
disk; then its journal is written, which records how many items of the source have been processed so far. A run that was
killed resumes after the last journal. At the end the journals become the manifest, and the folder is renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, Self

from data_prep.ledger import LEDGER, MISSING, MISSING_URLS, Line, Writer, write_missing
from data_prep.media import Resolver
from data_prep.noticed import Notes
from data_prep.other_settings import change, changed_file, file_notes
from data_prep.record_builder import Built
from data_prep.sources.base import Skip
from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.manifest import MANIFEST, Entry, Member, read_head, write_manifest_file
from molmo2_nemo.data.media_once import MEDIA, MediaOnce, with_owners
from molmo2_nemo.data.shard_writer import (
    LOCK,
    TarShard,
    check_replaceable,
    clean_leftovers,
    lock_file,
    record_bytes,
    replace_folder,
    shard_stem,
)
from molmo2_nemo.errors import UserError
from molmo2_nemo.files import write_text

SETTINGS = "settings.json"
SKIPPED = "skipped.jsonl"
EMPTY = "empty.json"  # the head of a part without records
SIDE_FILES = (SKIPPED, LEDGER, MISSING, MISSING_URLS)
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class OwnContent(Protocol):
    """What is known of a user's own file."""

    def compare(self, ledger: Path) -> tuple[bool, str]:
        """(whether its first rows are those of a ledger, unchanged; in words, how they differ, "" if unknown)."""

    def bytes(self, resolver: Resolver) -> tuple[float, str]:
        """(bytes that it will take, about; in words, what that is from)."""


class NoItems(UserError):
    """The source had nothing for this data set."""


class Output:
    """Writes records in the order given. Use it as a context manager: leaving it early keeps the complete shards.

    Args:
        out: folder of the data set.
        settings: JSON values that determine the output; output made with other settings is refused.
        tool: name and version; a partial data set of another tool is refused.
        own: what is known of a user's own file.
        repeat_media: write a medium into every record that shows it.
    Raises:
        UserError: `out` or its partial folder has other settings (without `overwrite`), or another process is writing
            it.
    """

    first_shard = 0  # number of the first one written here

    def __init__(
        self,
        out: Path,
        settings: dict[str, Any],
        *,
        tool: str = "",
        bytes_per_shard: int = 10**9,
        records_per_shard: int = 10_000,
        overwrite: bool = False,
        own: OwnContent | None = None,
        repeat_media: bool = False,
    ):
        self.out, self.work = out, self.work_of(out)
        self.settings, self.tool = json.loads(json.dumps(settings)), tool
        self.bytes_per_shard, self.records_per_shard = bytes_per_shard, records_per_shard
        self.items = 0  # items of the source processed so far
        self.records = 0
        self.bytes = 0
        self.skipped: Counter[str] = Counter()
        self.notes = Notes()
        self.own = own
        self.grown = False  # the user's own file has got more lines since `done` was prepared
        self.done: dict[str, Any] | None = None  # the head of a complete data set with the same settings
        self.repeat_media = repeat_media
        self._once: MediaOnce | None = None
        self._chain = hashlib.blake2b(digest_size=16)
        self._resumed: tuple[int, str] | None = None  # items, and the hash of their keys
        self._shard: TarShard | None = None
        self._shards: list[dict[str, Any]] = []
        self._lock: Any = None
        self._skips: Any = None
        self._ledger: Writer | None = None
        self.hint = ""  # what to do where no record comes out
        self._first = ""  # of what this run skipped, in words
        clean_leftovers(out)
        if self._complete(overwrite):
            return
        self._open(overwrite)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._shard is not None:
            self._shard.discard()
            self._shard = None
        for file in (self._skips, self._ledger, self._once):
            if file is not None:
                file.close()
        if self._lock is not None:
            if self.work.is_dir() and not self._shards and not self._listed():  # nothing to keep
                shutil.rmtree(self.work)
            self._lock.close()

    @staticmethod
    def work_of(out: Path) -> Path:
        """The folder in which a data set is made."""
        return out.with_name(f"{out.name}.partial")

    def _listed(self) -> bool:
        """Whether samples that could not be used are listed."""
        path = self.work / SKIPPED
        return path.is_file() and path.stat().st_size > 0

    @property
    def resume_at(self) -> int:
        """Number of items of the source that an earlier run has processed; pass each of their keys to `seen`."""
        return self._resumed[0] if self._resumed else 0

    def seen(self, key: str) -> None:
        """Pass an item that an earlier run has processed.

        Raises:
            UserError: at the last such item, if these are not the items of the earlier run.
        """
        assert self._resumed is not None
        self._follow(key)
        if self.items == self._resumed[0] and self._chain.hexdigest() != self._resumed[1]:
            raise UserError(
                f"{self.work} was begun with different rows (the source's files have changed); resume with the old "
                "files, or start over with --overwrite"
            )

    def give_up(self) -> list[Path]:
        """Keep the lists of what could not be used, although no shard is complete; returns their paths."""
        self._skips.flush()
        return [self.work / SKIPPED, *self._write_missing(lambda name: self.work / name)]

    def _write_missing(self, target: Callable[[str], Path]) -> list[Path]:
        """Write the lists of media that are missing; returns their paths."""
        if self._ledger is None:
            return []
        self._ledger.cut()
        return write_missing(self.work / LEDGER, target)

    def add(self, key: str, item: Built | Skip, mark: str = "") -> None:
        """Write the next item of the source; `key` is the source's own key for it, `mark` that of the ledger.

        Raises:
            UserError: the disk is full.
        """
        try:
            if isinstance(item, Built):
                self._write(item)
            self._follow(key)
            if isinstance(item, Skip):
                self._skip(item)
            if self._ledger is not None:
                reason, notes = (item.reason, ()) if isinstance(item, Skip) else ("", item.notes)
                self._ledger.add(Line(mark, reason, item.media, tuple(notes)))
        except OSError as error:
            raise self.full(error) from None

    def finish(self, head: dict[str, Any], counts_as: int = 1) -> dict[str, Any]:
        """Write the manifest and give the folder its final name; returns the manifest's head.

        Raises:
            UserError: the disk is full, or no record was written.
        """
        try:
            if self._shard is not None:
                self._close_shard()
            if not self.records:
                return self._empty_part(head) if "part" in self.settings else self._nothing()
            self._side_files()
            complete = self._described(head, self.records, counts_as, self._shards)
            write_manifest_file(self.work / MANIFEST, complete, self._entries())
            for journal in self.work.glob("*.journal.json"):
                journal.unlink()
            (self.work / SETTINGS).unlink()
            (self.work / MEDIA).unlink(missing_ok=True)
            (self.work / LOCK).unlink()
            replace_folder(self.work, self.out)
            return complete
        except OSError as error:
            raise self.full(error) from None

    def _side_files(self) -> None:
        """Finish the files beside the shards."""
        self._skips.close()
        if not self._listed():
            (self.work / SKIPPED).unlink()
        self._write_missing(lambda name: self.work / name)
        if self._ledger is not None:
            self._ledger.close()

    def _described(
        self, head: dict[str, Any], records: int, counts_as: int, shards: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """The manifest's head."""
        return {
            **head,
            "settings": self.settings,
            "tool": self.tool,
            "records": records,
            "length": records * counts_as,
            "skipped": dict(sorted(self.skipped.items())),
            "notes": self.notes.json(),
            **(self._once.head() if self._once is not None else {}),
            "shards": shards,
        }

    # --- beginning --------------------------------------------------------------------------------------------------

    def _complete(self, overwrite: bool) -> bool:
        if not self.out.exists() or overwrite:
            if self.out.exists():
                check_replaceable(self.out)
            return False
        if not (self.out / MANIFEST).is_file() and any(self.out.iterdir()):
            raise UserError(f"{self.out} exists and is not a molmo2 data set (no {MANIFEST}); choose another --out")
        if not (self.out / MANIFEST).is_file():
            self.out.rmdir()
            return False
        head = read_head(self.out / MANIFEST)
        if head.get("settings") != self.settings:
            self.grown = self._has_grown(head.get("settings"), self.out)
            if not self.grown:
                self._refuse(self.out, head.get("settings"))
        self.done = head
        return True

    def _has_grown(self, before: Any, folder: Path) -> bool:
        """Whether the other settings of a folder are those of the same file with fewer rows."""
        if self.own is None or not isinstance(before, dict):
            return False
        then, now = before.get("origin"), self.settings.get("origin")
        if {**before, "origin": None} != {**self.settings, "origin": None} or not changed_file(then, now):
            return False
        columns = (file_notes(origin)[1].partition(";")[2] for origin in (then, now))
        return len(set(columns)) == 1 and self.own.compare(folder / LEDGER)[0]

    def _open(self, overwrite: bool) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(exist_ok=True)
        self._lock = lock_file(self.work / LOCK)
        if self._lock is None:
            raise UserError(f"another molmo2 prepare is writing {self.work}; wait for it, or stop it")
        before = self._before()
        now = self._identity()
        if before is not None and before != now:
            if before.get("tool") == self.tool and self._has_grown(before.get("settings"), self.work):
                write_text(self.work / SETTINGS, json.dumps(now), sync=True)
            elif overwrite or not self._keeps(before):
                before = None
        if before is None:
            for path in self.work.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_text(self.work / SETTINGS, json.dumps(now), sync=True)
        self._skips = (self.work / SKIPPED).open("ab")
        self._resume()

    def _identity(self) -> dict[str, Any]:
        """What a partial data set is known by."""
        return {"settings": self.settings, "tool": self.tool}

    def _keeps(self, before: dict[str, Any]) -> bool:
        """Whether shards that were made with other settings are kept.

        Raises:
            UserError: they are.
        """
        if self._journal(0).exists():
            self._refuse(self.work, before.get("settings"), before.get("tool"))
        return False

    def _before(self) -> dict[str, Any] | None:
        """The settings file of a partial data set; None when there is none."""
        path = self.work / SETTINGS
        half = re.compile(rf"\.{re.escape(SETTINGS)}\.[0-9a-f]+\.part")  # of a call that was killed at once
        others = [p.name for p in self.work.iterdir() if p.name not in (LOCK, SETTINGS) and not half.fullmatch(p.name)]
        if not path.is_file():
            if others:
                raise UserError(f"{self.work} is not from molmo2 prepare (it holds {others[0]}); remove or rename it")
            return None
        try:
            return dict(json.loads(path.read_text()))
        except ValueError:
            raise UserError(f"{path} is damaged; remove {self.work} and run the command again") from None

    def _refuse(self, where: Path, before: Any, tool: str | None = None) -> None:
        if not isinstance(before, dict):
            raise UserError(f"{where} was not written by molmo2 prepare; choose another --out, or add --overwrite")
        names = sorted(n for n in {*before, *self.settings} if before.get(n) != self.settings.get(n))
        changes = [change(n, before.get(n), self.settings.get(n)) for n in names]
        table = changed_file(before.get("origin"), self.settings.get("origin")) if names == ["origin"] else ""
        if table:
            first = self.own.compare(where / LEDGER)[1] if self.own is not None else ""
            raise UserError(
                f"{table} has changed since {where} was prepared from it{first}; replace it with --overwrite, or, "
                "if it is another file, name it apart: --name NAME"
            )
        if not changes:
            changes = [f"tool: {tool} there, {self.tool} now"]
        raise UserError(
            f"{where} was prepared with other settings ({'; '.join(changes)}). Use the same settings, choose another "
            "--out, or replace it with --overwrite"
        )

    def _resume(self) -> None:
        """Keep the complete shards of an earlier run, and remove everything else."""
        skips, ledger, media = 0, 0, [0, 0, 0]
        while True:
            path = self._journal(len(self._shards))
            try:
                journal = json.loads(path.read_bytes())
            except (OSError, ValueError):
                break
            shard = journal["shard"]
            tar = self.work / shard["name"]
            if not tar.is_file() or tar.stat().st_size != shard["bytes"]:
                break
            self._shards.append(shard)
            self.records += shard["records"]
            self.bytes += shard["bytes"]
            self.skipped = Counter(journal["skipped"])
            self.notes = Notes({text: (int(count), key) for text, (count, key) in journal.get("notes", {}).items()})
            self._resumed = (journal["items"], journal["chain"])
            self._take_counts(journal)
            skips, ledger, media = journal["skips"], journal.get("ledger"), journal.get("media")
        kept = {s["name"] for s in self._shards} | {self._journal(i).name for i in range(len(self._shards))}
        for path in self.work.iterdir():
            if path.name not in kept | {LOCK, SETTINGS, SKIPPED, LEDGER, MEDIA}:
                path.unlink()
        self._skips.truncate(skips)
        self._skips.seek(skips)
        if ledger is None:  # begun by a version that kept none
            (self.work / LEDGER).unlink(missing_ok=True)
        else:
            self._ledger = Writer(self.work / LEDGER, ledger)
        if not self.repeat_media:
            self._once = MediaOnce(self.work, [shard["name"] for shard in self._shards], media)

    # --- resuming ----------------------------------------------------------------------------------------------------

    def _follow(self, key: str) -> None:
        self.items += 1
        content = key.encode("utf-8", "surrogatepass")
        self._chain.update(len(content).to_bytes(4, "little") + content)

    def _write(self, built: Built) -> None:
        content = {name: c.read_bytes() if isinstance(c, Path) else c for name, c in built.members.items()}
        shared = self._shared(content)
        own = {name: data for name, data in content.items() if name not in shared}
        size = record_bytes(*map(len, own.values()))
        shard = self._shard
        if shard is not None and shard.entries:
            full = shard.size + size > self.bytes_per_shard
            if full or len(shard.entries) >= self.records_per_shard:
                self._close_shard()
        if self._shard is None:
            number = self.first_shard + len(self._shards)
            self._shard = TarShard(self.work / f"{shard_stem(self.out.name)}-{number:06d}.tar")
            if self._once is not None:
                self._once.begin(self._shard.path.name)
        entry = self._shard.add(built.key, own, {name: (member, content[name]) for name, member in shared.items()})
        if self._once is not None:
            self._once.wrote(entry)
        entry.take(built.entry)
        self.records += 1
        self.bytes += size
        self.notes.add(built.notes, built.key)

    def _shared(self, content: dict[str, bytes]) -> dict[str, Member]:
        """Those media of a record that were written before; its JSON then says where."""
        shared = self._once.find(content) if self._once is not None else {}
        if not shared or self._once is None:
            return {}
        raw = with_owners(content["json"], shared, self._once.names)
        if len(raw) > LimitsConfig.json_bytes:
            return {}
        content["json"] = raw
        return shared

    def _skip(self, skip: Skip) -> None:
        self._first = self._first or str(skip)
        self._skips.write(json.dumps(skip.line()).encode() + b"\n")
        self.skipped[skip.reason] += 1

    def _close_shard(self) -> None:
        assert self._shard is not None
        line = self._shard.close()
        entries, self._shard = self._shard.entries, None
        self._skips.flush()
        os.fsync(self._skips.fileno())
        journal = {
            "shard": line,
            "items": self.items,
            "chain": self._chain.hexdigest(),
            "skipped": dict(self.skipped),
            "notes": self.notes.found,
            "skips": self._skips.tell(),
            **({"ledger": self._ledger.cut()} if self._ledger is not None else {}),
            **self._counts(),
            **({"media": self._once.state()} if self._once is not None else {}),
            "entries": [asdict(entry) for entry in entries],
        }
        write_text(self._journal(len(self._shards)), json.dumps(journal), sync=True)
        self._shards.append(line)

    def _counts(self) -> dict[str, Any]:
        """What else a journal has."""
        return {}

    def _take_counts(self, journal: dict[str, Any]) -> None:
        """Go on from what `_counts` said."""

    def _journal(self, number: int) -> Path:
        return self.work / f"{shard_stem(self.out.name)}-{self.first_shard + number:06d}.journal.json"

    def _entries(self) -> Iterator[list[Entry]]:
        for number in range(len(self._shards)):
            listed = json.loads(self._journal(number).read_bytes())["entries"]
            yield [Entry(**{**e, "members": [Member(**m) for m in e["members"]]}) for e in listed]

    def _empty_part(self, head: dict[str, Any]) -> dict[str, Any]:
        """A part of a data set that has no record: a folder that says so in place of a manifest."""
        self._side_files()
        complete = self._described(head, 0, 1, [])
        write_text(self.work / EMPTY, json.dumps(complete))
        for name in (SETTINGS, MEDIA, LOCK):
            (self.work / name).unlink(missing_ok=True)
        replace_folder(self.work, self.out)
        return complete

    def _nothing(self) -> dict[str, Any]:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.skipped.most_common(5))
        kept = self.out.with_name(f"{self.out.name}.{SKIPPED}")
        self._skips.close()
        lists = self._write_missing(lambda name: self.out.with_name(f"{self.out.name}.{name}"))
        if self.skipped:
            os.replace(self.work / SKIPPED, kept)
        shutil.rmtree(self.work)
        raise (UserError if self.items else NoItems)(
            f"data set {self.out.name}: no record came out of {self.items} items "
            f"({reasons or 'the source has no rows'})"
            + (f"; {kept} says why for each" if self.skipped else "")
            + "".join(f"; {path} lists the media that were not there" for path in lists)
            + (f"; the first: {self._first}" if self._first else "")
            + (f". {self.hint}" if self.hint else "")
        )

    def full(self, error: OSError) -> Exception:
        """The exception to raise for a system error: a UserError when the disk is full, else the error itself."""
        if error.errno not in FULL:
            return error
        return UserError(
            f"no space left while writing {error.filename or self.work} ({error.strerror}). The {len(self._shards)} "
            "complete shards are kept: make room and run the command again"
        )
