"""Checking shards against their manifest, repairing damaged shards, and indexing tars from other tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from data_prep.media import MediaError, StillImage, Video, probe_image, probe_video
from data_prep.output import SKIPPED
from data_prep.record_builder import Asked, check_usable, measure, view_of
from molmo2_nemo.data.foreign import ForeignTexts
from molmo2_nemo.data.manifest import (
    MANIFEST,
    Entry,
    ShardError,
    members_crc,
    read_entries,
    read_head,
    write_manifest_file,
)
from molmo2_nemo.data.record import BadRecord, load_json, parse_record
from molmo2_nemo.data.shard_writer import (
    LEFT_OUT,
    NothingUsable,
    TarShard,
    file_state,
    index_tar,
    read_records,
    write_manifest,
)
from molmo2_nemo.data.shards import file_sha256
from molmo2_nemo.files import atomic, write_text

REMOVED = "removed by repair"
INDEXED = "indexed"  # in a head: the tars are another tool's, and are never rewritten


@dataclass(frozen=True)
class Problem:
    """Something wrong with a record, or with a shard as a whole if `key` is empty."""

    shard: str
    key: str
    text: str


def data_sets(folder: Path) -> list[Path]:
    """`folder` itself if it is a data set, else the data sets in it.

    Raises:
        ShardError: `folder` is no data set and holds none.
    """
    if not folder.is_dir():
        raise ShardError(f"no folder at {folder}")
    if (folder / MANIFEST).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    if not found:
        tars = any(folder.glob("*.tar"))
        hint = f"molmo2 shards index {folder} makes its tars a data set" if tars else "nor has any folder in it"
        raise ShardError(f"{folder} has no {MANIFEST}; {hint}")
    return found


def check(folder: Path, *, quick: bool = False, workers: int = 0) -> list[Problem]:
    """All problems of a data set: files, checksums, structure, every record, every image and video.

    Args:
        quick: sizes and checksums only.
    """
    head = read_head(folder / MANIFEST)
    jobs = [
        (folder, shard, entries, quick, texts_of(head), Asked.of(head))
        for shard, entries in zip(head["shards"], read_entries(folder / MANIFEST), strict=False)
    ]
    problems = [problem for found in _map(_check_shard, jobs, workers) for problem in found]
    if len(jobs) != len(head["shards"]):
        problems.append(Problem(MANIFEST, "", f"describes {len(jobs)} of {len(head['shards'])} shards"))
    listed = {shard["name"] for shard in head["shards"]}
    listed.update(head.get("unused", ()))
    problems += [
        Problem(path.name, "", "is not listed in the manifest")
        for path in sorted(folder.glob("*.tar"))
        if path.name not in listed
    ]
    return problems


def _map(function: Any, jobs: list[Any], workers: int) -> Iterator[Any]:
    if workers < 2 or len(jobs) < 2:
        yield from (function(*job) for job in jobs)
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn")) as pool:
        yield from pool.map(function, *zip(*jobs, strict=True))


def texts_of(head: dict[str, Any]) -> ForeignTexts | None:
    """Where the texts of a data set's records lie, if another tool wrote them."""
    return ForeignTexts(**head["texts"]) if "texts" in head else None


def _check_shard(
    folder: Path,
    shard: dict[str, Any],
    entries: list[Entry],
    quick: bool,
    texts: ForeignTexts | None,
    asked: Asked = Asked.USABLE,
) -> list[Problem]:
    name, path = shard["name"], folder / shard["name"]
    if not path.is_file():
        return [Problem(name, "", "is missing")]
    problems = []
    if len(entries) != shard["records"]:
        problems.append(Problem(name, "", f"the manifest lists {len(entries)} of its {shard['records']} records"))
    size = path.stat().st_size
    if size != shard["bytes"]:
        problems.append(Problem(name, "", f"has {size} bytes, the manifest says {shard['bytes']}"))
    elif file_sha256(path) != shard["sha256"]:
        problems.append(Problem(name, "", "its SHA-256 is not the manifest's"))
    if not quick or problems:
        problems += [Problem(name, e.key, text) for e, text, _ in _judged(path, entries, texts, asked) if text]
    if not problems and not quick:
        try:
            bad: dict[str, str] = {}
            found = dict(index_tar(path, bad))
        except ShardError as error:
            return [Problem(name, "", str(error))]
        left = len(found) + len(bad) - len(entries)
        if left != shard.get("left_out", 0) or any(found.get(e.key) != e.members for e in entries):
            problems.append(Problem(name, "", "its members are not those of the manifest"))
    return problems


def _judged(
    path: Path, entries: list[Entry], texts: ForeignTexts | None, asked: Asked = Asked.USABLE
) -> Iterator[tuple[Entry, str, dict[str, bytes]]]:
    """Each entry with its problem ("" if there is none) and its members."""
    for entry, content in read_records(path, entries):
        yield entry, record_problem(f"{path.name}:{entry.key}", entry, content, texts, asked), content


def record_problem(
    label: str,
    entry: Entry,
    content: dict[str, bytes],
    texts: ForeignTexts | None = None,
    asked: Asked = Asked.USABLE,
) -> str:
    """The problem of a record, given its members as read; "" when it is as `asked`."""
    for member in entry.members:
        if len(content[member.suffix]) != member.size:
            return f"its member .{member.suffix} is cut off"
    if entry.crc is not None and members_crc(content) != entry.crc:
        return "its contents changed (CRC-32)"
    try:
        look(label, content, texts, asked)
    except BadRecord as error:
        return error.detail
    except MediaError as error:
        return str(error)
    return ""


def look(
    label: str, content: dict[str, bytes], texts: ForeignTexts | None = None, asked: Asked = Asked.USABLE
) -> Entry:
    """Parse and check a record and decode its media as `molmo2 prepare` does; returns its measures.

    Raises:
        BadRecord, MediaError: training could not use it, or it is not as `asked`.
    """
    content = content if texts is None else texts.members(label, content)
    record = parse_record(label, content)
    data = load_json(label, content)
    images: list[StillImage] = [probe_image(image) for image in record.images]
    video: Video | None = probe_video(record.video, data["video"].lower()) if record.video is not None else None
    if video is not None and record.clip is not None and record.clip[0] >= video.duration:
        raise MediaError("clip outside the video", f"{record.clip[0]} - {record.clip[1]} s of {video.duration:.3f} s")
    check_usable(record, data, view_of(images, video, record.clip), 0.0 if video is None else video.duration, asked)
    return measure(data, images, video)


def repair(folder: Path) -> list[Problem]:
    """Rewrite damaged shards without the records that cannot be used; returns the problems of those records.

    The new shard has a new name, the manifest is replaced atomically, and then the old shard is removed: whenever this
    is interrupted, the data set is the old or the new one, and another call finishes the repair.

    Raises:
        ShardError: no record would be left.
    """
    head = read_head(folder / MANIFEST)
    shards, kept, old, lost, changed = [], [], [], [], False
    for shard, entries in zip(head["shards"], read_entries(folder / MANIFEST), strict=True):
        problems = _check_shard(folder, shard, entries, False, texts_of(head))
        if not problems:
            shards.append(shard)
            kept.append(entries)
            continue
        path = folder / shard["name"]
        if head.get(INDEXED):  # its tars are somebody else's: records are left out of the manifest
            state, good, bad = _without(path, shard, entries, texts_of(head))
        else:
            old.append(path)
            state, good, bad = _rewritten(path, entries)
        lost += [Problem(path.name, entry.key, text) for entry, text in bad]
        changed = True
        if state is not None:
            shards.append(state)
            kept.append(good)
        elif path.is_file() and head.get(INDEXED):
            head["unused"] = [*head.get("unused", ()), path.name]
    if not changed:
        return []
    if not shards:
        raise ShardError(f"{folder}: none of its records can be used; nothing was changed. Prepare the data set again")
    _replace_manifest(folder, head, shards, kept, lost)
    for path in old:
        path.unlink(missing_ok=True)
    return lost


Repaired = tuple[dict[str, Any] | None, list[Entry], list[tuple[Entry, str]]]  # shard for the head, good, bad records


def _missing(entries: list[Entry]) -> Repaired:
    return None, [], [(entry, "its shard is missing") for entry in entries]


def _without(path: Path, shard: dict[str, Any], entries: list[Entry], texts: ForeignTexts | None) -> Repaired:
    """The same tar, listed without the records that cannot be used."""
    if not path.is_file():
        return _missing(entries)
    judged = [(entry, problem) for entry, problem, _ in _judged(path, entries, texts)]
    good, bad = [e for e, problem in judged if not problem], [(e, problem) for e, problem in judged if problem]
    state = {**shard, **file_state(path), "records": len(good), "left_out": shard.get("left_out", 0) + len(bad)}
    return (state if good else None), good, bad


def _rewritten(path: Path, entries: list[Entry]) -> Repaired:
    """A new tar of the records that can be used."""
    if not path.is_file():
        return _missing(entries)
    number = 1
    while (target := path.with_name(f"{path.stem.partition('-r')[0]}-r{number}.tar")).exists():
        number += 1
    new, bad = TarShard(target), []
    try:
        for entry, problem, content in _judged(path, entries, None):
            if problem:
                bad.append((entry, problem))
            else:
                new.add(entry.key, content).take(entry)
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
                file.write(json.dumps({"key": problem.key, "reason": REMOVED, "detail": problem.text}) + "\n")


def index(folder: Path, name: str | None = None, texts: ForeignTexts | None = None) -> dict[str, Any]:
    """Turn plain webdataset tars into a data set: check and measure every record, then write the manifest.

    A record that training could not use is left out of the manifest, and listed in skipped.jsonl.

    Args:
        texts: where the records' texts lie, unless they are records of this project.
    Raises:
        DataError: no tars, a damaged one, or no record that training could use; no manifest is written.
    """

    def measured(label: str, content: dict[str, bytes], entry: Entry) -> None:
        try:
            entry.take(look(label, content, texts, asked))
        except MediaError as error:
            raise BadRecord(label, "bad media", str(error)) from None

    lost: list[Problem] = []
    before = read_head(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    asked = Asked.of(before)
    head: dict[str, Any] = {INDEXED: True} | ({"texts": texts.head()} if texts is not None else {})
    head |= {"kind": before["kind"]} if "kind" in before else {}
    try:
        head = write_manifest(
            folder,
            name or folder.resolve().name,
            measure=measured,
            head=head,
            left_out=lambda shard, key, why: lost.append(Problem(shard, key, why)),
        )
    except NothingUsable as error:
        raise ShardError(f"{error}. {HOW}" if texts is None else str(error)) from None
    lines = [json.dumps({"key": f"{p.shard}:{p.key}", "reason": LEFT_OUT, "detail": p.text}) + "\n" for p in lost]
    if lines:
        write_text(folder / SKIPPED, "".join(lines))
    return head


HOW = (
    "Where a record's JSON is another tool's, say where its texts are: --caption-from txt for a member, --caption-from "
    "json:caption for a field; or --question-from and --answer-from"
)
