"""The annotations of a record as typed values: one class per kind, parsed once from the record's JSON
(annotation_json.py). Times are seconds from the start of the clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from molmo2_nemo.data.raw_text import RawText
from molmo2_nemo.data.styles import Kind, Style

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
    snap: float = 0.0  # seconds; the nearest frame is taken for a shown one at most this far away; 0: as published


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
    """One branch of a record: a conversation, a turn, several turns one after the other; or a document, alone."""

    content: RawText | Messages | TurnAnnotation | tuple[TurnAnnotation | TurnAlternatives, ...]
    prompt: str = ""  # the first user message, in place of the style's wordings
    no_pointing: tuple[int, ...] = ()  # indices of the turns whose question gets a request not to point


@dataclass(frozen=True, slots=True)
class Alternatives:
    """Alternative forms of one annotation; every access draws one."""

    forms: tuple[Annotation, ...]


POINT_KINDS = frozenset({Kind.POINTS, Kind.MULTI_IMAGE_POINTS, Kind.VIDEO_POINTS})
