"""The annotations of a record as typed values: one class per kind, parsed once from the record's JSON.

`read_annotation` is the only code that knows how a record writes its annotations (docs/data.md lists the fields); all
other code works with these classes. The kind of an annotation follows from its style (`styles.Style`) and from the
fields it has. Times are seconds from the start of the clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from molmo2_nemo.data.json_values import is_number, show
from molmo2_nemo.data.styles import Kind, Style, style_of
from molmo2_nemo.errors import DataError

MAIN_OBJECT = "main subject"  # what an object caption without `object` is about
TRACK_FPS = 2  # frames per second of a track's answer without `sampling_fps`

Point = tuple[float, float]  # x, y in units of the annotation's scale


@dataclass(frozen=True, slots=True)
class InlinePoints:
    """Points inside the text of an answer, in percent of one image. Each instance replaces one `<|POINT|>` mark."""

    points: tuple[Point, ...]
    label: str
    alt: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """The text of an answer, or the answers of several annotators: training uses the most frequent (ties at random)."""

    texts: tuple[str, ...]
    inline_points: tuple[InlinePoints, ...] = ()
    explanation: str = ""  # written before the answer


@dataclass(frozen=True, slots=True)
class QuestionAnswer:
    """A question with its answer. Without a question the prompt is the style's prefix alone."""

    style: Style
    question: str | None
    answer: Answer


@dataclass(frozen=True, slots=True)
class Caption:
    """A description of the image or video; the prompt is one of the style's wordings."""

    style: Style
    answer: Answer
    subject: str = MAIN_OBJECT  # what an object caption is about


@dataclass(frozen=True, slots=True)
class TimedCaption:
    """A description or transcript of a span of a video, or of one frame."""

    style: Style
    question: str | None  # asked where the stage has no wordings
    answer: Answer
    times: tuple[float, ...]  # seconds, one for each of style.time_fields


@dataclass(frozen=True, slots=True)
class MultipleChoice:
    """A question with several options, exactly one of them correct."""

    style: Style
    question: str
    options: tuple[str, ...]
    answer: int  # index of the correct option
    shuffle: bool = False  # the order of the options is drawn anew at every access
    unlabelled: bool = False  # the options already are labels, such as letters in the image


@dataclass(frozen=True, slots=True)
class PointsInWords:
    """A pointing or counting task whose answer is given as text."""

    style: Style
    question: str | None
    label: str | None  # what is pointed at; given where `question` is not
    answer: Answer


@dataclass(frozen=True, slots=True)
class Points:
    """Points in one image."""

    style: Style
    question: str | None
    label: str
    scale: tuple[float, float] | None  # width and height that the coordinates are measured in; None: the image's pixels
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class MultiImagePoints:
    """Points in several images."""

    style: Style
    question: str | None
    label: str
    scale: tuple[float, float] | None
    points: tuple[tuple[Point, ...], ...]  # per image of the record


@dataclass(frozen=True, slots=True)
class VideoPoints:
    """Points in some frames of a video."""

    style: Style
    question: str | None
    label: str
    scale: tuple[float, float] | None
    timestamps: tuple[float, ...]
    points: tuple[tuple[Point, ...], ...]  # per timestamp


@dataclass(frozen=True, slots=True)
class TrackPoint:
    """The position of one object in a frame."""

    point: Point
    occluded: bool = False


@dataclass(frozen=True, slots=True)
class TrackFrame:
    """The positions of all tracked objects in one frame of a video."""

    time: float
    points: Mapping[str, TrackPoint]  # by object id


@dataclass(frozen=True, slots=True)
class Tracks:
    """Objects tracked through a video."""

    style: Style
    question: str | None
    label: str
    scale: tuple[float, float] | None
    fps: int  # frames per second of the answer
    frames: tuple[TrackFrame, ...]  # in order of time; empty: the object never appears


TurnAnnotation = (
    QuestionAnswer
    | Caption
    | TimedCaption
    | MultipleChoice
    | PointsInWords
    | Points
    | MultiImagePoints
    | VideoPoints
    | Tracks
)


@dataclass(frozen=True, slots=True)
class TurnAlternatives:
    """Alternative forms of one turn of a conversation; every access draws one."""

    forms: tuple[TurnAnnotation, ...]


@dataclass(frozen=True, slots=True)
class Messages:
    """A ready-made conversation."""

    style: Style
    turns: tuple[tuple[str, str], ...]  # (user message, answer)


@dataclass(frozen=True, slots=True)
class Annotation:
    """One branch of a record: a conversation, a turn, or several turns one after the other."""

    content: Messages | TurnAnnotation | tuple[TurnAnnotation | TurnAlternatives, ...]
    prompt: str = ""  # the first user message, in place of the style's wordings
    no_pointing: tuple[int, ...] = ()  # indices of the turns whose question gets a request not to point


@dataclass(frozen=True, slots=True)
class Alternatives:
    """Alternative forms of one annotation; every access draws one."""

    forms: tuple[Annotation, ...]


POINT_KINDS = frozenset({Kind.POINTS, Kind.MULTI_IMAGE_POINTS, Kind.VIDEO_POINTS})


# --- from a record's JSON -------------------------------------------------------------------------------------------


def read_annotation(fields: dict[str, Any], num_images: int, has_video: bool) -> Annotation | Alternatives:
    """Parse one annotation of a record that has `num_images` images, or a video.

    Args:
        fields: the annotation's JSON, an object with a `style`.
    Raises:
        DataError: a field is wrong or missing; the message names it, what was found and what was expected. The caller
            adds the record, the annotation's number and its style.
    """
    _check_texts(fields)
    if "either" in fields:
        forms = tuple(_annotation(form, num_images, has_video) for form in _forms(fields))
        return Alternatives(forms)
    return _annotation(fields, num_images, has_video)


def _annotation(fields: dict[str, Any], num_images: int, has_video: bool) -> Annotation:
    _check_texts(fields)
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
        raise DataError(f"turns must be a list of annotations, not {show(turns)}")
    made: list[TurnAnnotation | TurnAlternatives] = []
    for turn in ({"style": fields["style"], **turn} for turn in turns):
        _check_texts(turn)
        if "either" in turn:
            made.append(TurnAlternatives(tuple(_turn(form, num_images, has_video) for form in _forms(turn))))
        else:
            made.append(_turn(turn, num_images, has_video))
    return tuple(made)


def _turn(fields: dict[str, Any], num_images: int, has_video: bool) -> TurnAnnotation:
    style, question = style_of(fields["style"]), fields.get("question")
    if style.kind is Kind.TRACKS:
        return _tracks(style, fields)
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
        return Caption(style, answer, str(fields.get("object") or MAIN_OBJECT))
    return QuestionAnswer(style, question, answer)


def _check_texts(fields: dict[str, Any]) -> None:
    for name in ("style", "text", "question", "answer", "answer_with_points", "label", "explanation", "prompt"):
        if name in fields and not isinstance(fields[name], str):
            raise DataError(f"{name} must be a string, not {show(fields[name])}")


def _forms(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The variants of an annotation: its fields overridden by each entry of `either`."""
    either = fields["either"]
    if not isinstance(either, list) or not either or not all(isinstance(e, dict) and "either" not in e for e in either):
        raise DataError(f"either must be a list of objects whose fields override the annotation's, not {show(either)}")
    base = {name: value for name, value in fields.items() if name != "either"}
    forms = [{**base, **form} for form in either]
    for form in forms:
        _check_texts(form)
    return forms


def _message_pairs(messages: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list) or len(messages) < 2 or not all(isinstance(m, str) for m in messages):
        raise DataError(f"messages must be a list of at least two strings, not {show(messages)}")
    if len(messages) % 2:
        raise DataError(f"messages alternate user and assistant and end with an answer; there are {len(messages)}")
    return tuple(zip(messages[::2], messages[1::2], strict=True))


def _no_pointing(marked: Any, turns: int) -> tuple[int, ...]:
    if not isinstance(marked, list) or not all(type(n) is int and 0 <= n < turns for n in marked):
        raise DataError(f"no_pointing must list questions by index, 0 to {turns - 1}, not {show(marked)}")
    return tuple(marked)


def _answer(fields: dict[str, Any]) -> Answer:
    if fields.get("answers"):
        answers = fields["answers"]
        if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
            raise DataError(f"answers must be a list of strings, not {show(answers)}")
        return Answer(tuple(answers))
    if "answer" in fields:
        return Answer((fields["answer"],), _inline_points(fields), fields.get("explanation", ""))
    for name in ("answer_with_points", "text"):
        if name in fields:
            return Answer((fields[name],))
    raise DataError("has no answer (answer, answers or text)")


def _inline_points(fields: dict[str, Any]) -> tuple[InlinePoints, ...]:
    entries = fields.get("answer_annotations", [])
    if not isinstance(entries, list):
        raise DataError(f"answer_annotations must be a list, not {show(entries)}")
    made = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("inline_text"), str):
            raise DataError(f"an answer annotation must be {{points, inline_text}}, not {show(entry)}")
        alt = entry.get("alt_text")
        if alt is not None and not isinstance(alt, str):
            raise DataError(f"alt_text must be a string, not {show(alt)}")
        made.append(InlinePoints(read_points(entry.get("points")), entry["inline_text"], alt))
    return tuple(made)


def _choice(style: Style, fields: dict[str, Any]) -> MultipleChoice | None:
    """The multiple-choice question of an annotation; None without a `question` (its options are checked anyway)."""
    options, index, question = fields.get("options"), fields.get("answer_idx"), fields.get("question")
    if not isinstance(options, list) or not options or not all(isinstance(o, str) for o in options):
        raise DataError(f"options must be a list of strings, not {show(options)}")
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(options):
        raise DataError(f"answer_idx must be 0..{len(options) - 1} for {len(options)} options, not {show(index)}")
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
            raise DataError(f"timestamps must be a list of seconds, not {show(times)}")
        groups = _groups(points, len(times), "timestamp")
        if not has_video:
            raise DataError("points in a video, but the record has no video")
        return VideoPoints(style, question, _label(style, fields), _scale(fields), tuple(times), groups)
    if style.kind is Kind.MULTI_IMAGE_POINTS:
        groups = _groups(points, num_images, "image")
        return MultiImagePoints(style, question, _label(style, fields), _scale(fields), groups)
    return Points(style, question, _label(style, fields), _scale(fields), read_points(points))


def _groups(points: Any, count: int, what: str) -> tuple[tuple[Point, ...], ...]:
    if not isinstance(points, list) or len(points) != count:
        got = len(points) if isinstance(points, list) else show(points)
        raise DataError(f"points must hold one list of points per {what}: {count} expected, got {got}")
    return tuple(read_points(group) for group in points)


def read_points(points: Any) -> tuple[Point, ...]:
    """A list of [x, y].

    Raises:
        DataError: anything else.
    """
    if not isinstance(points, list):
        raise DataError(f"points must be a list of [x, y], not {show(points)}")
    return tuple(_point(point, "a point") for point in points)


def _point(point: Any, what: str) -> Point:
    if not isinstance(point, list) or len(point) != 2 or not all(is_number(v) for v in point):
        raise DataError(f"{what} must be [x, y] with finite numbers, not {show(point)}")
    return point[0], point[1]


def _tracks(style: Style, fields: dict[str, Any]) -> Tracks:
    frames = tuple(sorted(_frames(fields["points"]), key=lambda f: f.time)) if "points" in fields else ()
    fps = fields.get("sampling_fps") or TRACK_FPS
    if not is_number(fps) or fps < 1:
        raise DataError(f"sampling_fps must be a number of at least 1, not {show(fps)}")
    return Tracks(style, fields.get("question"), fields.get("label", ""), _scale(fields), int(fps), frames)


def _frames(points: Any) -> list[TrackFrame]:
    if not isinstance(points, list):
        raise DataError(f"points of a track must be a list of frames, not {show(points)}")
    made = []
    for frame in points:
        ok = isinstance(frame, dict) and is_number(frame.get("time")) and isinstance(frame.get("points"), dict)
        if not ok:
            raise DataError(f"a frame of a track must be {{time, points: {{id: {{point}}}}}}, not {show(frame)}")
        made.append(TrackFrame(float(frame["time"]), {k: _track_point(v) for k, v in frame["points"].items()}))
    return made


def _track_point(entry: Any) -> TrackPoint:
    if not isinstance(entry, dict):
        raise DataError(f"a tracked point must be {{point: [x, y], occluded}}, not {show(entry)}")
    return TrackPoint(_point(entry.get("point"), "a point"), bool(entry.get("occluded", False)))


def _label(style: Style, fields: dict[str, Any]) -> str:
    """The name of what is pointed at: lower case for images unless `label_cased` says otherwise."""
    if fields.get("label_cased"):
        return str(fields["label_cased"])
    if "label" not in fields:
        raise DataError("label is missing: the name of what is pointed at")
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
        raise DataError(f"{name} is missing: a number")
    if not is_number(fields[name]):
        raise DataError(f"{name} must be a number, not {show(fields[name])}")
    return float(fields[name])
