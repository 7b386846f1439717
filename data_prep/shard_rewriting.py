"""Shards written anew by `repair`: every record that is whole somewhere, and the media that other records share.

The numbers of tars in entries stay those of the manifest before until the new one is written; a new tar has that of the
one in whose place it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby, islice, product
from pathlib import Path
from typing import Any

from data_prep.shard_tools import Problem, Terms, judged, own_members, record_problem
from molmo2_nemo.data.manifest import Entry, Member
from molmo2_nemo.data.media_once import media_bytes
from molmo2_nemo.data.shard_writer import TarShard, file_state, read_records
from molmo2_nemo.data.shards import split_name
from molmo2_nemo.data.tar_index import salvage_tar

MOST_VERSIONS = 64  # tried of one record
Place = tuple[int, int]  # number of a tar, and the offset of a medium in it
Repaired = tuple[dict[str, Any] | None, list[Entry], list[Problem]]  # shard for the head, good, problems of the others


class Spare:
    """A tar in which records of a damaged shard may be whole: a damaged shard, or one that no manifest lists."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def places(self) -> dict[str, list[Member]]:
        """Where its records lie, as far as their headers are whole."""
        return salvage_tar(self.path)

    def versions(self, entry: Entry) -> Iterator[dict[str, bytes]]:
        """What the record's own members may be here: the bytes where the manifest has them, and the record of that key,
        which may have its shared media too."""
        own, all_of_it = {m.suffix for m in own_members(entry)}, {m.suffix for m in entry.members}
        for members in (own_members(entry), self.places.get(entry.key)):
            if members and own <= {m.suffix for m in members} <= all_of_it:
                for _, content in read_records(self.path, [Entry(entry.key, members)]):
                    yield content

    def media(self, member: Member) -> Iterator[bytes]:
        """What a shared medium may be here: the bytes where the manifest has it, and the member of that name."""
        yield media_bytes(self.path, member)
        key, suffix = split_name(member.owner or "")
        yield from (media_bytes(self.path, m) for m in self.places.get(key, ()) if m.suffix == suffix)


@dataclass
class Rewriting:
    """The shards of one repair."""

    paths: dict[int, Path]  # all tars of the manifest
    again: set[int]  # numbers of those that are written anew
    terms: Terms
    spares: list[Spare]
    wanted: dict[Place, Member]  # media that whole records share
    moved: dict[Place, Member] = field(default_factory=dict)  # where media of tars that were written anew are

    def rewritten(self, number: int, entries: list[Entry], borrowed: list[str]) -> Repaired:
        """A new tar of the records that can be used; `borrowed` gets the keys of those that come from another tar."""
        path = self.paths[number]
        new, bad = TarShard(self._target(path)), []
        try:
            for entry, problem, content in self._read(path, entries):
                whole = content if problem is None else self._saved(path, entry, content)
                if whole is not None:
                    self._add(new, number, entry, whole)
                    borrowed += [entry.key] if problem is not None else []
                elif problem is not None:
                    bad.append(problem)
            alone = self._keep_media(new, number)
        except BaseException:
            new.discard()
            raise
        if new.entries or alone:
            return new.close() | ({"left_out": alone} if alone else {}), new.entries, bad
        new.discard()
        return None, [], bad

    def without(self, number: int, shard: Mapping[str, Any], entries: list[Entry]) -> Repaired:
        """The same tar, listed without the records that training cannot read or use."""
        path = self.paths[number]
        if not path.is_file():
            return None, [], [Problem(path.name, entry.key, "its shard is missing") for entry in entries]
        found = [(entry, problem) for entry, problem, _ in judged(path, entries, self.terms, self.paths, headers=True)]
        good, bad = [e for e, problem in found if problem is None], [p for _, p in found if p is not None]
        state = {**shard, **file_state(path), "records": len(good), "left_out": shard.get("left_out", 0) + len(bad)}
        owning = any(place[0] == number for place in self.wanted)
        return (state if good or owning else None), good, bad

    def followed(self, entries: Iterable[Entry]) -> None:
        """Let records of a tar that stays share media where these are now."""
        for entry in entries:
            for i, member in enumerate(entry.members):
                if member.shard in self.again and member.shard is not None:
                    entry.members[i] = replace(self.moved[member.shard, member.offset], suffix=member.suffix)

    def _target(self, path: Path) -> Path:
        """Where the new tar is written that takes the place of `path`."""
        return free_name(path)

    def _read(self, path: Path, entries: list[Entry]) -> Iterator[tuple[Entry, Problem | None, dict[str, bytes]]]:
        if path.is_file():
            yield from judged(path, entries, self.terms, self.paths)
        else:
            yield from ((entry, Problem(path.name, entry.key, "its shard is missing"), {}) for entry in entries)

    def _saved(self, path: Path, entry: Entry, content: Mapping[str, bytes]) -> dict[str, bytes] | None:
        """The members of a record as they were written (CRC-32), from anywhere in any tar; None if they are nowhere."""
        for whole in islice(self._versions(path, entry, content), MOST_VERSIONS if entry.crc is not None else 0):
            if record_problem(path.name, entry, whole, self.terms) is None:
                return whole
        return None

    def _versions(self, path: Path, entry: Entry, content: Mapping[str, bytes]) -> Iterator[dict[str, bytes]]:
        own = {m.suffix: content.get(m.suffix, b"") for m in own_members(entry)}
        others = [version for spare in self.spares for version in spare.versions(entry)]
        shared = [m for m in entry.members if m.owner is not None]
        media = [self._media(m, content) for m in shared]
        for version in (own, *others) if shared else others:
            for found in product(*media):
                yield dict(zip((m.suffix for m in shared), found, strict=True)) | version

    def _media(self, member: Member, content: Mapping[str, bytes]) -> list[bytes]:
        """The different bytes that a shared medium may be."""
        found = [content.get(member.suffix, b""), *(data for spare in self.spares for data in spare.media(member))]
        return list(dict.fromkeys(data for data in found if len(data) == member.size)) or [b""]

    def _add(self, new: TarShard, number: int, entry: Entry, whole: Mapping[str, bytes]) -> None:
        """Write a whole record. A shared medium that its tar has lost is written with the first record that has it."""
        shared: dict[str, tuple[Member, bytes]] = {}
        for member in entry.members:
            if member.owner is not None and member.shard is not None:
                place = self.moved.get((member.shard, member.offset)) if member.shard in self.again else member
                if place is not None:
                    shared[member.suffix] = replace(place, suffix=member.suffix), whole[member.suffix]
        own = {suffix: content for suffix, content in whole.items() if suffix not in shared}
        written = new.add(entry.key, own, shared)
        written.take(entry)
        for before, now in zip(sorted(entry.members, key=lambda m: m.suffix), written.members, strict=True):
            if now.owner is None and now.suffix != "json":
                self._has_moved(before, number, entry.key, now)

    def _has_moved(self, before: Member, number: int, key: str, now: Member) -> None:
        place = number if before.shard is None else before.shard, before.offset
        self.moved.setdefault(place, replace(now, shard=number, owner=now.name(key)))

    def _keep_media(self, new: TarShard, number: int) -> int:
        """Write media of this tar that are shared, but whose record is not there; returns the number of their keys."""
        left = [m for place, m in self.wanted.items() if place[0] == number and place not in self.moved]
        keys = 0
        for key, media in groupby(
            sorted(left, key=lambda m: m.owner or ""), key=lambda m: split_name(m.owner or "")[0]
        ):
            before = {split_name(m.owner or "")[1]: replace(m, shard=None) for m in media}
            content = {suffix: media_bytes(self.paths[number], m) for suffix, m in before.items()}
            for now in new.keep(key, content):
                self._has_moved(before[now.suffix], number, key, now)
            keys += 1
        return keys


def free_name(path: Path) -> Path:
    """A name for the tar that takes the place of `path`."""
    number, stem = 1, re.sub(r"-r\d+$", "", path.stem)
    while (target := path.with_name(f"{stem}-r{number}.tar")).exists():
        number += 1
    return target


def shared_by_whole(shards: Iterable[tuple[str, list[Entry]]], bad: set[tuple[str, str]]) -> dict[Place, Member]:
    """The media that records share, by their places.

    Args:
        shards: names with their records.
        bad: (name, key) of the records that do not count.
    """
    return {
        (m.shard, m.offset): m
        for name, entries in shards
        for entry in entries
        if (name, entry.key) not in bad
        for m in entry.members
        if m.owner is not None and m.shard is not None
    }
