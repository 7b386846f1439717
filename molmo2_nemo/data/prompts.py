"""Annotations -> what the user says and what the model answers.

Every annotation has a `style`; the style picks the task (caption, question, choice, points, track), a wording from
`templates.py` and the prefix that tells styles apart. Randomness comes from the generator passed in, so the same
generator state gives the same text. Chat tokens are not made here: see `Molmo2Tokenizer.user_turn`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from molmo2_nemo.data import templates as words
from molmo2_nemo.data.choices import plain_choice, random_choice, standard_choice
from molmo2_nemo.data.config import TextFormatConfig
from molmo2_nemo.data.points import (
    NONE_TEXT,
    SEPARATORS,
    PointTag,
    count_text,
    first_and_last,
    number_points,
    on_grid,
    render,
    scale_point,
    seconds_text,
    seen_track_frames,
    track_text,
)
from molmo2_nemo.data.styles import (
    CAPTIONS,
    DEMO_STYLES,
    MC_STYLES,
    POINT_MODES,
    POINT_WORDS,
    TIMED_CAPTIONS,
    TRACK_STYLES,
    UNCONDITIONED_STYLES,
    canonical_style,
)
from molmo2_nemo.errors import DataError, UserError

P_ALL_IMAGES = 0.5  # chance that a multi-image pointing prompt is about all pictures
P_UNCONDITIONED = 0.1  # chance that a stage-1 prefix says nothing about the length
LENGTH_UNIT, LENGTH_NOISE = 15, 25  # characters; the prefix says (length + noise) // unit
P_OTHER_START = 0.2  # chance that single-object tracking starts at another than the first visible point
MAIN_OBJECT = "main subject"  # what an object caption without `object` is about
POINT_MARK = "<|POINT|>"  # in an answer: replaced by the points of the next answer annotation


@dataclass(frozen=True)
class VisualContext:
    """What a text may refer to: sizes in pixels (width, height) and, for videos, the sampled moments."""

    image_sizes: tuple[tuple[int, int], ...] = ()
    video_size: tuple[int, int] | None = None
    frame_times: np.ndarray = field(default_factory=lambda: np.zeros(0))  # float64 [n], seconds


@dataclass(slots=True)
class Turn:
    """One exchange."""

    user: str
    answer: str


class PromptFormatter:
    """Turns annotations into conversations, with the settings of a stage."""

    def __init__(self, config: TextFormatConfig, *, training: bool = True, inference_length: int | None = 65):
        """`inference_length`: the length (in units of 15 characters) that stage-1 prefixes ask for outside training."""
        known = {
            "text.prompt_templates": (config.prompt_templates, ("none", "uber_model_v2")),
            "text.system_prompt": (config.system_prompt, ("style_and_length_v2", "demo_or_style_v2")),
            "text.point_format": (config.point_format, tuple(SEPARATORS)),
        }
        for name, (value, choices) in known.items():
            if value not in choices:
                raise UserError(f"unknown {name} {value!r}; known: {', '.join(choices)}")
        self.config = config
        self.training = training
        self.inference_length = inference_length
        self.templated = config.prompt_templates != "none"

    def conversation(
        self, annotation: Mapping[str, Any], context: VisualContext, rng: np.random.Generator
    ) -> list[Turn]:
        """The exchanges of one annotation, the style's prefix on the first.

        Raises:
            DataError: a field the style needs is missing or wrong; the message names style and field.
        """
        annotation = _drawn(annotation, rng)
        style = str(annotation.get("style", ""))
        try:
            return self._conversation(annotation, style, context, rng)
        except (KeyError, TypeError, AttributeError) as error:
            what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"annotation of style {style!r} cannot be read: {what}") from error

    def question(
        self, question: str, style: str, rng: np.random.Generator, *, options: Sequence[str] | None = None
    ) -> str:
        """The user's text for inference: the same wrapping as in training, no answer."""
        text = standard_choice(question, options, None)[0] if options else question
        return join_prefix(self.prefix(canonical_style(style, self.training), "", rng), text)

    def prefix(self, style: str, answer: str, rng: np.random.Generator) -> str:
        """The words before the prompt that name the style and, in stage 1, the length of the answer ("" if none)."""
        if self.config.system_prompt == "demo_or_style_v2":
            return "" if style in DEMO_STYLES or style in MC_STYLES else f"{style}:"
        if style in UNCONDITIONED_STYLES:
            return f"{style}:"
        if not self.training:
            return f"{style} {self.inference_length}:" if self.inference_length else f"{style}:"
        if rng.random() <= P_UNCONDITIONED:
            return f"{style}:"
        return f"{style} {(len(answer) + int(rng.normal(scale=LENGTH_NOISE))) // LENGTH_UNIT}:"

    def _conversation(
        self, annotation: Mapping[str, Any], style: str, context: VisualContext, rng: np.random.Generator
    ) -> list[Turn]:
        if annotation.get("messages"):
            texts = annotation["messages"]
            if len(texts) % 2:
                raise DataError(f"messages must alternate user and assistant and end with an answer; got {len(texts)}")
            turns = [Turn(user, answer) for user, answer in zip(texts[::2], texts[1::2], strict=True)]
        elif annotation.get("turns"):  # several annotations, one after the other in one conversation
            drawn = [_drawn(part, rng) for part in annotation["turns"]]
            parts = [self._single(part, str(part.get("style", style)), context, rng) for part in drawn]
            style, turns = parts[0][0], [turn for _, turn in parts]
        else:
            style, turn = self._single(annotation, style, context, rng)
            turns = [turn]
        if annotation.get("prompt"):
            turns[0].user = annotation["prompt"]
        for number in annotation.get("no_pointing", ()):
            turns[number].user = _pick(rng, words.NO_POINTING) + turns[number].user
        prefix = self.prefix(canonical_style(style, self.training), turns[-1].answer, rng)
        turns[0].user = join_prefix(prefix, turns[0].user)
        return turns

    def _single(
        self, annotation: Mapping[str, Any], style: str, context: VisualContext, rng: np.random.Generator
    ) -> tuple[str, Turn]:
        """One exchange and the style its prefix names (a style may become `..._in_seconds`)."""
        question = annotation.get("question")
        if style in TRACK_STYLES:
            return style, self._track(annotation, style, context, rng)
        if style in POINT_MODES and "points" in annotation:
            return style, self._points(annotation, style, context, rng)
        if question is not None and annotation.get("options") is not None:
            return style, self._choice(annotation, question, rng)
        answer = plain_answer(annotation, self.config.point_format, rng)
        if not answer.strip():
            raise DataError(f"annotation of style {style!r} has an empty answer")
        if style in POINT_MODES:
            return style, Turn(self._point_prompt(annotation, style, rng), answer)
        if not self.templated:
            return style, Turn(question or "", answer)
        if question is None and style in CAPTIONS:
            what = str(annotation.get("object") or MAIN_OBJECT)
            return style, Turn(_fill(_pick(rng, CAPTIONS[style]), object=what), answer)
        if style in TIMED_CAPTIONS:
            return self._timed_caption(annotation, style, answer, rng)
        if question is not None and canonical_style(style, self.training) == "video_short_answer":
            return style, Turn(_fill(_pick(rng, words.VIDEO_SHORT_ANSWER), question=question), answer)
        if question is not None and "_exp" in style:
            return style, Turn(_fill(_pick(rng, words.EXPLAIN), question=question), answer)
        return style, Turn(question or "", answer)

    def _choice(self, annotation: Mapping[str, Any], question: str, rng: np.random.Generator) -> Turn:
        options, answer = annotation["options"], int(annotation["answer_idx"])
        if self.training and annotation.get("shuffle_options"):
            order = rng.permutation(len(options))
            options, answer = [options[i] for i in order], int(np.flatnonzero(order == answer)[0])
        unlabelled = bool(annotation.get("unlabelled_options"))
        if not self.templated:
            return Turn(*plain_choice(question, options, answer))
        if not self.training:
            return Turn(*standard_choice(question, options, answer, unlabelled=unlabelled))
        return Turn(*random_choice(question, options, answer, rng, unlabelled=unlabelled))

    def _timed_caption(
        self, annotation: Mapping[str, Any], style: str, answer: str, rng: np.random.Generator
    ) -> tuple[str, Turn]:
        as_seconds = bool(rng.random() > 0.5)
        fields = ("time",) if style == "video_frame_caption_timestamp" else ("start", "end")
        times = {name: time_text(float(annotation[name]), as_seconds) for name in fields}
        text = _fill(_pick(rng, TIMED_CAPTIONS[style]), **times)
        return style + ("_in_seconds" if as_seconds else ""), Turn(text, answer)

    # --- points -----------------------------------------------------------------------------------------------------

    def _points(
        self, annotation: Mapping[str, Any], style: str, context: VisualContext, rng: np.random.Generator
    ) -> Turn:
        mode = POINT_MODES[style]
        if style.startswith("multi_image"):
            return self._multi_image_points(annotation, style, context, rng)
        if style.startswith("video"):
            size = _scale(annotation, context.video_size)
            pairs = zip(annotation["timestamps"], annotation["points"], strict=True)
            groups = [(seconds_text(t), [scale_point(p, size) for p in points]) for t, points in pairs]
        else:
            size = _scale(annotation, context.image_sizes[0] if context.image_sizes else None)
            groups = [("1", [scale_point(p, size) for p in annotation["points"]])]
        tag = PointTag(number_points(groups), _label(annotation, style))
        return Turn(self._point_prompt(annotation, style, rng), count_text(mode, tag, self.config.point_format))

    def _point_prompt(
        self, annotation: Mapping[str, Any], style: str, rng: np.random.Generator, *, images: str | None = None
    ) -> str:
        if annotation.get("question"):
            return annotation["question"]
        label = _label(annotation, style)
        if not self.templated:
            return label
        kind = "multi_image" if images else "video" if style.startswith("video") else "image"
        return _fill(_pick(rng, POINT_WORDS[kind][POINT_MODES[style]]), label=label, images=images or "")

    def _multi_image_points(
        self, annotation: Mapping[str, Any], style: str, context: VisualContext, rng: np.random.Generator
    ) -> Turn:
        count = min(len(context.image_sizes), len(annotation["points"]))
        if count == 0:
            raise DataError(f"annotation of style {style!r} needs pictures and one list of points for each")
        if not self.templated or count == 1 or rng.random() < P_ALL_IMAGES:
            chosen, phrase = list(range(count)), "all images"
        else:
            chosen = [int(i) for i in rng.permutation(count)[: int(rng.integers(1, count + 1))]]
            phrase = ", ".join(f"image_{i + 1}" for i in chosen)
        groups = []
        for i in chosen:
            size = _scale(annotation, context.image_sizes[i])
            groups.append((str(i + 1), [scale_point(p, size) for p in annotation["points"][i]]))
        as_single = style == "multi_image_pointing" and phrase == "all images" and rng.random() < 0.5
        tag = PointTag(number_points(groups), _label(annotation, style))
        wording, images = ("pointing", None) if as_single else (style, phrase)
        prompt = self._point_prompt(annotation, wording, rng, images=images)
        return Turn(prompt, count_text(POINT_MODES[style], tag, self.config.point_format))

    # --- tracks -----------------------------------------------------------------------------------------------------

    def _track(
        self, annotation: Mapping[str, Any], style: str, context: VisualContext, rng: np.random.Generator
    ) -> Turn:
        task = TRACK_STYLES[style]
        label, point_format = str(annotation.get("label", "")), self.config.point_format
        fps = int(annotation.get("sampling_fps") or 2)
        size = _scale(annotation, context.video_size)
        frames = sorted(annotation.get("points") or [], key=lambda f: f["time"])
        seen = seen_track_frames(frames, context.frame_times)
        kept = on_grid(seen, fps) if task.on_grid else seen
        if task.ends_only:
            kept = first_and_last(kept)
        fields = {"label": label, "fps": str(fps)}
        if task.from_point and frames:
            point, time = self._start(seen, frames, rng)
            groups = number_points([(seconds_text(time), [scale_point(point, size)])])
            fields["point"] = render(PointTag(groups, label), point_format)
            kept = [frame for frame in kept if frame["time"] > time]
        elif task.from_point:
            fields["point"] = label  # nobody can be followed; the answer says so
        wordings = task.wordings
        if fps == 2 and task.wordings_no_fps and rng.random() < 0.5:
            wordings = task.wordings_no_fps
        prompt = _fill(_pick(rng, wordings), **fields) if self.templated else fields.get("point", label)
        answer = track_text(kept, size, label, point_format) if frames else NONE_TEXT
        return Turn(annotation.get("question") or prompt, answer)

    def _start(
        self, seen: Sequence[Mapping[str, Any]], frames: Sequence[Mapping[str, Any]], rng: np.random.Generator
    ) -> tuple[Sequence[float], float]:
        """Where and when a single object's track starts: where it is first visible to the model, sometimes later; if
        it never is, where it is first annotated."""
        for some in (seen, frames):
            visible = [
                (entry["point"], float(frame["time"]))
                for frame in some
                for entry in frame["points"].values()
                if not entry.get("occluded", False)
            ]
            if visible:
                other = self.training and rng.random() < P_OTHER_START
                return visible[int(rng.integers(len(visible)))] if other else visible[0]
        raise DataError("single-object tracking needs a visible point")


def _drawn(annotation: Mapping[str, Any], rng: np.random.Generator) -> Mapping[str, Any]:
    """The annotation with one of its `either` (fields that go before its own) laid over it, drawn at every access."""
    either = annotation.get("either")
    return {**annotation, **either[int(rng.integers(len(either)))]} if either else annotation


def join_prefix(prefix: str, prompt: str) -> str:
    """Prefix and prompt with one space between, or whichever is there."""
    return f"{prefix} {prompt}" if prefix and prompt else prefix or prompt


def time_text(seconds: float, as_seconds: bool) -> str:
    """A moment as seconds (`65.2`) or as a clock (`00:01:05.2`)."""
    rounded = round(seconds, 1)
    if as_seconds:
        return str(rounded)
    minutes, rest = divmod(rounded, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours:02d}:{minutes:02d}:{rest:04.1f}"


def plain_answer(annotation: Mapping[str, Any], point_format: str, rng: np.random.Generator) -> str:
    """The answer an annotation holds as text: most frequent of `answers`, `answer`, `answer_with_points` or `text`."""
    if annotation.get("answers"):
        counts = Counter(annotation["answers"])
        top = max(counts.values())
        best = [answer for answer in counts if counts[answer] == top]
        return best[int(rng.integers(len(best)))] if len(best) > 1 else best[0]
    if "answer" in annotation:
        answer = annotation["answer"]
        for entry in annotation.get("answer_annotations", ()):
            groups = number_points([("1", [scale_point(point, (100, 100)) for point in entry["points"]])])
            tag = PointTag(groups, entry["inline_text"], entry.get("alt_text"))
            answer = answer.replace(POINT_MARK, render(tag, point_format), 1)
        explanation = annotation.get("explanation")
        return f"{explanation} Answer: {answer}" if explanation else answer
    for name in ("answer_with_points", "text"):
        if name in annotation:
            return annotation[name]
    raise DataError(f"annotation of style {annotation.get('style')!r} has no answer (answer, answers or text)")


def _label(annotation: Mapping[str, Any], style: str) -> str:
    """The name of what is pointed at: lower case for pictures unless `label_cased` says otherwise."""
    if annotation.get("label_cased"):
        return annotation["label_cased"]
    return annotation["label"] if style.startswith("video") else annotation["label"].lower()


def _scale(annotation: Mapping[str, Any], size: tuple[int, int] | None) -> tuple[float, float]:
    """What coordinates are measured in: `point_scale`, the annotation's width and height, or the picture's pixels."""
    if annotation.get("point_scale"):
        return float(annotation["point_scale"]), float(annotation["point_scale"])
    if annotation.get("width") and annotation.get("height"):
        return float(annotation["width"]), float(annotation["height"])
    if size is None:
        raise DataError("points need point_scale, width and height, or a picture; none is there")
    return float(size[0]), float(size[1])


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _fill(template: str, **fields: str) -> str:
    """Put fields into a template; braces inside the fields are left alone."""
    replace: Callable[[str], str] = lambda name: fields.get(name, "{" + name + "}")  # noqa: E731
    pieces = template.replace("{", "\0{").replace("}", "}\0").split("\0")
    return "".join(replace(p[1:-1]) if p.startswith("{") and p.endswith("}") else p for p in pieces)
