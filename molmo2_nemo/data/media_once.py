"""Media that many records of a data set show are written once: the later records refer to the first one's bytes.

A record's JSON says where its other media are, {"media_from": {"0.jpg": "dm-000003.tar:00000017.0.jpg"}}, so that the
manifest, which has the same as offsets, can be made again from the tars alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from molmo2_nemo.data.json_values import Fault
from molmo2_nemo.data.manifest import SHARED, Entry, Member
from molmo2_nemo.data.record import BadRecord, load_json
from molmo2_nemo.data.shard_files import kept
from molmo2_nemo.data.shards import BLOCK, check_header
from molmo2_nemo.data.tar_index import index_tar

FIELD = "media_from"  # of a record's JSON
MEDIA = "media.bin"  # in the folder being written: digest and place of every medium written, in their order
LINE = struct.Struct("<16sQ")
BLOCKS = 40  # bits of a place for the block in the tar; the others are the tar's number
FIRST_SLOTS = 1024
OPEN_FILES = 8
REPAIRED = re.compile(r"-r(\d+)$")  # behind the stem of a tar that repair wrote anew
OF_PART = re.compile(r"_part-\d+-of-\d+-\d+$")  # the end of the stem of a part's tar, which `shards join` renames
OF_WHOLE = re.compile(r"-\d{6,}$")

Resume = Sequence[int]  # bytes of MEDIA; number of shared media, and their bytes


def digest(content: bytes) -> bytes:
    """16 bytes; media with the same are taken for the same."""
    return hashlib.blake2b(content, digest_size=16).digest()


class Places:
    """Digest -> place, as a hash table in three arrays: 24 bytes a slot, at most two thirds of them taken, so 36 to 72
    bytes a medium."""

    def __init__(self) -> None:
        self._clear(FIRST_SLOTS)

    def _clear(self, slots: int) -> None:
        self._low, self._high, self._place = (array("Q", bytes(8 * slots)) for _ in range(3))
        self._mask, self._count = slots - 1, 0

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        return 24 * len(self._place)

    def _slot(self, low: int, high: int) -> int:
        """The digest's slot, or the free one where it belongs."""
        slot = low & self._mask
        while self._place[slot] and (self._low[slot] != low or self._high[slot] != high):
            slot = (slot + 1) & self._mask
        return slot

    def get(self, key: bytes) -> int:
        """The place of a digest; 0 if there is none."""
        return self._place[self._slot(*struct.unpack("<QQ", key))]

    def add(self, key: bytes, place: int) -> None:
        """Remember a place above 0; a digest that is there keeps its place."""
        low, high = struct.unpack("<QQ", key)
        self._put(low, high, place)
        if 3 * self._count > 2 * len(self._place):
            old = zip(self._low, self._high, self._place, strict=True)
            self._clear(2 * len(self._place))
            for low, high, other in old:
                if other:
                    self._put(low, high, other)

    def _put(self, low: int, high: int, place: int) -> None:
        slot = self._slot(low, high)
        if not self._place[slot]:
            self._low[slot], self._high[slot], self._place[slot] = low, high, place
            self._count += 1


class MediaOnce:
    """What the writer of a data set asks for every record.

    Args:
        folder: where the shards are written.
        shards: names of those that are complete.
        resume: what `state` gave when the last of them was complete; None: the shards are read.
    """

    def __init__(self, folder: Path, shards: Sequence[str] = (), resume: Resume | None = (0, 0, 0)):
        self.folder, self.names = folder, list(shards)
        self.members = self.bytes = 0  # shared so far
        self._places, self._now = Places(), dict[int, tuple[str, int]]()  # of the shard being written: name, size
        self._digests: dict[str, bytes] = {}
        self._files: OrderedDict[int, Any] = OrderedDict()
        path = folder / MEDIA
        self._file = path.open("a+b")
        if resume is None or path.stat().st_size < resume[0]:
            self._read_shards()
        else:
            self._load(resume[0])
        if resume is not None:
            _, self.members, self.bytes = resume

    def _load(self, size: int) -> None:
        self._file.truncate(size)
        self._file.seek(0)
        while chunk := self._file.read(LINE.size * 2**16):
            for key, place in LINE.iter_unpack(chunk):
                self._places.add(key, place)

    def _read_shards(self) -> None:
        self._file.truncate(0)
        for number, name in enumerate(self.names):
            with (self.folder / name).open("rb") as file:
                for _, members in index_tar(self.folder / name, {}):
                    for member in members:
                        if member.suffix != "json":
                            file.seek(member.offset)
                            self._add(digest(file.read(member.size)), number, member.offset)

    def _add(self, key: bytes, number: int, offset: int) -> None:
        place = number << BLOCKS | offset // BLOCK
        self._places.add(key, place)
        self._file.write(LINE.pack(key, place))

    def begin(self, name: str) -> None:
        """A new shard is being written."""
        self.names.append(name)
        self._now = {}

    def find(self, members: Mapping[str, bytes]) -> dict[str, Member]:
        """Those media of a record (suffix -> bytes) that were written before."""
        self._digests = {suffix: digest(members[suffix]) for suffix in members if suffix != "json"}
        found = {}
        for suffix, key in self._digests.items():
            place = self._places.get(key)
            number, offset = place >> BLOCKS, (place & (1 << BLOCKS) - 1) * BLOCK
            owner, size = self._there(number, offset) if place else ("", -1)
            if size == len(members[suffix]):
                found[suffix] = Member(suffix, offset, size, number, owner)
        return found

    def _there(self, number: int, offset: int) -> tuple[str, int]:
        """Name and size of a medium, from the tar's header; a size of -1 if there is none."""
        if number == len(self.names) - 1 and offset in self._now:
            return self._now[offset]
        file = kept(self._files, number, OPEN_FILES, lambda n: (self.folder / self.names[n]).open("rb"), _close)
        info = check_header(os.pread(file.fileno(), BLOCK, offset - BLOCK))
        return info.name, info.size

    def wrote(self, entry: Entry) -> None:
        """The record of the last `find` was written to the shard that was last begun."""
        for member in entry.members:
            if member.owner is not None:
                self.members, self.bytes = self.members + 1, self.bytes + member.size
            elif member.suffix != "json":
                self._now[member.offset] = member.name(entry.key), member.size
                self._add(self._digests[member.suffix], len(self.names) - 1, member.offset)

    def state(self) -> Resume:
        """What a later `MediaOnce` needs to go on after the shard that was just completed."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END), self.members, self.bytes

    def head(self) -> dict[str, Any]:
        """What the manifest's head says of it."""
        return {SHARED: {"members": self.members, "bytes": self.bytes}} if self.members else {}

    def close(self) -> None:
        try:
            self._file.close()
        except OSError:  # the disk is full; what `state` has not counted is not needed
            self._file.raw.close()
        while self._files:
            self._files.popitem()[1].close()


def _close(file: Any) -> None:
    file.close()


def with_owners(raw: bytes, found: Mapping[str, Member], names: Sequence[str]) -> bytes:
    """A record's JSON, an object with at least one field, that also says where its media are."""
    owners = {suffix: f"{names[m.shard or 0]}:{m.owner}" for suffix, m in sorted(found.items())}
    return raw.rstrip()[:-1] + b", " + json.dumps({FIELD: owners}).encode()[1:]


Listed = list[tuple[str, list[Member]]]  # keys of a tar's records, and their members


class Owners:
    """Where the media lie that records name by FIELD, among the tars of a folder.

    Args:
        names: of the tars.
        listed: number of a tar -> its records.
    """

    def __init__(self, names: Sequence[str], listed: Callable[[int], Listed]):
        self._listed = listed
        self._numbers = {name: number for number, name in enumerate(names)}
        self._repaired: dict[str, int] = {}  # name of a tar before any repair -> number of its newest form
        for name in sorted(names, key=lambda name: int((REPAIRED.search(name[:-4]) or [0, 0])[1])):
            self._repaired[_first_name(name)] = self._numbers[name]
        self._members: OrderedDict[int, dict[str, Member]] = OrderedDict()
        self._wholes: dict[str, dict[str, int]] = {}

    def find(self, label: str, content: Mapping[str, bytes]) -> list[Member]:
        """The media of a record (suffix -> bytes of its own members) that lie with other records.

        Raises:
            BadRecord: a name that is none, or a medium that is not there.
        """
        if FIELD.encode() not in content.get("json", b""):
            return []
        named = load_json(label, content).get(FIELD, {})
        if not isinstance(named, dict) or not all(isinstance(place, str) for place in named.values()):
            raise _lost(label, "", str(named), "an object, suffix -> TAR:NAME")
        return [self._find(label, suffix, place) for suffix, place in named.items() if suffix not in content]

    def _find(self, label: str, suffix: str, place: str) -> Member:
        tar, _, name = place.partition(":")
        number = self._numbers.get(tar, self._repaired.get(_first_name(tar), -1))
        if number < 0 and OF_PART.search(_first_name(tar)[:-4]):
            number = self._whole(OF_PART.sub("", _first_name(tar)[:-4])).get(name, -1)
        if number < 0:
            raise _lost(label, suffix, place, f"{tar} in this folder; bring that tar too")
        found = kept(self._members, number, OPEN_FILES, self._load, lambda _: None).get(name)
        if found is None:
            raise _lost(label, suffix, place, f"a member {name} of {tar}")
        return Member(suffix, found.offset, found.size, number, name)

    def _whole(self, stem: str) -> dict[str, int]:
        """Names of the media of a set that was joined of parts -> numbers of their tars; keys are unique in a set."""
        if stem not in self._wholes:
            numbers = [n for name, n in self._repaired.items() if OF_WHOLE.sub("", name[:-4]) == stem]
            self._wholes[stem] = {name: number for number in numbers for name in self._load(number)}
        return self._wholes[stem]

    def _load(self, number: int) -> dict[str, Member]:
        return {m.name(key): m for key, members in self._listed(number) for m in members if m.suffix != "json"}


def _first_name(tar: str) -> str:
    stem, dot, ending = tar.rpartition(".")
    return REPAIRED.sub("", stem) + dot + ending


def _lost(label: str, suffix: str, place: str, expected: str) -> BadRecord:
    says = f"its .{suffix} is {place}" if suffix else f"{FIELD} is {place:.200}"
    fault = Fault(f"{FIELD}.{suffix}" if suffix else FIELD, place[:200], expected)
    return BadRecord(
        label, "missing member", f"{says}, which is not there; expected {expected}", fault, suffix or "json"
    )


def media_bytes(path: Path | None, member: Member) -> bytes:
    """A shared medium as it lies in its tar; what there is of it."""
    try:
        with path.open("rb") if path is not None else open(os.devnull, "rb") as file:
            file.seek(max(member.offset, 0))
            return file.read(max(member.size, 0))
    except OSError:
        return b""
