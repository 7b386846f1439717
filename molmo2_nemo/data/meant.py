"""What training would take, but nobody can have meant: unknown fields and styles, blank texts, options that come twice,
a task without its medium. `molmo2 prepare`, `molmo2 shards index` and `molmo2 shards check` ask; training does not, so
that shards written before keep loading.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from molmo2_nemo.data.annotations import (
    Annotation,
    Answer,
    Caption,
    Messages,
    MultipleChoice,
    Points,
    QuestionAnswer,
    TimedCaption,
    Tracks,
    TurnAnnotation,
    VideoPoints,
)
from molmo2_nemo.data.check import drawn_trees, pieces
from molmo2_nemo.data.json_values import Fault, FieldError, is_blank, is_number, show
from molmo2_nemo.data.prompts import POINT_MARK
from molmo2_nemo.data.raw_text import RawText
from molmo2_nemo.data.record import IMAGE_SUFFIXES, RECORD_KEYS, VIDEO_SUFFIXES, BadRecord, Record
from molmo2_nemo.data.styles import (
    DEMO_STYLES,
    MC_STYLES,
    NOT_ON_ONE_IMAGE,
    POINT_MODES,
    RAW_TEXT,
    TRACK_STYLES,
    Kind,
    asked_style,
    canonical_style,
)
from molmo2_nemo.data.unread import check_read, check_sampling_read
from molmo2_nemo.errors import UserError

T = TypeVar("T")

TEXTS = ("text", "answer", "answer_with_points", "question", "label")  # blank is nothing to train on
OTHER_TEXTS = ("prompt", "explanation", "label_cased", "object")  # blank is as left out
BOOLEANS = ("shuffle_options", "unlabelled_options")
MARK = re.compile(r"<(?:image|video)>")  # where other projects put a medium into a text
# Other ways of writing it, and the places of media in the texts of other models
MARKS = re.compile(
    r"</?(?:image|video)[ _-]?\d*\s*/?>|<\|(?:vision_(?:start|end)|(?:image|video)_pad|image)\|>", re.IGNORECASE
)
TIMING = re.compile(r"\d\d:\d\d[.,]\d+[ \t]*-->[ \t]*(?:\d+:)?\d\d:\d\d")  # of a subtitle file
MAX_WEIGHT = 1000.0  # one answer would drown those of hundreds of records beside it
PADDED = "answers with blanks or line breaks at their start or end, trained as written"
ELSEWHERE = {"caption": "text", "content": "text", "choices": "options", "query": "question", "response": "answer"}
FORM_FIELDS = frozenset(  # of one turn without alternatives
    {
        *("style", *TEXTS, "answers", "answer_annotations", "explanation", "label_cased", "object"),
        *("options", "answer_idx", "shuffle_options", "unlabelled_options"),
        *("points", "point_scale", "width", "height", "timestamps", "sampling_fps", "snap", "start", "end", "time"),
    }
)
TURN_FIELDS = FORM_FIELDS | {"either"}
WHOLE_FIELDS = FORM_FIELDS | {"messages", "turns", "prompt", "no_pointing"}
ANNOTATION_FIELDS = WHOLE_FIELDS | {"either"}
FRAME_FIELDS = frozenset({"time", "points", "frame"})
TRACKED_FIELDS = frozenset({"point", "occluded"})
INLINE_TEXTS = frozenset({"inline_text", "alt_text"})
INLINE_FIELDS = INLINE_TEXTS | {"points"}
SUBTITLE_FIELDS = frozenset({"start", "end", "text"})
SAMPLING_FIELDS = frozenset(
    {"mode", "frame_sample_mode", "candidate_sampling_fps", "sampling_fps", "max_fps", "max_frames"}
)
SAMPLING_MODES = ("uniform_last_frame", "fps")
SUBTITLE_FILES = (
    *(".srt", ".vtt", ".ass", ".ssa", ".sub", ".sbv", ".lrc", ".ttml", ".json", ".json3", ".jsonl"),
    *(".txt", ".xml", ".csv"),
    *(f".{suffix}" for suffix in sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES)),
)
NEVER_DRAWN = "variants of weight 0, never drawn"


def check_names(key: str, data: Mapping[str, Any]) -> None:
    """Check that every name in a record's JSON is known: its fields at every depth, and the keys of `sampling`.

    Args:
        data: the JSON of a record that `parse_record` has accepted, without nulls.
    Raises:
        BadRecord: one is not; the message has the nearest known name.
    """
    _raising(key, lambda: _names(data))


def check_meant(record: Record, data: Mapping[str, Any]) -> list[str]:
    """`check_names`; and styles are known, no text is blank, no option comes twice, each task has question and medium,
    and every field is read.

    Returns:
        Notes on fields that are not read, but may well stand there.
    Raises:
        BadRecord: something nobody can have meant; `fault` names the field.
    """
    return _raising(record.key, lambda: _everything(record, data))


def _raising(key: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except FieldError as error:
        raise BadRecord(key, "bad record", str(error), error.fault) from None


def _everything(record: Record, data: Mapping[str, Any]) -> list[str]:
    _names(data)
    _sampling(data.get("sampling", {}))
    _weights(data)
    _media_of_settings(record, data)
    for path, tree in _trees(data):
        for i, fields in enumerate(tree):
            _texts(fields, f"{path}[{i}]")
    for path, branches in drawn_trees(record):
        for where, annotation in pieces(branches, path):
            _task(record, annotation, where)
    check_sampling_read(data.get("sampling", {}))
    notes = {NEVER_DRAWN} if 0 in (record.variant_weights or ()) else set[str]()
    for path, tree in _trees(data):
        for i, fields in enumerate(tree):
            notes.update(check_read(fields, f"{path}[{i}]", len(record.images), record.video is not None))
            notes.update({PADDED} if _padded(fields) else ())
    return sorted(notes)


# --- names -----------------------------------------------------------------------------------------------------------


def _trees(data: Mapping[str, Any]) -> list[tuple[str, Sequence[dict[str, Any]]]]:
    if "variants" in data:
        return [(f"variants[{n}]", tree) for n, tree in enumerate(data["variants"])]
    return [("annotations", data["annotations"])]


def _names(data: Mapping[str, Any]) -> None:
    _known(data.get("sampling", {}), "sampling", SAMPLING_FIELDS)
    subtitles = data.get("subtitles", [])
    for i, line in enumerate(subtitles if isinstance(subtitles, list) else []):
        _known(line, f"subtitles[{i}]", SUBTITLE_FIELDS)
    for path, tree in _trees(data):
        for i, fields in enumerate(tree):
            _annotation_names(fields, f"{path}[{i}]")


def _annotation_names(fields: Mapping[str, Any], path: str) -> None:
    _form_names(fields, path, ANNOTATION_FIELDS)
    for where, form in _objects(fields, "either", path):
        _form_names(form, where, WHOLE_FIELDS)
    for where, turn in _objects(fields, "turns", path):
        _form_names(turn, where, TURN_FIELDS)
        for inner, form in _objects(turn, "either", where):
            _form_names(form, inner, FORM_FIELDS)


def _form_names(fields: Mapping[str, Any], path: str, known: Collection[str]) -> None:
    _known(fields, path, known)
    for where, entry in _objects(fields, "answer_annotations", path):
        _known(entry, where, INLINE_FIELDS)
    for where, frame in _objects(fields, "points", path):  # of a track
        if {"x", "y"} <= set(frame):
            raise FieldError.wrong(where, "a point [x, y]", frame)
        _known(frame, where, FRAME_FIELDS)
        tracked = frame.get("points")
        for name, entry in tracked.items() if isinstance(tracked, dict) else ():
            _known(entry if isinstance(entry, dict) else {}, f"{where}.points.{name}", TRACKED_FIELDS)


def _objects(fields: Mapping[str, Any], name: str, path: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The objects in the list `name`, with their paths. A field that the style does not read may hold anything."""
    value = fields.get(name)
    entries = value if isinstance(value, list) else ()
    return [(f"{path}.{name}[{i}]", entry) for i, entry in enumerate(entries) if isinstance(entry, dict)]


def _known(fields: Mapping[str, Any], path: str, known: Collection[str]) -> None:
    for name in fields:
        if name not in known and name in RECORD_KEYS:
            fault = Fault(f"{path}.{name}", show(fields[name]), f"{name} beside annotations")
            raise FieldError(fault, f"belongs to the whole record: write {fault.expected}")
        if name not in known and ELSEWHERE.get(name) in known:
            fault = Fault(f"{path}.{name}", show(fields[name]), f"did you mean {ELSEWHERE[name]!r}?")
            raise FieldError(fault, f"is an unknown field; {fault.expected}")
        if name not in known:
            raise FieldError.unknown(f"{path}.{name}", known, fields[name])


def _style(style: str, path: str) -> None:
    try:
        asked_style(style)
    except UserError as error:
        hint = str(error).partition("; ")[2]
        raise FieldError(Fault(path, show(style), hint or "the name of a style"), f"names an {error}") from None


# --- texts and settings ----------------------------------------------------------------------------------------------


def _sampling(sampling: Mapping[str, Any]) -> None:
    for name, value in sampling.items():
        where = f"sampling.{name}"
        if name in ("mode", "frame_sample_mode"):
            if value not in SAMPLING_MODES:
                raise FieldError.wrong(where, f"one of {', '.join(SAMPLING_MODES)}", value)
        elif name == "candidate_sampling_fps":
            if not isinstance(value, list) or not value or not all(is_number(v) and v > 0 for v in value):
                raise FieldError.wrong(where, "a list of rates above 0, frames per second", value)
        elif not is_number(value) or value <= 0:
            raise FieldError.wrong(where, "a number above 0", value)
        elif name in ("max_frames", "sampling_fps") and value != int(value):
            raise FieldError.wrong(where, "a whole number of at least 1", value)


def _weights(data: Mapping[str, Any]) -> None:
    for name in ("weight", "weight_factor"):
        value = data.get(name)
        if value is not None and not 0 < value <= MAX_WEIGHT:
            raise FieldError.wrong(name, f"a number above 0, at most {MAX_WEIGHT:g}", value)


def _media_of_settings(record: Record, data: Mapping[str, Any]) -> None:
    for name in ("clip", "sampling", "subtitles"):
        if data.get(name) and record.video is None:
            raise FieldError(Fault(name, "no video", "a video"), "belongs to a video; the record has none")
    text = data.get("subtitles")
    if isinstance(text, str):
        if text.strip().lower().endswith(SUBTITLE_FILES) and len(text.split()) == 1:
            expected = "the text, or a list of {start, end, text}"
            raise FieldError(
                Fault("subtitles", show(text), expected), f"is the name of a file: {text}; give {expected}"
            )
        if TIMING.search(text):
            expected = "a list of {start, end, text} in seconds, or the name of a file (.srt, .vtt)"
            raise FieldError(
                Fault("subtitles", show(text), expected), f"is the content of a subtitle file; give {expected}"
            )
        _text(text, "subtitles")
        _unmarked(text, "subtitles")
    for i, line in enumerate(text if isinstance(text, list) else ()):
        _unmarked(line["text"], f"subtitles[{i}].text")


def _texts(fields: Mapping[str, Any], path: str) -> None:
    """Only known styles, no blank text, no mark of a medium and no option twice, at one level and those below it."""
    if "style" in fields:
        _style(fields["style"], f"{path}.style")
    for name in TEXTS:
        if name in fields:
            _text(fields[name], f"{path}.{name}")
    _booleans(fields, path)
    for name in ("answers", "messages", "options"):
        for i, text in enumerate(_list(fields, name, path)):
            _text(text, f"{path}.{name}[{i}]")
    options = [option.strip() for option in fields.get("options", ())]
    for i, option in enumerate(options):
        if option in options[:i]:
            fault = Fault(f"{path}.options[{i}]", show(option), "an option that no other one equals")
            raise FieldError(fault, f"is the same as options[{options.index(option)}]: {show(option)}")
    if len(options) == 1:
        raise FieldError.wrong(f"{path}.options", "at least two options", fields["options"])
    index, answer = fields.get("answer_idx"), fields.get("answer")
    if (
        type(index) is int
        and 0 <= index < len(options)
        and answer in fields["options"]
        and answer != fields["options"][index]
    ):
        fault = Fault(f"{path}.answer", show(answer), f"options[{index}], {show(fields['options'][index])}")
        raise FieldError(fault, f"is {show(answer)}, but answer_idx says {fault.expected}")
    marks = str(fields.get("answer", "")).count(POINT_MARK)
    inline = _list(fields, "answer_annotations", path)
    if "answer" in fields and marks != len(inline):
        seen = f"{marks} marks {POINT_MARK}, {len(inline)} entries of answer_annotations"
        raise FieldError(Fault(f"{path}.answer", seen, "as many of one as of the other"), f"holds {seen}")
    if "sampling_fps" in fields and fields["sampling_fps"] == 0:
        raise FieldError.wrong(f"{path}.sampling_fps", "a number of at least 1", 0)
    if fields.get("style") != RAW_TEXT:  # a document is trained as it is
        _marks(fields, path)
    for name in ("either", "turns"):
        for where, below in _objects(fields, name, path):
            _texts(below, where)


def _list(fields: Mapping[str, Any], name: str, path: str) -> list[Any]:
    value = fields.get(name, [])
    if not isinstance(value, list):
        raise FieldError.wrong(f"{path}.{name}", "a list", value)
    return value


def _text(text: Any, path: str) -> None:
    if not isinstance(text, str) or is_blank(text):
        raise FieldError.wrong(path, "a text that is not blank", text)


def _marks(fields: Mapping[str, Any], path: str) -> None:
    """No mark of a medium in a text of one level."""
    for name in (*TEXTS, *OTHER_TEXTS):
        if name in fields:
            _unmarked(fields[name], f"{path}.{name}")
    for name in ("answers", "messages", "options"):
        for i, text in enumerate(fields.get(name, ())):
            _unmarked(text, f"{path}.{name}[{i}]")
    for where, entry in _objects(fields, "answer_annotations", path):
        for name in INLINE_TEXTS & set(entry):
            _unmarked(entry[name], f"{where}.{name}")


def _unmarked(text: Any, path: str) -> None:
    """No place of an image in a text: Molmo2 reads media before all text, and the mark would be trained as letters."""
    if not isinstance(text, str):
        raise FieldError.wrong(path, "a text", text)
    if "\0" in text:
        raise FieldError(Fault(path, show(text), "a text without NUL characters"), "holds a NUL character")
    found = MARKS.search(text)
    if found:
        expected = f"a text without {found[0]}: media come before all text"
        shown = show(text[max(found.start() - 20, 0) : found.end() + 20])
        raise FieldError(Fault(path, shown, expected), f"must be {expected}; it holds {shown}")


def _booleans(fields: Mapping[str, Any], path: str) -> None:
    """true and false are written as such: the text "false", 0 and 1 are none."""
    for name in BOOLEANS:
        _boolean(fields.get(name, False), f"{path}.{name}")
    for where, frame in _objects(fields, "points", path):  # of a track
        tracked = frame.get("points")
        for name, entry in tracked.items() if isinstance(tracked, dict) else ():
            if isinstance(entry, dict):
                _boolean(entry.get("occluded", False), f"{where}.points.{name}.occluded")


def _boolean(value: Any, path: str) -> None:
    if not isinstance(value, bool):
        raise FieldError.wrong(path, "true or false", value)


def _padded(fields: Mapping[str, Any]) -> bool:
    """Whether an answer, at one level or below, has whitespace around it. The published code trains it as it is."""
    if fields.get("style") == RAW_TEXT:
        return False
    answers = [fields[name] for name in ("answer", "answer_with_points", "text") if name in fields]
    answers += [*fields.get("answers", ()), *fields.get("messages", ())[1::2]]
    below = [entry for name in ("either", "turns") for entry in fields.get(name, ())]
    return any(text != text.strip() for text in answers) or any(_padded(entry) for entry in below)


# --- tasks -----------------------------------------------------------------------------------------------------------


def _task(record: Record, annotation: Annotation, path: str) -> None:
    content = annotation.content
    if isinstance(content, (RawText, Messages, tuple)):
        return
    if isinstance(content, QuestionAnswer) and content.question is None and is_blank(annotation.prompt):
        style = canonical_style(content.style.name)
        if ".turns[" in path or style in DEMO_STYLES or style in MC_STYLES:
            raise FieldError.missing(f"{path}.question", "what the model is asked")
    if isinstance(content, Caption) and not record.images and record.video is None:
        _needs(path, "an image or a video", record)
    if isinstance(content, Points) and not record.images:
        _needs(path, "an image", record)
    _one_image(record, content, path)
    if isinstance(content, (VideoPoints, Tracks, TimedCaption)) and record.video is None:
        _needs(path, "a video", record)
    if isinstance(content, Tracks):
        if is_blank(content.label):
            raise FieldError.missing(f"{path}.label", "the name of what is tracked")
        if content.frames and not any(not p.occluded for frame in content.frames for p in frame.points.values()):
            expected = "a visible point; without points the object never appears"
            raise FieldError(Fault(f"{path}.points", "no visible point", expected), f"must hold {expected}")
        _one_object(content, f"{path}.points")
    if isinstance(content, MultipleChoice) and is_blank(content.question):
        raise FieldError.missing(f"{path}.question", "what the model is asked")


def _one_object(track: Tracks, path: str) -> None:
    """A style of a single object asks for what begins at one point; its answer would have all objects."""
    objects = sorted({name for frame in track.frames for name, point in frame.points.items() if not point.occluded})
    if track.style.track is not None and track.style.track.from_point and len(objects) > 1:
        seen = f"{len(objects)} objects {show(objects)}"
        several = ", ".join(name for name, style in TRACK_STYLES.items() if not style.from_point)
        expected = f"one object, or a style of several ({several})"
        raise FieldError(Fault(path, seen, expected), f"holds {seen}; {expected}")


def _one_image(record: Record, content: TurnAnnotation, path: str) -> None:
    """Points that do not say in which of several images they are would all be those of the first."""
    if len(record.images) < 2:
        return
    seen = f"a record with {len(record.images)} images"
    if isinstance(content, Points):
        mode = content.style.count
        name = next(n for n, k in NOT_ON_ONE_IMAGE.items() if k is Kind.MULTI_IMAGE_POINTS and POINT_MODES[n] == mode)
        expected = f"{name}, with one list of points for each image"
        fault = Fault(f"{path}.style", f"{content.style.name}, {seen}", expected)
        raise FieldError(fault, f"does not say in which of the {len(record.images)} images the points are: {expected}")
    if isinstance(answer := getattr(content, "answer", None), Answer) and answer.inline_points:
        fault = Fault(f"{path}.answer_annotations", seen, "a record with one image")
        raise FieldError(fault, f"does not say in which of the {len(record.images)} images the points are")


def _needs(path: str, medium: str, record: Record) -> None:
    has = "images" if record.images else "a video" if record.video is not None else "neither images nor a video"
    fault = Fault(f"{path}.style", f"a record with {has}", f"a record with {medium}")
    raise FieldError(fault, f"is of a task on {medium}; the record has {has}")
