"""A manifest of tars that are there already: another tool's, or this one's whose manifest is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from molmo2_nemo.data.manifest import (
    MANIFEST,
    Entry,
    Member,
    ShardError,
    members_crc,
    renumber,
    shared_head,
    write_manifest_file,
)
from molmo2_nemo.data.media_once import Owners, media_bytes
from molmo2_nemo.data.record import BadRecord
from molmo2_nemo.data.shard_writer import file_state, read_records
from molmo2_nemo.data.tar_index import index_tar
from molmo2_nemo.files import atomic

LEFT_OUT = "left out by index"  # why records of another tool's tars are missing from the manifest
ALONE = "media of removed records that others show"


class NothingUsable(ShardError):
    """Tars that could be read, without a record that training could use."""


def write_manifest(
    folder: Path,
    name: str,
    *,
    measure: Callable[[str, dict[str, bytes], Entry], None] | None = None,
    head: Mapping[str, Any] | None = None,
    left_out: Callable[[str, str, BadRecord], None] | None = None,
) -> dict[str, Any]:
    """Index every `*.tar` of `folder` and write the manifest last. Also makes a webdataset from another tool readable.

    Args:
        measure: (label, members, entry) fills in the measures of a record, or raises BadRecord.
        head: further fields of the manifest's head.
        left_out: called with shard, key and error of every record that cannot be used, which the manifest then does
            not list; None: such a record is an error.
    Returns:
        The head.
    Raises:
        ShardError: no shards, tars that are damaged or none (all are named), or no record that can be used.
        BadRecord: from `measure`, without `left_out`; no manifest is written, so no run begins with it.
    """
    passed: Counter[str] = Counter()
    scans = _scanned(folder, left_out is not None, passed)
    tars, found = list(scans), list(scans.values())
    foreign = "texts" in (head or {})  # their JSON is another tool's
    owners = None if foreign else Owners([tar.name for tar in tars], lambda number: found[number][0])
    good = [_usable(tar, *scan, tars, owners, measure) for tar, scan in scans.items()]
    places = {(m.shard, m.offset) for entries in good for e in entries for m in e.members if m.owner is not None}
    owning_tars = {number for number, _ in places}
    numbers = [n for n, kept in enumerate(good) if kept or n in owning_tars]
    shards, lost, first = [], 0, ""
    for n, (tar, (records, bad)) in enumerate(scans.items()):
        wrong = bad or {}
        if n in numbers:
            line = {"name": tar.name, **file_state(tar), "records": len(good[n])}
            shards.append(line | ({"left_out": len(wrong)} if wrong else {}))
        owning = _owning(n, records, wrong, places)
        passed[ALONE] += len(owning)
        for key, error in wrong.items():
            if key not in owning:
                first = first or f"{tar.name}:{key}: {error.detail}"
                assert left_out is not None
                left_out(tar.name, key, error)
                lost += 1
    unused = [tar.name for n, tar in enumerate(tars) if n not in numbers]
    if not tars:
        raise ShardError(f"no shards (*.tar) in {folder}")
    if not any(good):
        raise NothingUsable(f"none of the records in {folder} can be used; the first: {first}")
    manifest = {**(head or {}), "name": name, "records": sum(s["records"] for s in shards), "shards": shards}
    manifest |= {"unused": unused} if unused else {}
    manifest |= {"skipped": {LEFT_OUT: lost}} if lost else {}
    manifest |= {"passed_over": dict(sorted((+passed).items()))} if +passed else {}
    listed = [good[n] for n in numbers]
    renumber(listed, {n: i for i, n in enumerate(numbers)})
    manifest |= shared_head(listed)
    with atomic(folder / MANIFEST) as part:
        write_manifest_file(part, manifest, listed)
    return manifest


def _usable(
    tar: Path,
    found: list[tuple[str, list[Member]]],
    bad: dict[str, BadRecord] | None,
    tars: Sequence[Path],
    owners: Owners | None,
    measure: Callable[[str, dict[str, bytes], Entry], None] | None,
) -> list[Entry]:
    """The records of a tar that can be used; the numbers of tars are those in `tars`. The others go to `bad`.

    Raises:
        BadRecord: one cannot be used, and `bad` is None.
    """
    good = []
    for entry, content in read_records(tar, [Entry(key, members) for key, members in found]):
        label = f"{tar.name}:{entry.key}"
        try:
            shared = owners.find(label, content) if owners is not None else []
            content |= {m.suffix: media_bytes(tars[m.shard or 0], m) for m in shared}
            entry.members = sorted(entry.members + shared, key=lambda m: m.suffix) if shared else entry.members
            entry.crc = members_crc(content)
            if measure is not None:
                measure(label, content, entry)
            good.append(entry)
        except BadRecord as error:
            if bad is None:
                raise
            bad[entry.key] = error
    return good


def _owning(
    number: int,
    found: list[tuple[str, list[Member]]],
    bad: Mapping[str, BadRecord],
    places: set[tuple[int | None, int]],
) -> set[str]:
    """Keys that have no JSON, but media that records show: `repair` keeps them where it removes a record."""
    alone = {key: members for key, members in found if key in bad and all(m.suffix != "json" for m in members)}
    return {key for key, members in alone.items() if any((number, m.offset) in places for m in members)}


Scan = tuple[list[tuple[str, list[Member]]], dict[str, BadRecord] | None]  # records; keys that cannot be read


def _scanned(folder: Path, lenient: bool, passed: Counter[str]) -> dict[Path, Scan]:
    """`index_tar` of every tar of a folder, in the order of their names.

    Raises:
        ShardError: names every tar that cannot be read.
    """
    scans: dict[Path, Scan] = {}
    wrong: list[str] = []
    tars = sorted(folder.glob("*.tar"))
    for tar in tars:
        bad: dict[str, BadRecord] | None = {} if lenient else None
        try:
            scans[tar] = index_tar(tar, bad, passed), bad
        except ShardError as error:
            wrong.append(str(error))
    if wrong:
        many = f"{len(wrong)} of {len(tars)} tars cannot be read:\n  " if len(wrong) > 1 else ""
        rest = "Nothing was indexed: copy them again, or move them out of the folder and index the others"
        raise ShardError(many + "\n  ".join(wrong) + (f"\n{rest}" if len(tars) > 1 else ""))
    return scans
