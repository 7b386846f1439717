"""How a record's JSON writes its annotations (docs/data.md lists the fields).

`read_annotation` is the only code that knows it; all other code works with the classes of annotations.py. The kind of
an annotation follows from its style (`styles.Style`) and from the fields it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from molmo2_nemo.data.annotations import (
    MAIN_OBJECT,
    POINT_KINDS,
    TRACK_FPS,
    Alternatives,
    Annotation,
    Answer,
    Caption,
    InlinePoints,
    Messages,
    MultiImagePoints,
    MultipleChoice,
    Point,
    Points,
    PointsInWords,
    QuestionAnswer,
    TimedCaption,
    TrackFrame,
    TrackPoint,
    Tracks,
    TurnAlternatives,
    TurnAnnotation,
    VideoPoints,
)
from molmo2_nemo.data.json_values import Fault, FieldError, is_number, show
from molmo2_nemo.data.raw_text import alone, read_raw_text
from molmo2_nemo.data.styles import Kind, Style, asked_style, style_of
from molmo2_nemo.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


def read_annotation(fields: dict[str, Any], num_images: int, has_video: bool) -> Annotation | Alternatives:
    """Parse one annotation of a record that has `num_images` images, or a video.

    Args:
        fields: the annotation's JSON, an object with a `style`.
    Raises:
        FieldError: a field is wrong or missing; the message names it, what was found and what was expected. The caller
            adds the record, the annotation's number and its style.
    """
    _check_texts(fields)
    if "either" in fields:
        if any(style_of(form["style"]).kind is Kind.RAW_TEXT for form in _forms(fields)):
            raise alone()
        return Alternatives(
            _each("either", _forms(fields), lambda form: _annotation(form, num_images, has_video)),
        )
    return _annotation(fields, num_images, has_video)


def _annotation(fields: dict[str, Any], num_images: int, has_video: bool) -> Annotation:
    _check_texts(fields)
    if style_of(fields["style"]).kind is Kind.RAW_TEXT:
        return Annotation(read_raw_text(fields))
    content: Messages | TurnAnnotation | tuple[TurnAnnotation | TurnAlternatives, ...]
    if "messages" in fields:
        content = Messages(style_of(fields["style"]), _message_pairs(fields["messages"]))
    elif "turns" in fields:
        content = _turns(fields, num_images, has_video)
    else:
        content = _turn(fields, num_images, has_video)
    count = len(content.turns) if isinstance(content, Messages) else 1
    return Annotation(content, fields.get("prompt", ""), _no_pointing(fields.get("no_pointing", []), count))


def _turns(fields: dict[str, Any], num_images: int, has_video: bool) -> tuple[TurnAnnotation | TurnAlternatives, ...]:
    turns = fields["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) and "turns" not in t for t in turns):
        raise FieldError.wrong("turns", "a list of annotations", turns)
    whole = [{"style": fields["style"], **turn} for turn in turns]
    return _each("turns", whole, lambda turn: _one_turn(turn, num_images, has_video))


def _one_turn(turn: dict[str, Any], num_images: int, has_video: bool) -> TurnAnnotation | TurnAlternatives:
    _check_texts(turn)
    if "either" not in turn:
        return _turn(turn, num_images, has_video)
    return TurnAlternatives(_each("either", _forms(turn), lambda form: _turn(form, num_images, has_video)))


def _each(path: str, entries: Sequence[T], read: Callable[[T], R]) -> tuple[R, ...]:
    """`read` of each entry of the list at `path`; errors name the entry."""
    made = []
    for i, entry in enumerate(entries):
        try:
            made.append(read(entry))
        except FieldError as error:
            raise error.inside(f"{path}[{i}]") from None
    return tuple(made)


def _turn(fields: dict[str, Any], num_images: int, has_video: bool) -> TurnAnnotation:
    style, question = style_of(fields["style"]), fields.get("question")
    if style.kind is Kind.RAW_TEXT:
        raise alone()
    if style.kind is Kind.TRACKS:
        return read_tracks(fields)
    if style.kind in POINT_KINDS and "points" in fields:
        return _points(style, fields, num_images, has_video)
    if "options" in fields or "answer_idx" in fields:
        chosen = _choice(style, fields)
        if chosen is not None:
            return chosen
    answer = _answer(fields)
    if style.kind in POINT_KINDS:
        return PointsInWords(style, question, None if question else _label(style, fields), answer)
    if style.kind is Kind.TIMED_CAPTION:
        return TimedCaption(style, question, answer, tuple(_number(fields, name) for name in style.time_fields))
    if style.kind is Kind.CAPTION and question is None:
        asked = style.asks_for("object")
        return Caption(style, answer, str((asked and fields.get("object")) or MAIN_OBJECT))
    return QuestionAnswer(style, question, answer)


def _check_texts(fields: dict[str, Any]) -> None:
    for name in ("style", "text", "question", "answer", "answer_with_points", "label", "explanation", "prompt"):
        if name in fields and not isinstance(fields[name], str):
            raise FieldError.wrong(name, "a string", fields[name])


def _forms(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The variants of an annotation: its fields overridden by each entry of `either`."""
    either = fields["either"]
    if not isinstance(either, list) or not either or not all(isinstance(e, dict) and "either" not in e for e in either):
        raise FieldError.wrong("either", "a list of objects whose fields override the annotation's", either)
    base = {name: value for name, value in fields.items() if name != "either"}
    forms = [{**base, **form} for form in either]
    _each("either", forms, lambda form: _check_texts(form))
    return forms


def _message_pairs(messages: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list) or len(messages) < 2 or not all(isinstance(m, str) for m in messages):
        raise FieldError.wrong("messages", "a list of at least two strings", messages)
    if len(messages) % 2:
        raise FieldError(
            Fault("messages", f"{len(messages)} messages", "an even number, user first"),
            f"alternate user and assistant and end with an answer; there are {len(messages)}",
        )
    return tuple(zip(messages[::2], messages[1::2], strict=True))


def _no_pointing(marked: Any, turns: int) -> tuple[int, ...]:
    if not isinstance(marked, list) or not all(type(n) is int and 0 <= n < turns for n in marked):
        raise FieldError.wrong("no_pointing", f"a list of questions by index, 0 to {turns - 1}", marked)
    return tuple(marked)


def _answer(fields: dict[str, Any]) -> Answer:
    if fields.get("answers"):
        answers = fields["answers"]
        if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
            raise FieldError.wrong("answers", "a list of strings", answers)
        return Answer(tuple(answers))
    if "answer" in fields:
        return Answer((fields["answer"],), _inline_points(fields), fields.get("explanation", ""))
    for name in ("answer_with_points", "text"):
        if name in fields:
            return Answer((fields[name],))
    try:
        asked_style(fields["style"])
    except UserError as error:  # its fields may be those of the style that was meant
        raise FieldError(Fault("style", show(fields["style"]), str(error)), f"names an {error}") from None
    if style_of(fields["style"]).kind in (Kind.POINTS, Kind.VIDEO_POINTS):
        raise FieldError.missing("points", "a list of [x, y], [] where there is none")
    raise FieldError(Fault("answer", "nothing", "answer, answers or text"), "is missing (answer, answers or text)")


def _inline_points(fields: dict[str, Any]) -> tuple[InlinePoints, ...]:
    entries = fields.get("answer_annotations", [])
    if not isinstance(entries, list):
        raise FieldError.wrong("answer_annotations", "a list", entries)
    made = []
    for i, entry in enumerate(entries):
        where = f"answer_annotations[{i}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("inline_text"), str):
            raise FieldError.wrong(where, "{points, inline_text}", entry)
        alt = entry.get("alt_text")
        if alt is not None and not isinstance(alt, str):
            raise FieldError.wrong(f"{where}.alt_text", "a string", alt)
        made.append(InlinePoints(read_points(entry.get("points"), f"{where}.points"), entry["inline_text"], alt))
    return tuple(made)


def _choice(style: Style, fields: dict[str, Any]) -> MultipleChoice | None:
    """The multiple-choice question of an annotation; None without a `question` (its options are checked anyway)."""
    options, index, question = fields.get("options"), fields.get("answer_idx"), fields.get("question")
    if not isinstance(options, list) or not options or not all(isinstance(o, str) for o in options):
        raise FieldError.wrong("options", "a list of strings", options)
    if index is None:
        raise FieldError.missing("answer_idx", f"the index of the correct option, 0..{len(options) - 1}")
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(options):
        raise FieldError.wrong("answer_idx", f"0..{len(options) - 1} for {len(options)} options", index)
    if question is None:
        return None
    shuffle, unlabelled = bool(fields.get("shuffle_options")), bool(fields.get("unlabelled_options"))
    return MultipleChoice(style, question, tuple(options), index, shuffle, unlabelled)


def _points(
    style: Style, fields: dict[str, Any], num_images: int, has_video: bool
) -> Points | MultiImagePoints | VideoPoints:
    points, question = fields["points"], fields.get("question")
    if style.kind is Kind.VIDEO_POINTS:
        times = fields.get("timestamps")
        if not isinstance(times, list) or not all(is_number(t) and t >= 0 for t in times):
            raise FieldError.wrong("timestamps", "a list of seconds, 0 or later", times)
        groups = _groups(points, len(times), "timestamp")
        if not has_video:
            raise FieldError(
                Fault("points", "a record without a video", "a video"), "are in a video; the record has none"
            )
        return VideoPoints(style, question, _label(style, fields), _scale(fields), tuple(times), groups)
    if style.kind is Kind.MULTI_IMAGE_POINTS:
        groups = _groups(points, num_images, "image")
        return MultiImagePoints(style, question, _label(style, fields), _scale(fields), groups)
    return Points(style, question, _label(style, fields), _scale(fields), read_points(points))


def _groups(points: Any, count: int, what: str) -> tuple[tuple[Point, ...], ...]:
    if not isinstance(points, list) or len(points) != count:
        got = str(len(points)) if isinstance(points, list) else show(points)
        expected = f"one list of points per {what}: {count} expected"
        raise FieldError(Fault("points", got, expected), f"must hold {expected}, got {got}")
    return tuple(read_points(group, f"points[{i}]") for i, group in enumerate(points))


def read_points(points: Any, path: str = "points") -> tuple[Point, ...]:
    """A list of [x, y]; `path` is the field that holds it.

    Raises:
        FieldError: anything else.
    """
    if not isinstance(points, list):
        raise FieldError.wrong(path, "a list of [x, y]", points)
    return tuple(_point(point, path, i) for i, point in enumerate(points))


def _point(point: Any, path: str, number: int | None = None) -> Point:
    if not isinstance(point, list) or len(point) != 2 or not all(is_number(v) for v in point):
        where = path if number is None else f"{path}[{number}]"
        raise FieldError.wrong(where, "a point [x, y] with finite numbers", point)
    return point[0], point[1]


def read_tracks(fields: dict[str, Any]) -> Tracks:
    """A tracking task without alternatives. Raises FieldError."""
    frames = tuple(sorted(_frames(fields["points"]), key=lambda f: f.time)) if "points" in fields else ()
    fps = fields.get("sampling_fps") or TRACK_FPS
    if not is_number(fps) or fps < 1:
        raise FieldError.wrong("sampling_fps", "a number of at least 1", fps)
    snap = fields.get("snap", 0.0)
    if not is_number(snap) or snap < 0:
        raise FieldError.wrong("snap", "a number of seconds", snap)
    style, label = style_of(fields["style"]), fields.get("label", "")
    return Tracks(style, fields.get("question"), label, _scale(fields), int(fps), frames, float(snap))


def _frames(points: Any) -> list[TrackFrame]:
    if not isinstance(points, list):
        raise FieldError.wrong("points", "the frames of a track, a list", points)
    made = []
    for i, frame in enumerate(points):
        ok = isinstance(frame, dict) and is_number(frame.get("time")) and isinstance(frame.get("points"), dict)
        if not ok:
            raise FieldError.wrong(f"points[{i}]", "a frame of a track {time, points: {id: {point}}}", frame)
        found = {name: _track_point(entry, i, name) for name, entry in frame["points"].items()}
        made.append(TrackFrame(float(frame["time"]), found))
    return made


def _track_point(entry: Any, frame: int, name: str) -> TrackPoint:
    where = f"points[{frame}].points.{name}"
    if not isinstance(entry, dict):
        raise FieldError.wrong(where, "a tracked point {point: [x, y], occluded}", entry)
    return TrackPoint(_point(entry.get("point"), f"{where}.point"), bool(entry.get("occluded", False)))


def _label(style: Style, fields: dict[str, Any]) -> str:
    """The name of what is pointed at: lower case for images unless `label_cased` says otherwise."""
    if fields.get("label_cased"):
        return str(fields["label_cased"])
    if "label" not in fields:
        raise FieldError.missing("label", "the name of what is pointed at")
    return fields["label"] if style.kind is Kind.VIDEO_POINTS else fields["label"].lower()


def _scale(fields: dict[str, Any]) -> tuple[float, float] | None:
    """What coordinates are measured in: `point_scale`, or the annotation's width and height."""
    if fields.get("point_scale"):
        side = _number(fields, "point_scale")
        return side, side
    if fields.get("width") and fields.get("height"):
        return _number(fields, "width"), _number(fields, "height")
    return None


def _number(fields: dict[str, Any], name: str) -> float:
    if name not in fields:
        raise FieldError.missing(name, "a number")
    if not is_number(fields[name]):
        raise FieldError.wrong(name, "a number", fields[name])
    return float(fields[name])
