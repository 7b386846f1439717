"""A user's own data: a JSONL file that names images and videos.

One line is one record. The short forms

    {"image": "cat.jpg", "caption": "A cat looks into the camera."}
    {"image": "cat.jpg", "question": "Which animal is this?", "answer": "a cat"}
    {"video": "clip.mp4", "question": "What happens?", "answer": "A rabbit yawns."}
    {"messages": ["What is 2 + 2?", "4"]}

are equivalent to the full form, whose `annotations` share one visual input (a message tree):

    {"images": ["a.jpg", "b.png"], "annotations": [{"style": "user_qa", "question": "...", "answer": "..."}, ...]}

Besides `annotations`: `key`, `video`, `subtitles`, `clip`, `sampling`, `weight`, `variants`. Paths are relative to the
JSONL file's folder, or to --source; https addresses are fetched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.sources.base import Context, File, Manual, Media, Row, Sample, Skip, Source, Table, Url
from molmo2_nemo.data.json_values import is_number
from molmo2_nemo.data.record import IMAGE_SUFFIXES, VIDEO_SUFFIXES, BadRecord, load_json
from molmo2_nemo.errors import DataError

KNOWN = {
    *("key", "image", "images", "video", "caption", "question", "answer", "messages", "annotations", "variants"),
    *("variant_weights", "subtitles", "clip", "sampling", "weight", "weight_factor"),
}


def own_source(path: Path, name: str) -> Source:
    """The source of one JSONL file."""
    return Source(
        name=name,
        mixes={},
        kind="own data",
        origin=Manual(f"your own file {path.name}", (Table(path.name),)),
        licence="yours",
        fields={"line": int, "content": bytes},
        records=records,
        notes=f"from {path.name}",
    )


def read_lines(path: Path) -> Iterator[Row]:
    """The non-empty lines, unparsed, so that a malformed line does not affect the others."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield {"line": number, "content": line.removeprefix(b"\xef\xbb\xbf")}


def records(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    for row in rows:
        place = f"line {row['line']}"
        try:
            yield entry_sample(load_json(place, {"json": row["content"]}), f"{row['line']:08d}")
        except BadRecord as error:
            yield Skip(place, "bad line", error.detail.removeprefix(".json "))
        except DataError as error:
            yield Skip(place, "bad line", str(error))


def entry_sample(entry: dict[str, Any], key: str) -> Sample:
    """The sample of one JSONL entry; `key` is used for entries without a key of their own.

    Raises:
        DataError: the entry is invalid; the message says why.
    """
    unknown = sorted(set(entry) - KNOWN)
    if unknown:
        raise DataError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(KNOWN))}")
    key = entry.get("key", key)
    if not isinstance(key, str) or not key:
        raise DataError(f"key must be a non-empty string, not {key!r}")
    images = entry.get("images", [entry["image"]] if "image" in entry else [])
    if not isinstance(images, list) or ("image" in entry and "images" in entry):
        raise DataError(f"images must be a list of paths (image is for a single one), not {images!r}")
    sampling = entry.get("sampling", {})
    if not isinstance(sampling, dict):
        raise DataError(f"sampling must be an object, not {sampling!r}")
    variants = _variants(entry)
    return Sample(
        key,
        () if variants else _annotations(entry),
        images=[_medium(path, IMAGE_SUFFIXES) for path in images],
        video=_medium(entry["video"], VIDEO_SUFFIXES) if "video" in entry else None,
        clip=_clip(entry.get("clip")),
        subtitles=_subtitles(entry.get("subtitles", [])),
        sampling=sampling,
        weight=_number(entry, "weight"),
        weight_factor=_number(entry, "weight_factor"),
        variants=variants,
        variant_weights=entry.get("variant_weights"),
    )


def _annotations(entry: dict[str, Any]) -> list[dict[str, Any]]:
    full = entry.get("annotations", [])
    if not isinstance(full, list) or not all(isinstance(annotation, dict) for annotation in full):
        raise DataError(f"annotations must be a list of objects, not {full!r}")
    full = list(full)
    if "caption" in entry:
        full.append({"style": "video_long_caption" if "video" in entry else "long_caption", "text": entry["caption"]})
    if ("question" in entry) != ("answer" in entry):
        raise DataError("question and answer belong together; one of them is missing")
    if "question" in entry:
        full.append({"style": "user_qa", "question": entry["question"], "answer": entry["answer"]})
    if "messages" in entry:
        full.append({"style": "text_sft", "messages": entry["messages"]})
    if not full:
        raise DataError("nothing to train on: give caption, question and answer, messages, or annotations")
    return full


def _variants(entry: dict[str, Any]) -> list[list[dict[str, Any]]]:
    variants = entry.get("variants", [])
    ok = isinstance(variants, list) and all(
        isinstance(tree, list) and all(isinstance(annotation, dict) for annotation in tree) for tree in variants
    )
    if not ok:
        raise DataError(f"variants must be a list of lists of annotations, not {variants!r}")
    if variants and any(name in entry for name in ("annotations", "caption", "question", "messages")):
        raise DataError("variants replace annotations, caption, question and messages; give only one of these")
    return variants


def _medium(path: Any, allowed: frozenset[str]) -> Media:
    if not isinstance(path, str) or not path:
        raise DataError(f"a path must be a string, not {path!r}")
    if "://" in path:
        if not path.startswith("https://"):
            raise DataError(f"{path}: only https addresses are fetched")
        return Url(path)
    suffix = PurePosixPath(path).suffix.lower().lstrip(".")
    if suffix not in allowed:
        raise DataError(f"{path}: the suffix {suffix!r} is not one of {', '.join(sorted(allowed))}")
    return File(path)


def _clip(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(is_number(v) for v in value):
        raise DataError(f"clip must be [start, end] in seconds, not {value!r}")
    return float(value[0]), float(value[1])


def _subtitles(value: Any) -> list[tuple[float, float, str]] | str:
    if isinstance(value, str):
        return value
    lines = value if isinstance(value, list) else [value]
    for i, line in enumerate(lines):
        ok = isinstance(line, dict) and is_number(line.get("start")) and is_number(line.get("end"))
        if not ok or not isinstance(line.get("text"), str):
            raise DataError(f"subtitle {i} must be {{start, end, text}} in seconds of the video, not {line!r}")
    return [(float(line["start"]), float(line["end"]), line["text"]) for line in lines]


def _number(entry: dict[str, Any], name: str) -> float | None:
    value = entry.get(name)
    if value is not None and not is_number(value):
        raise DataError(f"{name} must be a number, not {value!r}")
    return None if value is None else float(value)
