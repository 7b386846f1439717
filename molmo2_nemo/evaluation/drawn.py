"""The picture of an answer for reports, with the points of the answer and of its reference on it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.answer_points import Point, Size, image_points, multi_image_points, tracks, video_points
from molmo2_nemo.evaluation.point_references import NEAR_TIME, read_image_points, read_tracks, read_video_points


@dataclass(frozen=True)
class Marks:
    """What is drawn: (x, y, name) in pixels of `size`."""

    answered: list[tuple[float, float, str]]
    right: list[tuple[float, float, str]]
    size: Size


def shown_time(references: Sequence[Any]) -> float | None:
    """The time of a video at which its reference's points are shown: the middle one; None without times."""
    reference = references[0] if references and isinstance(references[0], Mapping) else {}
    times = reference.get("timestamps") or [
        frame["time"] for frame in reference.get("frames") or () if isinstance(frame, Mapping) and "time" in frame
    ]
    return float(sorted(times)[len(times) // 2]) if times else None


def marks(answer: str, references: Sequence[Any]) -> Marks | None:
    """The points of an answer and of its first reference, those at `shown_time` of a video and of the first of several
    images; None where the reference has no points."""
    reference = references[0] if references else None
    if not isinstance(reference, Mapping):
        return None
    try:
        if "frames" in reference:
            return _of_tracks(answer, reference, shown_time(references) or 0.0)
        if "timestamps" in reference:
            return _of_video(answer, reference, shown_time(references) or 0.0)
        return _of_image(answer, reference) if {"points", "images"} & set(reference) else None
    except UserError:  # no reference of points: the scorer says so
        return None


def with_marks(picture: str, answer: str, references: Sequence[Any]) -> str:
    """A picture, JPEG in base64, with the marks of an answer; itself where there are none."""
    found = marks(answer, references)
    if found is None:
        return picture
    from PIL import Image

    from molmo2_nemo.preview.marks import draw_answer

    out = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    draw_answer(image, found.answered, found.right, found.size).save(out, "JPEG", quality=85)
    return base64.b64encode(out.getvalue()).decode()


def _of_image(answer: str, reference: Mapping[str, Any]) -> Marks:
    images = read_image_points(reference)
    sizes = [image.size for image in images]
    answered = image_points(answer, sizes[0]) if len(images) == 1 else multi_image_points(answer, sizes)[0][0]
    return Marks(_unnamed(answered), _unnamed(images[0].points), sizes[0])


def _of_video(answer: str, reference: Mapping[str, Any], time: float) -> Marks:
    video = read_video_points(reference)
    answered, right = (
        [(x, y) for t, x, y in points if abs(t - time) <= NEAR_TIME]
        for points in (video_points(answer, video.size), video.points)
    )
    return Marks(_unnamed(answered), _unnamed(right), video.size)


def _of_tracks(answer: str, reference: Mapping[str, Any], time: float) -> Marks:
    read = read_tracks(reference)
    near = [(abs(t - time), points) for t, points in tracks(answer, read.size) if abs(t - time) <= NEAR_TIME]
    answered = min(near, key=lambda frame: frame[0])[1] if near else {}
    return Marks(_named(answered), _named(read.frames.get(read.key(time), {})), read.size)


def _unnamed(points: Sequence[Point]) -> list[tuple[float, float, str]]:
    return [(x, y, "") for x, y in points]


def _named(points: Mapping[str, Point]) -> list[tuple[float, float, str]]:
    return [(x, y, name) for name, (x, y) in points.items()]
