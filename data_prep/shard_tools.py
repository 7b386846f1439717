"""Checking shards against their manifest, and indexing tars from other tools (repair: shard_repair.py)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.media_kinds import MediaError, StillImage, Video
from data_prep.misnamed import elsewhere
from data_prep.noticed import Noted, Notes
from data_prep.output import SKIPPED
from data_prep.probe import probe_image, probe_video
from data_prep.record_builder import Asked, check_usable, measure, media_notes, outside, view_of
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.foreign import ForeignTexts
from molmo2_nemo.data.json_values import Fault
from molmo2_nemo.data.manifest import (
    MANIFEST,
    Entry,
    Member,
    ShardError,
    file_sha256,
    members_crc,
    read_entries,
    read_head,
)
from molmo2_nemo.data.record import BadRecord, load_json, parse_record
from molmo2_nemo.data.shard_writer import read_records
from molmo2_nemo.data.shards import BLOCK, check_member
from molmo2_nemo.data.tar_index import index_tar
from molmo2_nemo.data.tar_manifest import LEFT_OUT, NothingUsable, write_manifest
from molmo2_nemo.files import write_text

INDEXED = "indexed"  # in a head: the tars are another tool's, and are never rewritten


@dataclass(frozen=True)
class Problem:
    """Something wrong with a record, or with a shard as a whole if `key` is empty."""

    shard: str
    key: str
    text: str
    fault: Fault | None = None  # the field, what was seen and expected; None: no single field is at fault
    member: str = ""  # the file in the tar, where one is at fault
    lies_in: str = ""  # the tar of a shared medium that is at fault

    def line(self, reason: str) -> dict[str, Any]:
        """The line of skipped.jsonl and of `check --json`: as `Skip.line`, with shard and member for file and line."""
        made: dict[str, Any] = {"key": self.key, "reason": reason, "detail": self.text, "shard": self.shard}
        if self.member:
            made["member"] = self.member
        if self.fault is not None:
            made |= {"field": self.fault.field, "seen": self.fault.seen, "expected": self.fault.expected}
        return made


@dataclass(frozen=True)
class Terms:
    """What the records of a data set are held to."""

    texts: ForeignTexts | None = None  # where their texts lie, if another tool wrote them
    asked: Asked = Asked.USABLE
    config: DataConfig = field(default_factory=DataConfig)  # settings of the training that they are for

    @classmethod
    def of(cls, head: dict[str, Any], config: DataConfig | None = None, *, repair: bool = False) -> Terms:
        """Those of the data set with that manifest head; `repair` asks only that training can use a record."""
        texts = ForeignTexts(**head["texts"]) if "texts" in head else None
        return cls(texts, Asked.USABLE if repair else Asked.of(head), config or DataConfig())


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


def check(
    folder: Path,
    *,
    quick: bool = False,
    workers: int = 0,
    config: DataConfig | None = None,
    notes: Notes | None = None,
) -> list[Problem]:
    """All problems of a data set: files, checksums, structure, every record, every image and video.

    Args:
        quick: sizes and checksums only.
        config: settings of the training that the records are for.
        notes: gets what that training uses in part only.
    """
    head = read_head(folder / MANIFEST)
    jobs = [
        (folder, shard, entries, quick, Terms.of(head, config), media_tars(folder, head, entries))
        for shard, entries in zip(head["shards"], read_entries(folder / MANIFEST), strict=False)
    ]
    problems: list[Problem] = []
    for found, noted in _map(_noting_shard, jobs, workers):
        problems += found
        if notes is not None:
            notes.update(noted)
    moved = elsewhere(folder, head["shards"], whole_shards(problems))
    problems = [problem for problem in problems if not {problem.shard, problem.lies_in} & set(moved)]
    problems += [Problem(name, "", _renamed(file, name, head)) for name, file in moved.items()]
    if len(jobs) != len(head["shards"]):
        problems.append(Problem(MANIFEST, "", f"describes {len(jobs)} of {len(head['shards'])} shards"))
    listed = {shard["name"] for shard in head["shards"]}
    listed.update(head.get("unused", ()), moved.values())
    problems += [
        Problem(path.name, "", "is not listed in the manifest")
        for path in sorted(folder.glob("*.tar"))
        if path.name not in listed
    ]
    return problems


def media_tars(folder: Path, head: dict[str, Any], entries: Iterable[Entry]) -> dict[int, Path]:
    """The tars where shared media of a shard's records lie: number in the head -> path."""
    numbers = {m.shard for entry in entries for m in entry.members if m.shard is not None}
    return {n: folder / head["shards"][n]["name"] for n in sorted(numbers) if 0 <= n < len(head["shards"])}


def whole_shards(problems: list[Problem]) -> set[str]:
    """Names of the shards whose files are not those of the manifest, by their problems."""
    return {problem.shard for problem in problems if not problem.key}


def _renamed(file: str, name: str, head: dict[str, Any]) -> str:
    cure = "molmo2 shards repair gives it its name"
    if head.get(INDEXED):
        cure = f"rename it to {name} (repair leaves tars of another tool as they are)"
    return f"its bytes are intact in the file {file} (SHA-256); {cure}"


def _map(function: Any, jobs: list[Any], workers: int) -> Iterator[Any]:
    if workers < 2 or len(jobs) < 2:
        yield from (function(*job) for job in jobs)
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn")) as pool:
        yield from pool.map(function, *zip(*jobs, strict=True))


def _noting_shard(
    folder: Path,
    shard: dict[str, Any],
    entries: list[Entry],
    quick: bool,
    terms: Terms,
    tars: Mapping[int, Path],
) -> tuple[list[Problem], Noted]:
    notes = Notes()
    return check_shard(folder, shard, entries, quick, terms, tars, notes), notes.found


def check_shard(
    folder: Path,
    shard: dict[str, Any],
    entries: list[Entry],
    quick: bool,
    terms: Terms,
    tars: Mapping[int, Path],
    notes: Notes | None = None,
) -> list[Problem]:
    """The problems of one shard; `tars` has those where shared media lie."""
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
        problems += [problem for _, problem, _ in judged(path, entries, terms, tars, notes, headers=True) if problem]
    if not problems and not quick:
        try:
            bad: dict[str, BadRecord] = {}
            found = dict(index_tar(path, bad))
        except ShardError as error:  # of a tar listed without damaged records the headers listed were read above
            return [] if shard.get("left_out") else [Problem(name, "", str(error))]
        left = len(found) + len(bad) - len(entries)
        if left != shard.get("left_out", 0) or any(found.get(e.key) != own_members(e) for e in entries):
            problems.append(Problem(name, "", "its members are not those of the manifest"))
    return problems


def own_members(entry: Entry) -> list[Member]:
    """Those of its members that lie in its own tar."""
    return [member for member in entry.members if member.owner is None]


def judged(
    path: Path,
    entries: list[Entry],
    terms: Terms,
    tars: Mapping[int, Path],
    notes: Notes | None = None,
    *,
    headers: bool = False,
) -> Iterator[tuple[Entry, Problem | None, dict[str, bytes]]]:
    """Each entry with its problem, if it has one, and its members.

    Args:
        tars: where shared media lie.
        headers: a damaged tar header is a problem, as training reads it; else contents count alone.
    """
    for entry, content in read_records(path, entries, tars):
        problem = _media_problem(path, entry, tars) or record_problem(path.name, entry, content, terms, notes)
        yield entry, problem or (_header_problem(path, entry, own_members(entry)) if headers else None), content


def _media_problem(path: Path, entry: Entry, tars: Mapping[int, Path]) -> Problem | None:
    """What is wrong with the places of a record's shared media."""
    for member in entry.members:
        if member.owner is None:
            continue
        tar = tars.get(-1 if member.shard is None else member.shard)
        if tar is None or not tar.is_file():
            where = f"shard {member.shard} of a smaller data set" if tar is None else f"{tar.name}, which is missing"
            fault = Fault("", where, f"a tar with {member.owner}")
            says = f"its .{member.suffix} would lie in {where}"
            return Problem(path.name, entry.key, says, fault, member.owner, "" if tar is None else tar.name)
        problem = _header_problem(tar, entry, [member])
        if problem is not None:
            return replace(problem, shard=path.name, lies_in=tar.name)
    return None


def _header_problem(path: Path, entry: Entry, members: Iterable[Member]) -> Problem | None:
    """What training says of the tar headers of these members of a record, which lie in one tar."""
    with path.open("rb") as file:
        for member in members:
            file.seek(max(member.offset - BLOCK, 0))
            name = member.name(entry.key)
            try:
                check_member(path, entry.key, member, file.read(BLOCK))
            except BadRecord as error:
                fault = Fault("", "a damaged tar header", f"the header of {name}")
                return Problem(path.name, entry.key, error.detail, fault, name)
            except ShardError as error:
                return Problem(path.name, entry.key, str(error), Fault("", "another header", name), name)
    return None


def record_problem(
    shard: str, entry: Entry, content: dict[str, bytes], terms: Terms, notes: Notes | None = None
) -> Problem | None:
    """The problem of a record, given its members as read; None when it keeps the terms, and `notes` gets what training
    will leave out of it."""
    for member in entry.members:
        there = len(content[member.suffix])
        if there != member.size:
            fault = Fault("", f"{there} bytes", f"{member.size} bytes")
            name = member.name(entry.key)
            return Problem(shard, entry.key, f"its member .{member.suffix} is cut off", fault, name)
    crc = members_crc(content) if entry.crc is not None else None
    if crc != entry.crc:
        fault = Fault("", f"CRC-32 {crc}", f"CRC-32 {entry.crc}")
        return Problem(shard, entry.key, "its contents changed (CRC-32)", fault)
    try:
        looked = look(f"{shard}:{entry.key}", content, terms)
    except BadRecord as error:
        return _problem(shard, entry.key, error)
    if notes is not None:
        notes.add(looked.notes, f"{shard}:{entry.key}")
    return None


def _problem(shard: str, key: str, error: BadRecord) -> Problem:
    """A record's error, with the member that is at fault: a medium, or the JSON."""
    fault = error.fault or Fault("", error.detail, "a record that training can use")
    return Problem(shard, key, error.detail, fault, f"{key}.{error.member}")


class Looked(NamedTuple):
    """A record that keeps its terms: its measures, and what the summary counts."""

    entry: Entry
    notes: tuple[str, ...]


def look(label: str, content: dict[str, bytes], terms: Terms) -> Looked:
    """Parse and check a record and decode its media as `molmo2 prepare` does.

    Raises:
        BadRecord: training could not use it, or it does not keep the terms.
    """
    config = terms.config
    content = content if terms.texts is None else terms.texts.members(label, content)
    record = parse_record(label, content, max_json_bytes=config.limits.json_bytes)
    data = load_json(label, content, max_bytes=config.limits.json_bytes)
    images: list[StillImage] = []
    for i, image in enumerate(record.images):
        with _as_bad(label, f"images[{i}]", data["images"][i].lower()):
            images.append(probe_image(image, config))
    video: Video | None = None
    if record.video is not None:
        with _as_bad(label, "video", data["video"].lower()):
            video = probe_video(record.video, data["video"].lower(), config)
        if record.clip is not None and record.clip[0] >= video.duration:
            error = outside(record.clip, video)
            raise BadRecord(label, "bad media", str(error), error.fault("clip"))
    film, lost = (math.inf, 0.0) if video is None else (video.duration, video.lost)
    seen = check_usable(record, data, view_of(images, video, record.clip), terms.asked, config, film, lost)
    entry = measure(data, images, video)
    return Looked(entry, (*media_notes(entry, images, video), *seen))


@contextmanager
def _as_bad(label: str, field: str, member: str) -> Iterator[None]:
    """An error of a medium as that of the record, with the field and the member."""
    try:
        yield
    except MediaError as error:
        raise BadRecord(label, "bad media", str(error), error.fault(field), member) from None


def index(
    folder: Path, name: str | None = None, texts: ForeignTexts | None = None, config: DataConfig | None = None
) -> dict[str, Any]:
    """Turn plain webdataset tars into a data set: check and measure every record, then write the manifest.

    A record that training could not use is left out of the manifest, and listed in skipped.jsonl.

    Args:
        texts: where the records' texts lie, unless they are records of this project.
        config: settings of the training that the records are for.
    Raises:
        DataError: no tars, a damaged one, or no record that training could use; no manifest is written.
    """

    def measured(label: str, content: dict[str, bytes], entry: Entry) -> None:
        looked = look(label, content, terms)
        entry.take(looked.entry)
        notes.add(looked.notes, label)
        if notes.found:
            head["notes"] = notes.json()

    notes = Notes()
    lost: list[Problem] = []
    before = read_head(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    terms = Terms(texts, Asked.of(before), config or DataConfig())
    head: dict[str, Any] = {INDEXED: True} | ({"texts": texts.head()} if texts is not None else {})
    head |= {"kind": before["kind"]} if "kind" in before else {}
    try:
        head = write_manifest(
            folder,
            name or folder.resolve().name,
            measure=measured,
            head=head,
            left_out=lambda shard, key, error: lost.append(_problem(shard, key, error)),
        )
    except NothingUsable as error:
        raise ShardError(f"{error}. {HOW}" if texts is None else str(error)) from None
    lines = [json.dumps(problem.line(LEFT_OUT)) + "\n" for problem in lost]
    if lines:
        write_text(folder / SKIPPED, "".join(lines))
    return head


HOW = (
    "Where a record's JSON is another tool's, say where its texts are: --caption-from txt for a member, --caption-from "
    "json:caption for a field; or --question-from and --answer-from"
)
