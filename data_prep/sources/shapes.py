"""Constructors of annotations: question and answer, multiple choice, caption, conversation, points, tracks.

They return annotations as stored in a record, which molmo2_nemo/data/annotations.py reads. The `style` selects the
wording.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_prep.sources.base import AnnotationJson
from data_prep.sources.counting import asks_for_count

if TYPE_CHECKING:
    import numpy as np


def qa(question: str, answer: str | Sequence[str], style: str = "user_qa", *, explanation: str = "") -> AnnotationJson:
    """A question with its answer, or with several answers; training uses the most frequent one (ties at random).

    With an explanation the model answers "<explanation> Answer: <answer>".
    """
    made: AnnotationJson = {"style": style, "question": question}
    if isinstance(answer, str):
        made["answer"] = answer
    else:
        made["answers"] = list(answer)
    if explanation:
        made["explanation"] = explanation
    return made


def choice(
    question: str,
    options: Sequence[str],
    answer_idx: int,
    style: str = "video_multiple_choice",
    *,
    unlabelled: bool = False,
    shuffle: bool = False,
) -> AnnotationJson:
    """Multiple choice. `unlabelled`: the options already are labels (letters in the image).

    The options keep the data set's order; with `shuffle` training draws another order at every access.
    """
    made: AnnotationJson = {
        "style": style,
        "question": question,
        "options": list(options),
        "answer_idx": int(answer_idx),
    }
    if unlabelled:
        made["unlabelled_options"] = True
    if shuffle:
        made["shuffle_options"] = True
    return made


def shuffled_choice(
    question: str,
    correct: str,
    wrong: Sequence[str],
    rng: np.random.Generator,
    style: str = "video_multiple_choice",
) -> AnnotationJson:
    """Multiple choice with the correct answer inserted at random among the wrong ones, which keep their order."""
    options = list(wrong)
    place = int(rng.integers(len(options) + 1))
    options.insert(place, correct)
    return choice(question, options, place, style)


def caption(text: str, style: str = "long_caption") -> AnnotationJson:
    """A description; training draws the prompt that asks for it."""
    return {"style": style, "text": text}


def conversation(turns: Sequence[str], style: str = "text_sft") -> AnnotationJson:
    """Ready-made turns: user, assistant, user, assistant."""
    return {"style": style, "messages": list(turns)}


def no_pointing(annotation: AnnotationJson) -> AnnotationJson:
    """The annotation with its questions that ask for a number marked; training adds a request not to point to them."""
    asked = annotation["messages"][::2] if "messages" in annotation else [annotation["question"]]
    counting = [i for i, question in enumerate(asked) if asks_for_count(question)]
    return {**annotation, "no_pointing": counting} if counting else annotation


def turns(annotations: Sequence[AnnotationJson], style: str) -> AnnotationJson:
    """Several annotations as turns of one conversation, instead of separate branches."""
    return {"style": style, "turns": list(annotations)}


def either(annotation: AnnotationJson, *fields: Mapping[str, Any]) -> AnnotationJson:
    """An annotation with alternatives: every access draws one of `fields` to override its fields ({} = as it is)."""
    return {**annotation, "either": [dict(form) for form in fields]}


def points(
    label: str,
    where: Iterable[Sequence[float]],
    style: str = "pointing",
    *,
    scale: float | None = 100,
    question: str | None = None,
) -> AnnotationJson:
    """Points in one image. `scale`: the coordinate of the right and bottom edge (100 = percent); None = pixels."""
    made: AnnotationJson = {"style": style, "label": label, "points": [[float(x), float(y)] for x, y in where]}
    return _with(made, point_scale=scale, question=question)


def image_points(
    label: str,
    per_image: Iterable[Iterable[Sequence[float]]],
    style: str = "multi_image_pointing",
    *,
    scale: float | None = 100,
) -> AnnotationJson:
    """Points in several images: one list per image, in the order of the sample's images."""
    groups = [[[float(x), float(y)] for x, y in group] for group in per_image]
    return _with({"style": style, "label": label, "points": groups}, point_scale=scale)


def video_points(
    label: str,
    timestamps: Sequence[float],
    per_time: Iterable[Iterable[Sequence[float]]],
    style: str = "video_point",
    *,
    scale: float | None = 100,
    question: str | None = None,
) -> AnnotationJson:
    """Points in a video: one list per timestamp; seconds from the start of the clip."""
    groups = [[[float(x), float(y)] for x, y in group] for group in per_time]
    made: AnnotationJson = {
        "style": style,
        "label": label,
        "timestamps": [float(t) for t in timestamps],
        "points": groups,
    }
    return _with(made, point_scale=scale, question=question)


def track(
    label: str,
    frames: Iterable[Mapping[str, Any]] | None,
    style: str = "video_point_track_per_frame",
    *,
    size: tuple[float, float],
    sampling_fps: float,
) -> AnnotationJson:
    """Objects tracked through a video.

    Args:
        frames: {time: seconds, points: {object: {point: [x, y] pixels, occluded: bool}}}, optionally with `frame`; None
            when the object never appears.
        size: width and height in pixels that the points are measured in.
        sampling_fps: frames per second of the answer.
    """
    made: AnnotationJson = {"style": style, "label": label, "sampling_fps": sampling_fps}
    if frames is not None:
        made["points"] = sorted((dict(frame) for frame in frames), key=lambda frame: frame["time"])
    return _with(made, width=size[0], height=size[1])


def _with(annotation: AnnotationJson, **more: Any) -> AnnotationJson:
    annotation.update({name: value for name, value in more.items() if value is not None})
    return annotation
