"""Cells of a user's own table -> values of the fields of a record (own_columns.py says which field)."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from data_prep.sources.own_boxes import Boxes, labelled_boxes, of_text
from data_prep.sources.own_shapes import not_read
from data_prep.sources.references import File, Inline, Media, Stored, Url, column_media
from molmo2_nemo.data.json_values import Fault, FieldError, is_number, show, without_nulls
from molmo2_nemo.data.record import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from molmo2_nemo.errors import DataError

MEDIA = ("image", "images", "video", "videos", "file")
CHATS = ("messages", "conversations")
LISTS = ("images", "videos", "options", *CHATS, "annotations", "variants", "variant_weights", "points")
JSON_TEXTS = (*LISTS, "clip", "sampling", "subtitles", "answer", "boxes", "label")  # may be JSON in the cell of a CSV
NUMBERS = ("weight", "weight_factor", "start", "end", "answer_idx", "point_scale", "width", "height")
PLACED = ("label", "points", "point_scale", "width", "height")
UNIT = ("point_scale", "width", "height")  # of points and boxes
ALONE = (
    "caption",
    "answer",
    "options",
    "text",
    *CHATS,
    "annotations",
    "variants",
    "points",
)  # learned from as they are
NOTHING = ("nan", "null", "<na>", "#n/a")  # what pandas, databases and spreadsheets write into an empty cell of a CSV
LETTER = re.compile(r"^\(?([A-Za-z])[).:]?$")


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing; Parquet files of pandas have NaN for that."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def taken_as_word(column: str, word: str) -> str:
    """What the summary says of a cell with a word that other programs write for nothing (NOTHING)."""
    return f"{column} is {word.strip()!r}, taken for the word; empty cells are left out"


def cell_value(name: str, value: Any) -> Any:
    """The value of the field `name` in a cell that is not empty.

    Raises:
        FieldError: none that the field can have.
    """
    if isinstance(value, str):
        value = _of_text(value, name)
    if name == "key" and is_number(value):
        return str(value)
    if name == "boxes" and isinstance(value, str):
        value = of_text(value)
    if name in CHATS and isinstance(value, dict):
        value = _turns(value)
    if name in LISTS and not isinstance(value, list):
        raise FieldError.wrong(name, "a list (in a CSV, as JSON)", value)
    if name in MEDIA:
        return _media(value, name)
    if isinstance(value, dict):
        return without_nulls(value)
    return without_nulls({name: value})[name] if isinstance(value, list) else value


def _turns(value: dict[str, Any]) -> Any:
    """Messages that are stored as an object of lists, as Hugging Face's Sequence is."""
    if not value or not all(isinstance(column, list) for column in value.values()):
        return value
    if len({len(column) for column in value.values()}) != 1:
        return value
    return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]


def _of_text(text: str, name: str) -> Any:
    """The value of a cell that is a text."""
    if name in JSON_TEXTS and text.lstrip().startswith(("[", "{")):
        try:
            return json.loads(text)
        except ValueError:
            if name in LISTS:
                raise FieldError.wrong(name, "a JSON list", text) from None
    if name not in NUMBERS:
        return text
    try:
        value = float(text)
    except ValueError:
        raise FieldError.wrong(name, "a number", text) from None
    return int(value) if value.is_integer() else value


def _media(value: Any, name: str) -> Any:
    """A path as it is, other forms of a medium as a reference to it."""
    if isinstance(value, list):
        return [_media(one, f"{name}[{i}]") for i, one in enumerate(value)]
    if isinstance(value, (str, Stored)):
        return value
    try:
        made: Media = column_media(value)
    except DataError:
        raise FieldError.wrong(name, "a path, or the medium itself", value) from None
    if isinstance(made, Url):
        return made.url
    return made.paths[0] if isinstance(made, File) else made


def as_record(found: dict[str, Any], style: str, box_format: str, notes: list[str]) -> dict[str, Any]:
    """The fields of a row as those of a record: files told apart, a clip of start and end, options and points as an
    annotation, which `style` may name, boxes as an annotation for each label.

    Raises:
        FieldError: fields that do not belong together.
    """
    if "file" in found:
        file = found.pop("file")
        found[_kind(file)] = file
    if "start" in found or "end" in found:
        found["clip"] = _span(found)
    context = found.pop("context", None)
    if context is not None and "question" in found:
        found["question"] = f"{found['question']}\n{context}"
    if "boxes" in found:
        _place_boxes(found, style, box_format, notes)
    elif "label" in found and "points" not in found:
        _without_boxes(found, notes)
    annotation = _annotation(found, style)
    return found | {"annotations": [*found.get("annotations", ()), annotation]} if annotation else found


def _place_boxes(found: dict[str, Any], style: str, box_format: str, notes: list[str]) -> None:
    """Put an annotation of points for each label in place of boxes and their labels."""
    given = found.pop("boxes")
    boxes = labelled_boxes(given, found.pop("label", None), box_format, notes)
    if not boxes and not set(ALONE) & set(found):
        raise nothing_of("boxes", given)
    unit = {name: found.pop(name) for name in UNIT if name in found}
    before = list(found.get("annotations", ()))
    found["boxes"] = Boxes({len(before) + i: one for i, one in enumerate(boxes.values())})
    found["annotations"] = before + [
        {"style": style or "pointing", "label": label, "points": [box.centre for box in one], **unit}
        for label, one in boxes.items()
    ]


def _without_boxes(found: dict[str, Any], notes: list[str]) -> None:
    """Take a label out, with what belongs to it, of a row that has neither boxes nor points."""
    if not set(ALONE) & set(found):
        raise FieldError.missing("boxes", f"boxes or points of {show(found['label'])}, [] where there are none")
    notes += [not_read(name) for name in ("label", *UNIT) if found.pop(name, None) is not None]


def nothing_of(name: str, seen: Any) -> FieldError:
    """The error of no boxes without a word of what there is none of."""
    expected = "boxes, or a label beside it that says what there is none of"
    return FieldError(Fault(name, show(seen), expected), f"is {show(seen)}: expected {expected}")


def _kind(value: Any) -> str:
    """Whether a file is an image or a video, by its ending."""
    name = value.suffix or "" if isinstance(value, (Inline, Stored)) else str(value)
    suffix = name.rpartition(".")[2].lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix not in VIDEO_SUFFIXES:
        raise FieldError.wrong("file", "the name of an image or a video", value)
    return "video"


def _span(found: dict[str, Any]) -> list[float]:
    """Start and end, taken out, as a clip."""
    for name in ("start", "end"):
        if name not in found:
            raise FieldError.missing(name, "start and end of a clip, seconds")
    return [found.pop("start"), found.pop("end")]


def _annotation(found: dict[str, Any], style: str) -> dict[str, Any]:
    """The fields, taken out, that make one annotation in the full form; {} where the short forms say all."""

    def taken(*names: str) -> dict[str, Any]:
        return {name: found.pop(name) for name in names if name in found}

    if "options" in found:
        default = "video_multiple_choice" if "video" in found or "videos" in found else "a_okvqa_mc"
        return _choice({"style": style or default, **taken("question", "answer", "options", "answer_idx")})
    if "points" in found:
        return {"style": style or "pointing", **taken(*PLACED)}
    if style and "question" in found:
        return {"style": style, **taken("question", "answer")}
    return {"style": style, "text": found.pop("caption")} if style and "caption" in found else {}


def _choice(made: dict[str, Any]) -> dict[str, Any]:
    """A multiple choice whose answer is an index: of one of the options, or of a letter.

    Raises:
        FieldError: the answer is neither, or a number, which may count from 0 or from 1.
    """
    options = [str(option) for option in made["options"]]
    if "answer_idx" in made:
        return {**made, "options": options}
    answer = str(made.pop("answer", ""))
    letter = LETTER.match(answer.strip())
    index = ord(letter[1].upper()) - ord("A") if letter is not None else len(options)
    if answer in options:
        index = options.index(answer)
    elif index >= len(options):
        expected = "one of the options or its letter (a column of numbers from 0 is answer_idx)"
        raise FieldError(Fault("answer", show(answer), expected), f"is {show(answer)}, not {expected}")
    return {**made, "options": options, "answer_idx": index}
