"""Whether training can use a record, decided where data are prepared, indexed and checked: every annotation is read and
worded as training does it, without pixels and without a tokenizer.

Two kinds of fault are told apart. `check_record` finds what training would refuse: it is the same code that training
runs (`read_tree`, `PromptFormatter`, `TimeSampler`, `checked_text`), over every alternative that may be drawn.
`check_meant` finds what training would take, but nobody can have meant: unknown fields and styles, blank texts, options
that come twice. Training itself asks only the former, so that shards written before keep loading.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from molmo2_nemo.data.annotations import (
    Alternatives,
    Annotation,
    Answer,
    Messages,
    QuestionAnswer,
    TurnAlternatives,
    TurnAnnotation,
)
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.json_values import Fault, FieldError
from molmo2_nemo.data.prompts import PromptFormatter, Turn, VisualContext
from molmo2_nemo.data.raw_text import RawText
from molmo2_nemo.data.record import BadRecord, Record, Tree
from molmo2_nemo.data.styles import style_of
from molmo2_nemo.data.video.sampling import TimeSampler
from molmo2_nemo.errors import DataError, UserError

OPENING = QuestionAnswer(style_of("user_qa"), "q", Answer(("a",)))  # any first turn that can be worded
LATER_TURN = re.compile(r"\.turns\[[1-9]")
WEIGHTS = (1e-30, 1e30)  # loss weights outside become 0 or infinite in float32 once they are scaled


@dataclass(frozen=True)
class View:
    """What is known of a record's media without decoding them."""

    image_sizes: tuple[tuple[int, int], ...] = ()  # pixels, width and height
    video_size: tuple[int, int] | None = None
    duration: float = 0.0  # seconds of the video that are shown
    fps: float = 0.0  # frames per second of the video
    lost: float = 0.0  # seconds after what is shown that the header of a cut-off film states


def checked_text(text: str, limit: int) -> str:
    """One message of a conversation.

    Raises:
        DataError: more characters than `data.limits.text_chars`, or half a character (a lone surrogate).
    """
    if len(text) > limit:
        raise DataError(f"a message of {len(text)} characters; at most {limit} are read (data.limits.text_chars)")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = text[max(error.start - 20, 0) : error.start]
        raise DataError(f"text is not valid Unicode: half a character after {place!r}") from None
    return text


def checked_document(text: str, config: DataConfig) -> str:
    """Raw text, which `data.limits.json_bytes` alone limits.

    Raises:
        DataError: a blank document, or half a character.
    """
    if not text.strip():
        raise DataError("the document is blank; nothing to train on")
    return checked_text(text, config.limits.json_bytes)


def checked_count(annotations: Sequence[Annotation | Alternatives], limit: int) -> None:
    """Check the number of annotations of one access.

    Raises:
        DataError: none, or more than `data.limits.annotations`.
    """
    if not annotations or len(annotations) > limit:
        raise DataError(f"a record needs 1 to {limit} annotations, got {len(annotations)} (data.limits.annotations)")


def check_record(record: Record, view: View, config: DataConfig | None = None) -> set[str]:
    """Build every conversation of a record once.

    Args:
        config: settings of training; the wordings of a stage do not matter, as none refuses what another takes.

    Returns:
        What an access may lose of the annotations without refusing the record: kinds of tally.py.
    Raises:
        BadRecord: training could not use it, or not at every access; `fault` names the field.
    """
    config = config or DataConfig()
    lost: set[str] = set()
    try:
        context = _context(record, view, config)
        _check_weights(record)
        formatter = PromptFormatter(config.text)
        for path, tree in drawn_trees(record):
            _at(path, partial(checked_count, tree, config.limits.annotations))
            for where, annotation in pieces(tree, path):
                later = LATER_TURN.search(where) is not None
                _at(where, partial(_check_turns, formatter, annotation, context, config, later, lost))
    except FieldError as error:
        raise BadRecord(record.key, "bad annotation", str(error), error.fault) from None
    return lost


def worded(record: Record, view: View, config: DataConfig, seed: int = 0) -> Iterator[tuple[str, list[Turn]]]:
    """Everything that an access may draw of a record that `check_record` accepts, with its path (see `pieces`), as
    training words it. A document is the answer of a turn without a question; later turns come without the first."""
    context, formatter = _context(record, view, config), PromptFormatter(config.text)
    for path, tree in drawn_trees(record):
        for where, annotation in pieces(tree, path):
            if isinstance(annotation.content, RawText):
                yield where, [Turn("", annotation.content.text)]
                continue
            later = LATER_TURN.search(where) is not None
            for turns in _wordings(formatter, annotation, context, later, seed):
                yield where, turns[later:]


def drawn_trees(record: Record) -> Iterator[tuple[str, Tree]]:
    """The lists of annotations that an access may draw, each with its path."""
    if not record.variants:
        yield "annotations", record.annotations
    for number, tree in enumerate(record.variants):
        if record.variant_weights is None or record.variant_weights[number] > 0:
            yield f"variants[{number}]", tree


def pieces(tree: Tree, path: str) -> Iterator[tuple[str, Annotation]]:
    """Every single turn or ready-made conversation of a tree, without alternatives, with its path."""
    for i, annotation in enumerate(tree):
        where = f"{path}[{i}]"
        if isinstance(annotation, Alternatives):
            for number, form in enumerate(annotation.forms):
                yield from _single(form, f"{where}.either[{number}]")
        else:
            yield from _single(annotation, where)


def _single(annotation: Annotation, path: str) -> Iterator[tuple[str, Annotation]]:
    content = annotation.content
    if not isinstance(content, tuple):
        yield path, annotation
        return
    for number, turn in enumerate(content):
        whole = annotation if number == 0 else Annotation(())
        where = f"{path}.turns[{number}]"
        if isinstance(turn, TurnAlternatives):
            for i, form in enumerate(turn.forms):
                yield f"{where}.either[{i}]", replace(whole, content=form)
        else:
            yield where, replace(whole, content=turn)


def _at(path: str, call: Callable[[], object]) -> object:
    """The result of `call`; an error without a field gets `path`."""
    try:
        return call()
    except FieldError as error:
        raise error.inside(path) from None
    except UserError as error:
        raise FieldError(Fault(path, "", str(error)), f"cannot be trained: {error}") from None


def _context(record: Record, view: View, config: DataConfig) -> VisualContext:
    if record.video is None:
        return VisualContext(image_sizes=view.image_sizes[: config.image.max_images])
    _at("subtitles", lambda: [checked_text(text, 2**62) for text in _subtitle_texts(record)])
    try:
        times = TimeSampler.of(config.video, record.sampling, view.fps)(view.duration)
    except (ArithmeticError, TypeError, ValueError) as error:  # UserError is a ValueError
        raise FieldError(Fault("sampling", str(record.sampling), str(error)), f"cannot be used: {error}") from None
    return VisualContext(video_size=view.video_size, frame_times=times)


def _subtitle_texts(record: Record) -> list[str]:
    if isinstance(record.subtitles, str):
        return [record.subtitles]
    return [line.text for line in record.subtitles]


def _check_weights(record: Record) -> None:
    for name in ("weight", "weight_factor"):
        value = getattr(record, name)
        if value is not None and not WEIGHTS[0] <= value <= WEIGHTS[1]:
            raise FieldError.wrong(name, "a number above 0; a record that is not to be trained is left out", value)


def _check_turns(
    formatter: PromptFormatter,
    annotation: Annotation,
    context: VisualContext,
    config: DataConfig,
    later: bool,
    lost: set[str],
) -> None:
    """Word every answer that may be drawn; `later`: the turn is not its conversation's first, so without a prefix.
    `lost` gets the kinds of what the texts lack."""
    if isinstance(annotation.content, RawText):
        checked_document(annotation.content.text, config)
        return
    for turns in _wordings(formatter, annotation, context, later):
        for turn in turns:
            checked_text(turn.user, config.limits.text_chars)
            checked_text(turn.answer, config.limits.text_chars)
            lost.update(turn.lost)


def _wordings(
    formatter: PromptFormatter, annotation: Annotation, context: VisualContext, later: bool, seed: int = 0
) -> Iterator[list[Turn]]:
    """The annotation with each answer that may be drawn, worded once; `later`: after an opening turn."""
    for form in _with_each_answer(annotation):
        whole = replace(form, content=(OPENING, form.content)) if later else form  # type: ignore[arg-type]
        yield formatter.conversation(whole, context, np.random.default_rng(seed))


def _with_each_answer(annotation: Annotation) -> Iterator[Annotation]:
    """The annotation with each of the answers that may be drawn: the most frequent ones of several annotators."""
    content = annotation.content
    answer = getattr(content, "answer", None)
    if not isinstance(answer, Answer) or len(answer.texts) == 1 or isinstance(content, (RawText, Messages, tuple)):
        yield annotation
        return
    counts = Counter(answer.texts)
    top = max(counts.values())
    for text, count in counts.items():
        if count == top:
            yield replace(annotation, content=_answering(content, replace(answer, texts=(text,))))


def _answering(content: TurnAnnotation, answer: Answer) -> TurnAnnotation:
    return replace(content, answer=answer)  # type: ignore[call-arg, arg-type]
