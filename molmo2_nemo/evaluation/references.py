"""What a record's annotation says is right, as scorers want it, and which scorers go with its style."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from molmo2_nemo.data.annotations import (
    Answer,
    MultiImagePoints,
    MultipleChoice,
    Points,
    PointsInWords,
    QuestionAnswer,
    TimedCaption,
    Tracks,
    TurnAnnotation,
    VideoPoints,
)
from molmo2_nemo.data.styles import Kind, Style, canonical_style
from molmo2_nemo.evaluation.answer_points import multi_image_points, tracks
from molmo2_nemo.evaluation.choice import choice_reference

WORDS, CHOICE, COUNT = "exact_match", "multiple_choice", "counting"
CAPTION: tuple[str, ...] = ("caption_recall", "caption_length")
POINTS, VIDEO_POINTS, TRACKS = "pointing", "video_point", "track"
POINT_COUNT, VIDEO_COUNT = "point_count", "video_point_count"
OF_STYLE = {  # of questions with a text as their answer; the others are compared word by word
    **dict.fromkeys(("vqa2", "okvqa", "a_okvqa_da", "text_vqa", "eval_short_answer"), "vqa_accuracy"),
    **dict.fromkeys(("doc_qa", "info_qa", "st_qa"), "anls"),
    **dict.fromkeys(("chart_qa", "plot_qa", "figure_qa", "dv_qa"), "relaxed_accuracy"),
    "tally_qa": COUNT,
}
ANNOTATORS = 3  # with fewer answers, there is no VQA accuracy
Size = tuple[float, float]
Expected = tuple[tuple[str, ...], tuple[Any, ...]]  # scorers, references


def expected(entry: TurnAnnotation, text: str, sizes: Sequence[Size]) -> Expected:
    """The scorers that `--tasks auto` takes for one turn, and its references.

    Args:
        text: of the answer, as training would have it.
        sizes: width and height of each image, or of the video, in pixels.
    """
    names, references = _expected(entry, text, sizes)
    return names, (text,) if names == (WORDS,) and not isinstance(entry, QuestionAnswer) else references


def _expected(entry: TurnAnnotation, text: str, sizes: Sequence[Size]) -> Expected:
    match entry:
        case Tracks():
            size = _size(entry.scale, sizes)
            frames = [{"time": time, "points": points} for time, points in tracks(text, (size[0], size[1]))]
            return (TRACKS,), ({"frames": frames, "size": size},)
        case Points(style) if style.count == "count":
            return (COUNT,), (text,)
        case Points():
            return _counted(entry.style, POINTS, POINT_COUNT), (_at(entry.points, entry.scale, sizes),)
        case VideoPoints(style) if style.count == "count":
            return (COUNT,), (text,)
        case VideoPoints():
            groups = [_at(group, entry.scale, sizes)["points"] for group in entry.points]
            at = {"timestamps": list(entry.timestamps), "points": groups, "size": _size(None, sizes)}
            return _counted(entry.style, VIDEO_POINTS, VIDEO_COUNT), (at,)
        case MultiImagePoints():
            asked, _ = multi_image_points(text, sizes)  # a question may be about some of the images only
            pairs = zip(entry.points, asked, sizes, strict=False)
            images = [_at(group if found else (), entry.scale, [size]) for group, found, size in pairs]
            return _counted(entry.style, POINTS, POINT_COUNT), ({"images": images},)
        case MultipleChoice(_, _, options, answer, unlabelled=unlabelled):
            return (CHOICE,), (choice_reference(answer, options, unlabelled=unlabelled),)
        case PointsInWords():
            return (COUNT if _is_number(text) else WORDS,), (text,)
        case QuestionAnswer(style, _, answer):
            names = CAPTION if style.kind is Kind.CAPTION else (_of_answers(style, answer),)
            return names, _texts(answer, text)
        case _:
            short = isinstance(entry, TimedCaption) and len(text.split()) < 4
            return (WORDS,) if short else CAPTION, (text,)


def _counted(style: Style, scorer: str, counter: str) -> tuple[str, ...]:
    """The scorers of points, and of their number where the answer says it too."""
    return (scorer, counter) if style.count in ("point_count", "count_point") else (scorer,)


def _of_answers(style: Style, answer: Answer) -> str:
    scorer = OF_STYLE.get(canonical_style(style.name), OF_STYLE.get(style.name, WORDS))
    return WORDS if scorer == "vqa_accuracy" and len(answer.texts) < ANNOTATORS else scorer


def _texts(answer: Answer, text: str) -> tuple[str, ...]:
    """The answers of all annotators, or the only one with its points and explanation."""
    return answer.texts if len(answer.texts) > 1 else (text,)


def _is_number(text: str) -> bool:
    return text.strip().isdecimal()


def _size(scale: Size | None, sizes: Sequence[Size]) -> list[float]:
    width, height = scale or (sizes[0] if sizes else (100.0, 100.0))
    return [float(width), float(height)]


def _at(points: Sequence[tuple[float, float]], scale: Size | None, sizes: Sequence[Size]) -> dict[str, Any]:
    """Points in pixels of the first of `sizes`, whatever unit (`scale`, pixels where there is none) they come in."""
    width, height = _size(None, sizes)
    across, down = scale or (width, height)
    return {"points": [[x / across * width, y / down * height] for x, y in points], "size": [width, height]}
