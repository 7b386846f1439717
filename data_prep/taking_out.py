"""What stays of a data set when some of its records are taken out: shards that had none of them, and others anew."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.shard_rewriting import Place, Repaired, Rewriting, free_name
from data_prep.shard_tools import Problem, Terms
from molmo2_nemo.data.manifest import MANIFEST, Entry, Member, members_crc, read_entries, read_head, renumber
from molmo2_nemo.data.shard_writer import TarShard, read_records
from molmo2_nemo.data.shards import split_name
from molmo2_nemo.errors import UserError
from molmo2_nemo.files import write_text


@dataclass
class TakingOut(Rewriting):
    """Shards written anew without some records; all others are copied."""

    gone: set[str] = field(default_factory=set)  # keys
    into: Path = field(default_factory=Path)  # folder of the new tars

    def rewritten(self, number: int, entries: list[Entry], borrowed: list[str]) -> Repaired:
        """A new tar of the records that stay. Media that these share with one that goes keep its name, as records in
        other tars call them by it."""
        path, stay = self.paths[number], {entry.key for entry in entries} - self.gone
        new = TarShard(self._target(path))
        try:
            others = {p: m for p, m in self.wanted.items() if split_name(m.owner or "")[0] not in stay}
            everything, self.wanted = self.wanted, others
            alone = self._keep_media(new, number)
            self.wanted = everything
            for entry, problem, content in self._read(path, entries):
                if problem is None:
                    self._add(new, number, entry, content)
        except BaseException:
            new.discard()
            raise
        if new.entries or alone:
            return new.close() | ({"left_out": alone} if alone else {}), new.entries, []
        new.discard()
        return None, [], []

    def _target(self, path: Path) -> Path:
        return self.into / free_name(path).name

    def _read(self, path: Path, entries: list[Entry]) -> Iterator[tuple[Entry, Problem | None, dict[str, bytes]]]:
        for entry, content in read_records(path, entries, self.paths):
            if entry.key in self.gone:
                yield entry, Problem(path.name, entry.key, "taken out"), content
                continue
            if entry.crc is not None and members_crc(content) != entry.crc:
                raise UserError(f"{path}:{entry.key} is damaged: molmo2 shards repair {path.parent} first")
            yield entry, None, content


class Remains:
    """The shards of the data set `out` without the records `gone` (member keys); new tars are written to `work`.

    Memory: what the manifest says of one shard, and the media of rewritten shards that other records share.

    Raises:
        UserError: a record that would be copied is damaged.
    """

    def __init__(self, out: Path, work: Path, gone: set[str]):
        self.out, self.work = out, work
        self.shards: list[dict[str, Any]] = []  # for the new manifest's head
        self.old: list[str] = []  # files that are no longer needed
        self._numbers: dict[int, int] = {}  # number of a shard before -> now
        before = read_head(out / MANIFEST)["shards"]
        paths = {number: out / shard["name"] for number, shard in enumerate(before)}
        listed = enumerate(self._listed()) if gone else ()
        self._again = {number for number, entries in listed if any(entry.key in gone for entry in entries)}
        self._rewriting = TakingOut(paths, self._again, Terms(), [], self._shared(gone), gone=gone, into=work)
        for number, entries in enumerate(self._listed()):
            state: dict[str, Any] | None = before[number]
            if number in self._again:
                state, rest, _ = self._rewriting.rewritten(number, entries, [])
                write_text(self._rest(number), json.dumps([asdict(entry) for entry in rest]))
                self.old.append(paths[number].name)
            if state is not None:
                self._numbers[number] = len(self.shards)
                self.shards.append(state)

    def entries(self) -> Iterator[list[Entry]]:
        """The records of each shard."""
        for number, entries in enumerate(self._listed()):
            if number not in self._numbers:
                continue
            if number in self._again:
                entries = [entry_of(found) for found in json.loads(self._rest(number).read_bytes())]
            else:
                self._rewriting.followed(entries)
            renumber([entries], self._numbers)
            yield entries

    def _listed(self) -> Iterator[list[Entry]]:
        return read_entries(self.out / MANIFEST)

    def _shared(self, gone: set[str]) -> dict[Place, Member]:
        """The media of the shards to be written anew that records share which stay."""
        return {
            (m.shard, m.offset): m
            for entries in (self._listed() if self._again else ())
            for entry in entries
            if entry.key not in gone
            for m in entry.members
            if m.owner is not None and m.shard in self._again
        }

    def _rest(self, number: int) -> Path:
        return self.work / f"{number:06d}.rest.json"


def entry_of(found: dict[str, Any]) -> Entry:
    """An entry that was written as JSON."""
    return Entry(**{**found, "members": [Member(**member) for member in found["members"]]})
