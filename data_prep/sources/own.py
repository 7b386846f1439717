"""A user's own data: a JSONL file that names images and videos.

One line is one record. The short forms

    {"image": "cat.jpg", "caption": "A cat looks into the camera."}
    {"image": "cat.jpg", "question": "Which animal is this?", "answer": "a cat"}
    {"video": "clip.mp4", "question": "What happens?", "answer": "A rabbit yawns."}
    {"messages": ["What is 2 + 2?", "4"]}
    {"text": "A document, of which every token is scored."}

are equivalent to the full form, whose `annotations` share one visual input (a message tree):

    {"images": ["a.jpg", "b.png"], "annotations": [{"style": "user_qa", "question": "...", "answer": "..."}, ...]}

Besides `annotations`: `key`, `video`, `subtitles`, `clip`, `sampling`, `weight`, `variants`. Paths are relative to the
JSONL file's folder, or to --source; https addresses are fetched. A field that is null counts as left out. Common shapes
of other projects are converted (own_shapes.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.sources.base import (
    OWN,
    Context,
    File,
    Inline,
    Manual,
    Media,
    Place,
    Row,
    Sample,
    Skip,
    Source,
    Stored,
    Table,
    Url,
    unit_of,
)
from data_prep.sources.own_boxes import Boxes
from data_prep.sources.own_cells import ALONE, UNIT, nothing_of
from data_prep.sources.own_columns import Columns
from data_prep.sources.own_shapes import inline_medium, not_read, plain_answers, plain_entry
from molmo2_nemo.data.json_values import Fault, FieldError, is_number, show
from molmo2_nemo.data.meant import ANNOTATION_FIELDS
from molmo2_nemo.data.record import IMAGE_SUFFIXES, VIDEO_SUFFIXES, BadRecord, load_json
from molmo2_nemo.data.styles import RAW_TEXT

KNOWN = {
    *("key", "image", "images", "video", "caption", "question", "answer", "messages", "annotations", "variants"),
    *("variant_weights", "subtitles", "clip", "sampling", "weight", "weight_factor"),
}
SAID = KNOWN | {"text", "conversations", "videos", "id"}  # with what becomes one of these
NOT_BESIDE_TEXT = {"image", "images", "video", "caption", "question", "answer", "messages", "annotations", "variants"}
SUBTITLE_FIELDS = ("start", "end", "text")
SAME_ID = "an id that comes twice, told apart by the line's number"
BOXES = ("box", "boxes", "bbox", "bboxes")
SUBTITLE_SUFFIXES = (".srt", ".vtt", ".ass", ".ssa", ".json")  # of files; molmo2_nemo/data/subtitle_files.py
SHORT = ("caption", "question", "answer", "messages")


def own_source(path: Path, name: str, columns: Columns | None = None, files: Sequence[Path] = ()) -> Source:
    """The source of one file, or of one folder.

    Args:
        files: that the rows of a folder are in.
        columns: what its columns are; None where its lines have our fields.
    """
    return Source(
        name=name,
        mixes={},
        kind=OWN,
        origin=Manual(f"your own file {path.name}", (Table(path.name),)),
        licence="yours",
        fields={"line": int},
        records=partial(records, file=files[0].name if len(files) == 1 else path.name, columns=columns),
        notes=f"from {path.name}",
    )


def records(
    rows: Iterable[Row], ctx: Context, file: str = "", columns: Columns | None = None
) -> Iterator[Sample | Skip]:
    """Samples of rows {"line": number} with `content`, a line of JSON, or `entry`, an object; `notes` are counted.

    What cannot be read has a `fault` instead, and may have a `reason`, and a `name` of its own; `unit` says what `line`
    is the number of. Rows of several files have `file`, and a `key` for a record without one of its own.
    """
    seen: set[int] = set()
    for row in rows:
        where = row.get("file", file)
        unit = row.get("unit", unit_of(where))
        name = row.get("name", f"{unit} {row['line']}")
        place = Place(where, row["line"], {} if columns is None else columns.names(), _mark(row), row.get("unit", ""))
        try:
            if "fault" in row:
                raise FieldError(row["fault"], f"holds {row['fault'].seen}, not {row['fault'].expected}")
            entry = row["entry"] if "entry" in row else load_json(name, {"json": row["content"]})
            notes, made = list(row.get("notes", ())), entry
            if columns is not None:
                of_row = columns.of_row(entry, notes)
                place = replace(place, names=of_row.names()) if of_row is not columns else place
                made = of_row.entry(entry, notes)
            plain = row.get("key", f"{row['line']:08d}")
            sample = entry_sample(made, plain, place)
            own_key = "key" in entry or (columns is not None and "key" in columns.mapped)
            if not own_key and sample.key != plain:
                sample = _told_apart(sample, seen, str(row.get("apart", row["line"])), notes)
            yield replace(sample, notes=(*notes, *sample.notes)) if notes else sample
        except BadRecord as error:
            detail = error.detail.removeprefix(".json ")
            fault = error.fault or Fault("", detail, "one JSON object in a line")
            yield Skip(name, "bad line", detail, fault, place)
        except FieldError as error:
            detail = f"{place.of(error.fault.field)} {error.says}".lstrip()
            yield Skip(name, row.get("reason", "bad line"), detail, error.fault, place)


def _mark(row: Row) -> str:
    """What tells the content of a line of text from another; "" of tables that are not text."""
    content = row.get("content")
    if content is None:
        cells = row.get("entry", {})
        content = "\0".join(map(str, cells.values())).encode() if _is_text(cells) else None
    return "" if content is None else hashlib.blake2b(content.rstrip(b"\r\n"), digest_size=8).hexdigest()


def _is_text(cells: dict[str, Any]) -> bool:
    return all(isinstance(cell, str) for cell in cells.values())


def _told_apart(sample: Sample, seen: set[int], line: str, notes: list[str]) -> Sample:
    """The sample, with a key of its own where its `id`, which other projects repeat, has come before."""
    key = sample.key
    while hash(key) in seen:
        key = f"{key}-{line}"
    seen.add(hash(key))
    if key == sample.key:
        return sample
    notes.append(SAME_ID)
    return replace(sample, key=key)


def entry_sample(entry: dict[str, Any], key: str, place: Place | None = None) -> Sample:
    """The sample of one JSONL entry without nulls; `key` is used for entries without a key of their own.

    Raises:
        FieldError: the entry is invalid; the message says why.
    """
    notes: list[str] = []
    boxes = entry["boxes"] if isinstance(entry.get("boxes"), Boxes) else None
    entry = entry if boxes is None else {name: value for name, value in entry.items() if name != "boxes"}
    if boxes is None and set(BOXES) & set(entry):
        entry = _without_boxes(entry, notes)
    entry, chat = plain_entry(entry, KNOWN, notes)
    entry, document = _raw_text(entry)
    for name in entry:
        if name == "text" and (medium := next((one for one in ("image", "images", "video") if one in entry), None)):
            fault = Fault(name, show(entry[name]), "caption, the words about a medium (text is a document of its own)")
            raise FieldError(fault, f"stands beside {medium}: write {fault.expected}")
        if name not in KNOWN and name in ANNOTATION_FIELDS:
            fields = ", ".join(f'"{field}": ...' for field in dict.fromkeys(("style", name)))
            fault = Fault(name, show(entry[name]), f'"annotations": [{{{fields}}}]')
            raise FieldError(fault, f"is a field of an annotation: write {fault.expected}")
        if name not in KNOWN:
            raise FieldError.unknown(name, SAID, entry[name])
    key = entry.get("key", key)
    if not isinstance(key, str) or not key:
        raise FieldError.wrong("key", "a non-empty string", key)
    images = entry.get("image", entry.get("images", []))
    single, name = "image" in entry and not isinstance(images, list), "image" if "image" in entry else "images"
    if "image" in entry and "images" in entry:
        raise FieldError(Fault("images", show(entry["images"]), "image or images, not both"), "stands beside image")
    if not single and not isinstance(images, list):
        raise FieldError.wrong("images", "a list of paths (image is for a single one)", entry["images"])
    sampling = entry.get("sampling", {})
    if not isinstance(sampling, dict):
        raise FieldError.wrong("sampling", "an object", sampling)
    images, names = ([images], {"images[0]": "image"}) if single else (images, {"images": name} if images else {})
    media = len(images) + ("video" in entry)
    variants = [
        [_plain(a, notes, media, f"variants[{n}][{i}]") for i, a in enumerate(tree)]
        for n, tree in enumerate(_variants(entry))
    ]
    annotations, short = ([], {}) if variants else _annotations(entry, notes, chat, media)
    return Sample(
        key,
        annotations,
        images=[_medium(path, IMAGE_SUFFIXES, name if single else f"{name}[{i}]") for i, path in enumerate(images)],
        video=_medium(entry["video"], VIDEO_SUFFIXES, "video") if "video" in entry else None,
        clip=_clip(entry.get("clip")),
        subtitles=_subtitles(entry.get("subtitles", [])),
        sampling=sampling,
        weight=_number(entry, "weight"),
        weight_factor=_number(entry, "weight_factor"),
        variants=variants,
        variant_weights=entry.get("variant_weights"),
        place=None if place is None else place.inner(names | short | document),
        notes=tuple(notes),
        boxes=boxes,
    )


def _without_boxes(entry: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """An entry whose boxes are none: with a label, points of which there are none.

    Raises:
        FieldError: there are some, or nothing says what there is none of.
    """
    name = next((name for name in BOXES if name in entry and entry[name] != []), "")
    if name:
        expected = "a field that --map names: boxes: FIELD, and box_format: xywh, xyxy or cxcywh"
        fault = Fault(name, show(entry[name]), expected)
        raise FieldError(fault, f"is read through a map only: {expected} (docs/own_files.md)")
    name, label = next(name for name in BOXES if name in entry), entry.get("label")
    made = {field: value for field, value in entry.items() if field not in (*BOXES, "label", *UNIT)}
    if isinstance(label, str) and label and "variants" not in entry:
        none = {"style": "pointing", "label": label, "points": []}
        return made | {"annotations": [*entry.get("annotations", ()), none]}
    if not set(ALONE) & set(entry):
        raise nothing_of(name, [])
    notes += [not_read(field) for field in entry if field not in made]
    return made


def _raw_text(entry: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """An entry that is a document in the full form, with its own name of the text; any other entry as it is."""
    if "text" not in entry or NOT_BESIDE_TEXT & set(entry):
        return entry, {}
    made = {name: value for name, value in entry.items() if name != "text"}
    annotations = [{"style": RAW_TEXT, "text": entry["text"]}]
    return made | {"annotations": annotations}, {"annotations[0].text": "text"}


def _plain(annotation: dict[str, Any], notes: list[str], media: int, path: str) -> dict[str, Any]:
    try:
        return plain_answers(annotation, notes, media)
    except FieldError as error:
        raise error.inside(path) from None


def _annotations(
    entry: dict[str, Any], notes: list[str], chat: str, media: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The annotations, and the entry's own names of the fields that came from the short forms."""
    full = entry.get("annotations", [])
    if not isinstance(full, list):
        raise FieldError.wrong("annotations", "a list of objects", full)
    for i, annotation in enumerate(full):
        if not isinstance(annotation, dict):
            raise FieldError.wrong(f"annotations[{i}]", "an object", annotation)
    full = list(full)
    names: dict[str, str] = {}
    if "caption" in entry:
        names[f"annotations[{len(full)}].text"] = "caption"
        full.append({"style": "video_long_caption" if "video" in entry else "long_caption", "text": entry["caption"]})
    if ("question" in entry) != ("answer" in entry):
        lacking, there = ("answer", "question") if "question" in entry else ("question", "answer")
        fault = Fault(lacking, "nothing", f"the {lacking} that belongs to {there}")
        raise FieldError(fault, "is missing: question and answer belong together")
    if "question" in entry:
        where = f"annotations[{len(full)}]"
        names |= {f"{where}.question": "question", f"{where}.answer": "answer", f"{where}.answers": "answer"}
        full.append({"style": "user_qa", "question": entry["question"], "answer": entry["answer"]})
    if "messages" in entry:
        names[f"annotations[{len(full)}].messages"] = chat
        full.append({"style": "text_sft", "messages": entry["messages"]})
    if not full:
        expected = "caption, question and answer, messages, or annotations"
        raise FieldError(
            Fault("annotations", "nothing", expected), f"are missing: nothing to train on; give {expected}"
        )
    try:
        return [_plain(annotation, notes, media, f"annotations[{i}]") for i, annotation in enumerate(full)], names
    except FieldError as error:
        field = Place("", 0, names).of(error.fault.field)
        raise FieldError(replace(error.fault, field=field), error.says) from None


def _variants(entry: dict[str, Any]) -> list[list[dict[str, Any]]]:
    variants = entry.get("variants", [])
    ok = isinstance(variants, list) and all(
        isinstance(tree, list) and all(isinstance(annotation, dict) for annotation in tree) for tree in variants
    )
    if not ok:
        raise FieldError.wrong("variants", "a list of lists of annotations", variants)
    beside = [name for name in ("annotations", *SHORT) if name in entry]
    if variants and beside:
        fault = Fault(beside[0], show(entry[beside[0]]), "nothing beside variants")
        raise FieldError(fault, "stands beside variants, which replace annotations, caption, question and messages")
    return variants


def _medium(path: Any, allowed: frozenset[str], field: str) -> Media:
    if isinstance(path, (Inline, Stored)):  # of a table that holds the media themselves
        return path
    if not isinstance(path, str) or not path:
        raise FieldError.wrong(field, "a path, a string", path)
    if (inline := inline_medium(path, field)) is not None:
        return inline
    if "://" in path:
        if not path.startswith("https://"):
            raise FieldError(
                Fault(field, show(path), "an https address, or a path"), f"is {path}: only https addresses are fetched"
            )
        return Url(path)
    suffix = PurePosixPath(path).suffix.lower().lstrip(".")
    if suffix not in allowed:
        kinds = ", ".join(sorted(allowed))
        if suffix in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
            other, name = ("an image", "image") if suffix in IMAGE_SUFFIXES else ("a video", "video")
            raise FieldError(Fault(field, show(path), f"{name}: {path}"), f"is {path}: {other} is named as {name}")
        fault = Fault(field, show(path), f"a name that ends in one of {kinds}")
        raise FieldError(fault, f"is {path}: the suffix {suffix!r} is not one of {kinds}")
    return File(path)


def _clip(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(is_number(v) for v in value):
        raise FieldError.wrong("clip", "[start, end] in seconds", value)
    return float(value[0]), float(value[1])


def _subtitles(value: Any) -> list[tuple[float, float, str]] | str | File | Url:
    if isinstance(value, str):
        if not value.lower().endswith(SUBTITLE_SUFFIXES) or len(value.strip().splitlines()) != 1:
            return value
        return Url(value) if value.startswith("https://") else File(value)
    lines = value if isinstance(value, list) else [value]
    for i, line in enumerate(lines):
        ok = isinstance(line, dict) and is_number(line.get("start")) and is_number(line.get("end"))
        if not ok or not isinstance(line.get("text"), str):
            raise FieldError.wrong(f"subtitles[{i}]", "{start, end, text} in seconds of the video", line)
        for name in line:
            if name not in SUBTITLE_FIELDS:
                raise FieldError.unknown(f"subtitles[{i}].{name}", SUBTITLE_FIELDS, line[name])
    return [(float(line["start"]), float(line["end"]), line["text"]) for line in lines]


def _number(entry: dict[str, Any], name: str) -> float | None:
    value = entry.get(name)
    if value is not None and not is_number(value):
        raise FieldError.wrong(name, "a number", value)
    return None if value is None else float(value)
