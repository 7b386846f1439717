"""The record: one visual input and its annotations, stored as one group of shard members.

A record is the member `<key>.json` and the media members it names by suffix (`<key>.0.jpg`, `<key>.mp4`). Nothing here
decodes media or executes anything: JSON is parsed strictly, members are looked up by name, and members that could carry
code (pickles and their relatives) make the record unreadable.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from molmo2_nemo.data.annotation_json import read_annotation
from molmo2_nemo.data.annotations import Alternatives, Annotation
from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.json_values import Fault, FieldError, is_number, show, without_nulls
from molmo2_nemo.data.raw_text import RawText, alone
from molmo2_nemo.errors import DataError

IMAGE_SUFFIXES = frozenset(
    {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jp2", "j2k", "jpf", "jpx", "ppm", "pgm", "pbm"}
)
VIDEO_SUFFIXES = frozenset(
    {"mp4", "m4v", "webm", "mkv", "mov", "avi", "mpg", "mpeg", "ts", "flv", "wmv", "ogv", "3gp", "gif"}
    | {"vob", "m2ts", "mts", "asf", "f4v", "3g2"}
)
# Suffixes whose contents common loaders would unpickle or import.
UNSAFE_SUFFIXES = frozenset({"pkl", "pickle", "pyd", "pt", "pth", "ckpt", "joblib", "dill", "npy", "npz", "so", "py"})

RECORD_KEYS = frozenset(
    {
        *("images", "video", "subtitles", "clip", "sampling", "weight", "weight_factor"),
        *("annotations", "variants", "variant_weights", "media_from"),
    }
)


Tree = list[Annotation | Alternatives]


class BadRecord(DataError):
    """One record cannot be used. `cause` is a short, countable reason; `key` is "shard:key"; `fault` names the field,
    where one is at fault, and `member` the suffix of the file, where it is not the JSON."""

    def __init__(self, key: str, cause: str, detail: str, fault: Fault | None = None, member: str = "json"):
        super().__init__(f"record {key}: {detail}")
        self.key, self.cause, self.detail, self.fault, self.member = key, cause, detail, fault, member

    def __reduce__(self):  # keeps the arguments when the error crosses a process boundary
        return type(self), (self.key, self.cause, self.detail, self.fault, self.member)


@dataclass(slots=True)
class Subtitle:
    """One subtitle line; seconds from the start of the clip."""

    start: float
    end: float
    text: str


@dataclass(slots=True)
class Record:
    """Parsed and checked content of one record. Media stay encoded."""

    key: str  # "shard:key", for messages
    images: list[bytes] = field(default_factory=list)
    video: bytes | None = None
    subtitles: list[Subtitle] | str = field(default_factory=list)  # lines with times, or one text shown as it is
    annotations: Tree = field(default_factory=list)  # the branches of one message tree
    variants: list[Tree] = field(default_factory=list)  # in place of `annotations`: every access draws one of these
    variant_weights: list[float] | None = None  # relative probability of each variant; None: equal
    clip: tuple[float, float] | None = None  # seconds of the video
    sampling: dict[str, Any] = field(default_factory=dict)  # overrides of frame sampling
    weight: float | None = None  # flat loss weight of every answer
    weight_factor: float | None = None  # alternatively, a factor on the generic weights


def parse_record(key: str, members: Mapping[str, bytes], *, max_json_bytes: int = LimitsConfig.json_bytes) -> Record:
    """Check and assemble one record.

    Args:
        key: "shard:key", used in messages.
        members: suffix (lower case, without the leading dot) -> bytes of every member of the group.
        max_json_bytes: `data.limits.json_bytes`.
    Raises:
        BadRecord: with `cause` one of `unsafe member`, `no json`, `bad json`, `bad record`, `missing member`.
    """
    for suffix in members:
        if suffix.rsplit(".", 1)[-1] in UNSAFE_SUFFIXES:
            says = f"member .{suffix} may carry code and is refused; store media and JSON only"
            raise BadRecord(key, "unsafe member", says, Fault("", f".{suffix}", "media and JSON only"), suffix)
    data = load_json(key, members, max_bytes=max_json_bytes)
    unknown = sorted(set(data) - RECORD_KEYS)
    if unknown:
        says = f"unknown field {unknown[0]!r}; known are {', '.join(sorted(RECORD_KEYS))}"
        raise BadRecord(key, "bad record", says, FieldError.unknown(unknown[0], RECORD_KEYS, data[unknown[0]]).fault)
    names = _string_list(key, data.get("images", []), "images")
    video = data.get("video")
    if video is not None and not isinstance(video, str):
        raise _bad(key, FieldError.wrong("video", "the suffix of a member such as 'mp4'", video))
    if names and video is not None:
        raise BadRecord(key, "bad record", "a record holds either images or one video; this one names both")
    weight, factor = _weight(key, data, "weight"), _weight(key, data, "weight_factor")
    if weight is not None and factor is not None:
        raise BadRecord(key, "bad record", "give either weight or weight_factor, not both")
    sampling = data.get("sampling", {})
    if not isinstance(sampling, dict):
        raise _bad(key, FieldError.wrong("sampling", "an object", sampling))
    variants, weights = _variants(key, data, len(names), video is not None)
    return Record(
        key=key,
        images=[_media(key, members, name, "image", IMAGE_SUFFIXES) for name in names],
        video=None if video is None else _media(key, members, video, "video", VIDEO_SUFFIXES),
        subtitles=_subtitles(key, data.get("subtitles", [])),
        annotations=[] if variants else read_tree(key, data.get("annotations"), len(names), video is not None),
        variants=variants,
        variant_weights=weights,
        clip=_clip(key, data.get("clip")),
        sampling=sampling,
        weight=weight,
        weight_factor=factor,
    )


def load_json(key: str, members: Mapping[str, bytes], *, max_bytes: int = LimitsConfig.json_bytes) -> dict[str, Any]:
    """The object in the `json` member: UTF-8, no NaN or Infinity, no duplicate names, bounded size and depth.

    Fields that are null count as left out, at every depth.
    """
    raw = members.get("json")
    if raw is None:
        seen = ", ".join("." + s for s in sorted(members)[:8]) or "nothing"
        raise BadRecord(key, "no json", f"has no .json member (it holds {seen})", Fault("", seen, "a .json member"))
    if len(raw) > max_bytes:
        raise BadRecord(
            key, "bad json", f".json is {len(raw)} bytes, more than the {max_bytes} allowed (data.limits.json_bytes)"
        )
    try:
        data = json.loads(raw.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        fault = Fault("", show(raw[max(error.start - 20, 0) : error.start + 1]), "UTF-8")
        raise BadRecord(key, "bad json", f".json is not UTF-8 (byte {error.start}){other_code(raw)}", fault) from None
    except RecursionError:
        fault = Fault("", show(raw[:60].decode("utf-8", "replace")), "lists and objects inside each other, not so many")
        raise BadRecord(key, "bad json", ".json is nested too deeply", fault) from None
    except ValueError as error:
        slip = _slip(raw, str(error))
        raise BadRecord(key, "bad json", f".json cannot be parsed: {_parsing(error)}{slip}", _fault(error)) from None
    if not isinstance(data, dict):
        hint = "; a file that is one list of records is named .json" if isinstance(data, list) else ""
        fault = Fault("", show(data), "one JSON object")
        raise BadRecord(key, "bad json", f".json must hold an object, not {show(data)}{hint}", fault)
    try:
        return without_nulls(data) if b"null" in raw else data
    except FieldError as error:
        raise _bad(key, error) from None


def other_code(raw: bytes) -> str:
    """What bytes that are not UTF-8 may be instead."""
    if raw[:2] == b"\x1f\x8b":
        return "; it is packed by gzip: let its name end in .gz"
    if raw[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "; it may be UTF-32: iconv -f UTF-32 -t UTF-8"
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:4]:
        return "; it may be UTF-16: iconv -f UTF-16 -t UTF-8"
    return "; it may be Latin-1: iconv -f LATIN1 -t UTF-8"


def _parsing(error: ValueError) -> str:
    """The error about JSON, which is one line as a rule: the parser's own counts lines too."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
    return str(error) if isinstance(error, DataError) else "a whole number of more digits than are read (4300)"


def _fault(error: ValueError) -> Fault:
    """What stands where JSON cannot be parsed."""
    if not isinstance(error, json.JSONDecodeError):
        return Fault("", _parsing(error), "one JSON object")
    there = error.doc[error.pos :][:20].rstrip()
    seen = f"{show(there)} after {show(error.doc[: error.pos][-20:])}" if there else "the end of the text"
    return Fault("", seen, "one JSON object")


def _slip(raw: bytes, error: str) -> str:
    """What may be wrong with JSON that cannot be parsed."""
    if raw.strip() in (b"{", b"["):
        return "; a record must be in one line, or the file one JSON list named .json"
    if "Extra data" in error:
        return "; two records in one line, or lines that do not end in \\n?"
    return "; a comma before a closing bracket?" if re.search(rb",\s*[}\]]", raw) else ""


def _bad(key: str, error: FieldError, where: str = "") -> BadRecord:
    """The record's error for that of a field; `where` comes before the message."""
    return BadRecord(key, "bad record", f"{where}{error}", error.fault)


def _no_constant(name: str) -> float:
    raise DataError(f"{name} is not a JSON number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise DataError(f"the name {next(n for n in names if names.count(n) > 1)!r} appears twice in one object")
    return result


def _weight(key: str, data: dict[str, Any], name: str) -> float | None:
    value = data.get(name)
    if value is not None and not (is_number(value) and value >= 0):
        raise _bad(key, FieldError.wrong(name, "a finite number >= 0", value))
    return None if value is None else float(value)


def _string_list(key: str, value: Any, what: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise _bad(key, FieldError.wrong(what, "a list of strings", value))
    return value


def _media(key: str, members: Mapping[str, bytes], suffix: str, what: str, allowed: frozenset[str]) -> bytes:
    name = suffix.lower()
    if name.rsplit(".", 1)[-1] not in allowed:
        kinds = ", ".join(sorted(allowed))
        raise BadRecord(key, "bad record", f"{what} member .{show(suffix)[1:-1]} is of no known type ({kinds})")
    data = members.get(name)
    if data is None:
        seen = ", ".join("." + s for s in sorted(members)[:8])
        says = f"its {what} .{suffix} is missing from the shard (it holds {seen})"
        raise BadRecord(key, "missing member", says, Fault(_naming(what), seen, f"a member .{suffix}"), name)
    if not data:
        says = f"its {what} .{suffix} is empty (0 bytes)"
        raise BadRecord(key, "missing member", says, Fault(_naming(what), "0 bytes", f"an encoded {what}"), name)
    return data


def _naming(what: str) -> str:
    """The field that names an image or a video."""
    return "images" if what == "image" else what


def _subtitles(key: str, value: Any) -> list[Subtitle] | str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _bad(key, FieldError.wrong("subtitles", "a list or a text", value))
    lines = []
    for i, line in enumerate(value):
        ok = isinstance(line, dict) and isinstance(line.get("text"), str)
        if not ok or not is_number(line.get("start")) or not is_number(line.get("end")):
            raise _bad(key, FieldError.wrong(f"subtitles[{i}]", "{start, end, text}", line))
        if not 0 <= line["start"] <= line["end"]:
            times = f"{line['start']} - {line['end']}"
            fault = Fault(f"subtitles[{i}]", times, "0 <= start <= end")
            raise _bad(key, FieldError(fault, f"must have 0 <= start <= end, not {times}"))
        lines.append(Subtitle(float(line["start"]), float(line["end"]), line["text"]))
    return lines


def _clip(key: str, value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(is_number(v) for v in value):
        raise _bad(key, FieldError.wrong("clip", "[start, end] in seconds", value))
    if not 0 <= value[0] < value[1]:
        raise _bad(key, FieldError.wrong("clip", "[start, end] with 0 <= start < end", value))
    return float(value[0]), float(value[1])


def _variants(
    key: str, data: dict[str, Any], num_images: int, has_video: bool
) -> tuple[list[Tree], list[float] | None]:
    value, weights = data.get("variants"), data.get("variant_weights")
    if value is None:
        if weights is not None:
            raise BadRecord(key, "bad record", "variant_weights without variants")
        return [], None
    if not isinstance(value, list) or not value or "annotations" in data:
        raise _bad(key, FieldError.wrong("variants", "a list of lists of annotations, in place of annotations", value))
    if weights is not None:
        ok = isinstance(weights, list) and len(weights) == len(value) and all(is_number(w) and w >= 0 for w in weights)
        if not ok or not 0 < sum(weights) < math.inf:
            expected = f"{len(value)} numbers >= 0, not all 0, with a finite sum"
            raise _bad(key, FieldError.wrong("variant_weights", expected, weights))
        weights = [float(w) for w in weights]
    trees = [read_tree(key, tree, num_images, has_video, f"variants[{n}]") for n, tree in enumerate(value)]
    return trees, weights


def _is_raw(annotation: Annotation | Alternatives) -> bool:
    """Whether an annotation is a document. One among alternatives has been refused."""
    return isinstance(annotation, Annotation) and isinstance(annotation.content, RawText)


def read_tree(key: str, value: Any, num_images: int, has_video: bool, path: str = "annotations") -> Tree:
    """The annotations of a record with `num_images` images, or a video, from their JSON at `path`.

    Raises:
        BadRecord: one cannot be read; its `fault` names the field.
    """
    if not isinstance(value, list) or not value:
        raise _bad(key, FieldError.wrong(path, "a list with at least one entry", value))
    tree: Tree = []
    for i, fields in enumerate(value):
        where = f"annotation {i}"
        if not isinstance(fields, dict) or not isinstance(fields.get("style"), str):
            raise BadRecord(
                key,
                "bad record",
                f"{where} must be an object with a style, not {show(fields)}",
                Fault(f"{path}[{i}]", show(fields), "an object with a style"),
            )
        try:
            read = read_annotation(fields, num_images, has_video)
            if _is_raw(read) and (path != "annotations" or len(value) > 1 or num_images or has_video):
                raise alone()
            tree.append(read)
        except FieldError as error:
            fault = error.inside(f"{path}[{i}]").fault
            raise BadRecord(key, "bad record", f"{where} ({fields['style']}): {error}", fault) from None
    return tree
