"""Annotations -> user messages and answers.

The class of an annotation (annotations.py) is its task; its style names the list of wordings and the prefix that
identifies the style. All randomness comes from the generator passed in, so the same generator state gives the same
text. Chat tokens are added elsewhere: see `Molmo2Tokenizer.user_turn`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from molmo2_nemo.data.annotations import (
    TRACK_FPS,
    Alternatives,
    Annotation,
    Answer,
    Caption,
    Messages,
    MultiImagePoints,
    MultipleChoice,
    Point,
    Points,
    PointsInWords,
    QuestionAnswer,
    TimedCaption,
    TrackFrame,
    Tracks,
    TurnAlternatives,
    TurnAnnotation,
    VideoPoints,
)
from molmo2_nemo.data.config import TextFormatConfig
from molmo2_nemo.data.lost_points import lost_points
from molmo2_nemo.data.multiple_choice import plain_choice, random_choice, standard_choice
from molmo2_nemo.data.points import (
    NONE_TEXT,
    SEPARATORS,
    PointTag,
    answer_frames,
    at_rate,
    count_text,
    number_points,
    render,
    scale_point,
    seconds_text,
    shown_track_frames,
    track_text,
    visible_points,
)
from molmo2_nemo.data.published_choice import published_choice
from molmo2_nemo.data.raw_text import RawText
from molmo2_nemo.data.styles import (
    DEMO_STYLES,
    IN_SECONDS,
    MC_STYLES,
    POINT_WORDS,
    UNCONDITIONED_STYLES,
    Style,
    canonical_style,
)
from molmo2_nemo.data.templates import NOT_SURE, OWN, PAXION_QUESTIONS
from molmo2_nemo.data.wordings import LABELS, wordings_of
from molmo2_nemo.errors import DataError, UserError

P_ALL_IMAGES = 0.5  # probability that a multi-image pointing prompt is about all images
P_UNCONDITIONED = 0.1  # probability that a stage-1 prefix omits the length
LENGTH_UNIT, LENGTH_NOISE = 15, 25  # characters; the prefix gives (length + noise) // unit
P_OTHER_START = 0.2  # probability that single-object tracking starts later than at the first visible point
POINT_MARK = "<|POINT|>"  # in an answer: replaced by the points of the next answer annotation


@dataclass(frozen=True)
class VisualContext:
    """What a text may refer to: sizes in pixels (width, height) and, for a video, the times of its sampled frames."""

    image_sizes: tuple[tuple[int, int], ...] = ()
    video_size: tuple[int, int] | None = None
    frame_times: np.ndarray = field(default_factory=lambda: np.zeros(0))  # float64 [n], seconds


@dataclass(slots=True)
class Turn:
    """What the user says and what the model answers."""

    user: str
    answer: str
    lost: Mapping[str, int] = field(default_factory=dict)  # what of the annotation they lack, by kind (tally.py)


class PromptFormatter:
    """Turns annotations into conversations, with the settings of a stage."""

    def __init__(self, config: TextFormatConfig, *, training: bool = True, inference_length: int | None = 65):
        """`inference_length`: the length (in units of 15 characters) that stage-1 prefixes ask for outside training.

        Raises:
            UserError: an unknown setting, or a file of wordings that cannot be used.
        """
        known = {
            "text.prompt_templates": (config.prompt_templates, ("none", "uber_model_v2")),
            "text.system_prompt": (config.system_prompt, ("style_and_length_v2", "demo_or_style_v2")),
            "text.point_format": (config.point_format, tuple(SEPARATORS)),
        }
        for name, (value, options) in known.items():
            if value not in options:
                raise UserError(f"unknown {name} {value!r}; known: {', '.join(options)}")
        self.config = config
        self.training = training
        self.inference_length = inference_length
        self.templated = config.prompt_templates != "none"
        self.wordings = wordings_of(config)

    def conversation(
        self, annotation: Annotation | Alternatives, context: VisualContext, rng: np.random.Generator
    ) -> list[Turn]:
        """The turns of one annotation, the style's prefix on the first.

        Raises:
            DataError: an empty answer, or points that do not match the images or the video; names the style.
        """
        if isinstance(annotation, Alternatives):
            annotation = annotation.forms[int(rng.integers(len(annotation.forms)))]
        if isinstance(annotation.content, RawText):
            raise DataError("raw text is a document, not a conversation")
        style, turns = self._turns(annotation.content, context, rng)
        if annotation.prompt:
            turns[0].user = annotation.prompt
        for number in annotation.no_pointing:
            turns[number].user = self._worded("no_pointing", rng) + turns[number].user
        prefix = self.prefix(canonical_style(style), turns[-1].answer, rng)
        turns[0].user = join_prefix(prefix, turns[0].user)
        return turns

    def question(
        self, question: str, style: str, rng: np.random.Generator, *, options: Sequence[str] | None = None
    ) -> str:
        """The user message for inference, wrapped as in training, without an answer."""
        text = standard_choice(question, options, None)[0] if options else question
        return join_prefix(self.prefix(canonical_style(style), "", rng), text)

    def prefix(self, style: str, answer: str, rng: np.random.Generator) -> str:
        """The text before the prompt that names the style and, in stage 1, the answer's length; "" if there is none."""
        if self.config.system_prompt == "demo_or_style_v2":
            return "" if style in DEMO_STYLES or style in MC_STYLES else f"{style}:"
        if style in UNCONDITIONED_STYLES:
            return f"{style}:"
        if not self.training:
            return f"{style} {self.inference_length}:" if self.inference_length else f"{style}:"
        if rng.random() <= P_UNCONDITIONED:
            return f"{style}:"
        return f"{style} {(len(answer) + int(rng.normal(scale=LENGTH_NOISE))) // LENGTH_UNIT}:"

    def _turns(
        self,
        content: Messages | TurnAnnotation | tuple[TurnAnnotation | TurnAlternatives, ...],
        context: VisualContext,
        rng: np.random.Generator,
    ) -> tuple[str, list[Turn]]:
        """The turns, and the style that the prefix names."""
        if isinstance(content, Messages):
            return content.style.name, [Turn(user, answer) for user, answer in content.turns]
        if isinstance(content, tuple):  # alternatives are drawn before any wording
            drawn = [
                p.forms[int(rng.integers(len(p.forms)))] if isinstance(p, TurnAlternatives) else p for p in content
            ]
            parts = [self._turn(part, context, rng) for part in drawn]
            return parts[0][0], [turn for _, turn in parts]
        style, turn = self._turn(content, context, rng)
        return style, [turn]

    def _turn(self, entry: TurnAnnotation, context: VisualContext, rng: np.random.Generator) -> tuple[str, Turn]:
        """One turn and the style its prefix names (a style may become `..._in_seconds`)."""
        match entry:
            case Tracks():
                turn = self._track(entry, context, rng)
            case Points() | VideoPoints():
                turn = self._points(entry, context, rng)
            case MultiImagePoints():
                turn = self._multi_image_points(entry, context, rng)
            case MultipleChoice():
                turn = self._choice(entry, rng)
            case PointsInWords(style, question, label, answer):
                said = self._answer(answer, style, rng)
                turn = Turn(question or self._ask_for_points(style, str(label), rng), said)
            case TimedCaption():
                return self._timed_caption(entry, rng)
            case Caption(style, answer, subject):
                said = self._answer(answer, style, rng)
                turn = Turn(self._worded(style.wordings, rng, object=subject) if self.templated else "", said)
            case QuestionAnswer(style, question, answer):
                said = self._answer(answer, style, rng)
                question = self._label_question(style, question, rng)
                worded = self.templated and question is not None and style.question_wordings
                asked = self._worded(style.question_wordings, rng, question=str(question)) if worded else question or ""
                turn = Turn(asked, said)
        turn.lost = lost_points(entry, context.image_sizes, context.video_size, context.frame_times)
        return entry.style.name, turn

    def _worded(self, name: str, rng: np.random.Generator, **fields: str) -> str:
        """One of the wordings of a list, with its fields filled in."""
        texts = self.wordings.lists[name]
        return _fill(texts[int(rng.integers(len(texts)))], **fields)

    def _label_question(self, style: Style, question: str | None, rng: np.random.Generator) -> str | None:
        """The question about a label: with imported wordings one of theirs, where ours was drawn at preparation."""
        if self.wordings.choice is None or style.name not in LABELS or question not in OWN[style.name]:
            return question
        return self._worded(style.name, rng)

    def _answer(self, answer: Answer, style: Style, rng: np.random.Generator) -> str:
        text = answer_text(answer, self.config.point_format, rng)
        if not text.strip():
            raise DataError(f"annotation of style {style.name!r} has an empty answer")
        return text

    def _choice(self, choice: MultipleChoice, rng: np.random.Generator) -> Turn:
        options, answer, question = choice.options, choice.answer, choice.question
        if self.wordings.choice is not None and question in PAXION_QUESTIONS and NOT_SURE in options:
            question = self._worded("paxion", rng)
        if self.training and choice.shuffle:
            order = rng.permutation(len(options))
            options, answer = tuple(options[i] for i in order), int(np.flatnonzero(order == answer)[0])
        if not self.templated:
            return Turn(*plain_choice(question, options, answer))
        if not self.training:
            return Turn(*standard_choice(question, options, answer, unlabelled=choice.unlabelled))
        if self.wordings.choice is not None:
            drawn = published_choice(question, options, answer, rng, self.wordings.choice, unlabelled=choice.unlabelled)
            return Turn(*drawn)
        return Turn(*random_choice(question, options, answer, rng, unlabelled=choice.unlabelled))

    def _timed_caption(self, caption: TimedCaption, rng: np.random.Generator) -> tuple[str, Turn]:
        style = caption.style
        answer = self._answer(caption.answer, style, rng)
        if not self.templated:
            return style.name, Turn(caption.question or "", answer)
        as_seconds = bool(rng.random() > 0.5)
        seconds = zip(style.time_fields, caption.times, strict=True)
        times = {name: time_text(value, as_seconds) for name, value in seconds}
        suffix = IN_SECONDS if as_seconds else ""
        return style.name + suffix, Turn(self._worded(style.wordings + suffix, rng, **times), answer)

    # --- points -----------------------------------------------------------------------------------------------------

    def _points(self, entry: Points | VideoPoints, context: VisualContext, rng: np.random.Generator) -> Turn:
        if isinstance(entry, VideoPoints):
            size = _scale(entry.scale, context.video_size)
            pairs = zip(entry.timestamps, entry.points, strict=True)
            groups = [(seconds_text(t), [scale_point(p, size) for p in points]) for t, points in pairs]
        else:
            size = _scale(entry.scale, context.image_sizes[0] if context.image_sizes else None)
            groups = [("1", [scale_point(p, size) for p in entry.points])]
        tag = PointTag(number_points(groups), entry.label)
        prompt = entry.question or self._ask_for_points(entry.style, entry.label, rng)
        return Turn(prompt, count_text(entry.style.count, tag, self.config.point_format))

    def _ask_for_points(self, style: Style, label: str, rng: np.random.Generator, *, images: str = "") -> str:
        """A prompt for pointing; `images` names the images that a task on several images refers to."""
        if not self.templated:
            return label
        wordings = POINT_WORDS["multi_image"][style.count] if images else style.wordings
        return self._worded(wordings, rng, label=label, images=images)

    def _multi_image_points(self, entry: MultiImagePoints, context: VisualContext, rng: np.random.Generator) -> Turn:
        style, count = entry.style, min(len(context.image_sizes), len(entry.points))
        if count == 0:
            raise DataError(f"annotation of style {style.name!r} needs images and one list of points for each")
        if not self.templated or count == 1 or rng.random() < P_ALL_IMAGES:
            chosen, phrase = list(range(count)), "all images"
        else:
            chosen = [int(i) for i in rng.permutation(count)[: int(rng.integers(1, count + 1))]]
            phrase = ", ".join(f"image_{i + 1}" for i in chosen)
        groups = []
        for i in chosen:
            size = _scale(entry.scale, context.image_sizes[i])
            groups.append((str(i + 1), [scale_point(p, size) for p in entry.points[i]]))
        as_single = style.count == "point" and phrase == "all images" and rng.random() < 0.5
        tag = PointTag(number_points(groups), entry.label)
        prompt = entry.question or self._ask_for_points(style, entry.label, rng, images="" if as_single else phrase)
        return Turn(prompt, count_text(style.count, tag, self.config.point_format))

    # --- tracks -----------------------------------------------------------------------------------------------------

    def _track(self, entry: Tracks, context: VisualContext, rng: np.random.Generator) -> Turn:
        task = entry.style.track
        assert task is not None
        label, point_format = entry.label, self.config.point_format
        size = _scale(entry.scale, context.video_size)
        seen = shown_track_frames(entry, context.frame_times)
        kept = answer_frames(entry, seen)
        if entry.snap > 0 and entry.frames and not visible_points(kept if task.on_grid else seen):
            raise DataError(
                f"annotation of style {entry.style.name!r}: no visible point of its {len(entry.frames)} tracked times "
                f"is within {entry.snap:g} s of a frame that is shown (sampling, video.max_frames)"
            )
        fields, later = {"label": label, "fps": str(entry.fps)}, kept
        if task.from_point and entry.frames:
            point, time = self._start(seen, entry.frames, rng)
            groups = number_points([(seconds_text(time), [scale_point(point, size)])])
            fields["point"] = render(PointTag(groups, label), point_format)
            later = [frame for frame in kept if frame.time > time]
        elif task.from_point:
            fields["point"] = label  # there is nothing to track; the answer says so
        wordings = task.wordings
        if entry.fps == TRACK_FPS and task.wordings_no_fps and rng.random() < 0.5:
            wordings = task.wordings_no_fps
        if task.on_grid and not at_rate(entry, seen):
            wordings = task.wordings_no_fps or wordings
        prompt = self._worded(wordings, rng, **fields) if self.templated else fields.get("point", label)
        answer = track_text(later, size, label, point_format) if entry.frames else NONE_TEXT
        if kept and not later:
            answer = ""  # as published, where the object is seen at its start and never after it
        return Turn(entry.question or prompt, answer)

    def _start(
        self, seen: Sequence[TrackFrame], frames: Sequence[TrackFrame], rng: np.random.Generator
    ) -> tuple[Point, float]:
        """Where and when the track of a single object starts: where it is first visible to the model, or sometimes
        later; if it is never visible, where it is first annotated."""
        for some in (seen, frames):
            visible = [(p.point, frame.time) for frame in some for p in frame.points.values() if not p.occluded]
            if visible:
                other = self.training and rng.random() < P_OTHER_START
                return visible[int(rng.integers(len(visible)))] if other else visible[0]
        raise DataError("single-object tracking needs a visible point")


def join_prefix(prefix: str, prompt: str) -> str:
    """Prefix and prompt joined by one space; only one of them where the other is empty."""
    return f"{prefix} {prompt}" if prefix and prompt else prefix or prompt


def time_text(seconds: float, as_seconds: bool) -> str:
    """A time in a video as seconds (`65.2`) or as a clock (`00:01:05.2`)."""
    rounded = round(seconds, 1)
    if as_seconds:
        return str(rounded)
    minutes, rest = divmod(rounded, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours:02d}:{minutes:02d}:{rest:04.1f}"


def answer_text(answer: Answer, point_format: str, rng: np.random.Generator) -> str:
    """The text of an answer: the most frequent of several annotators' answers, with marks replaced by their points."""
    counts = Counter(answer.texts)
    top = max(counts.values())
    best = [text for text in counts if counts[text] == top]
    said = best[int(rng.integers(len(best)))] if len(best) > 1 else best[0]
    for entry in answer.inline_points:
        groups = number_points([("1", [scale_point(point, (100, 100)) for point in entry.points])])
        said = said.replace(POINT_MARK, render(PointTag(groups, entry.label, entry.alt), point_format), 1)
    return f"{answer.explanation} Answer: {said}" if answer.explanation else said


def _scale(scale: tuple[float, float] | None, size: tuple[int, int] | None) -> tuple[float, float]:
    """The unit of coordinates: the annotation's scale, or the size (width, height) of the image or video in pixels."""
    if scale is not None:
        return scale
    if size is None:
        raise DataError("points need point_scale, width and height, or an image; none of these is given")
    return float(size[0]), float(size[1])


def _fill(template: str, **fields: str) -> str:
    """Fill the fields of a template; braces inside their values are left alone."""
    replace: Callable[[str], str] = lambda name: fields.get(name, "{" + name + "}")  # noqa: E731
    pieces = template.replace("{", "\0{").replace("}", "}\0").split("\0")
    return "".join(replace(p[1:-1]) if p.startswith("{") and p.endswith("}") else p for p in pieces)
