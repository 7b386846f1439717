"""Pointing at a part of a screen, as of ScreenSpot-v2, ScreenSpot-Pro and OSWorld-G: the first point is in the box.

1 if the answer has a point and its first one lies in the box or on its edge; else 0. A reference is
{"box": [left, top, right, bottom], "size": [width, height]} in pixels of `size`. OSWorld-G (arXiv 2505.13227) has two
kinds more: {"polygon": [[x, y], ...], "size": ...}, inside by the even-odd rule, and {"absent": true, "size": ...},
something that is not on the screen: 1 if the answer has no point.

    >>> reference = {"box": [0, 0, 10, 10], "size": [100, 100]}
    >>> SCORER.score('<points coords="1 1 100 100 2 900 900">it</points>', [reference]).value
    1.0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from molmo2_nemo.data.json_values import is_number
from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.answer_points import Point, Size, image_points
from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.point_references import read_each, read_size

Region = Callable[[Sequence[Point]], bool]  # whether the points of an answer are right


def read(reference: Any) -> tuple[Region, Size]:
    """Raises UserError: not a reference of this scorer."""
    kinds: dict[str, Callable[[Any], Region]] = {"box": _box, "polygon": _polygon, "absent": _absent}
    named = [kind for kind in kinds if isinstance(reference, Mapping) and set(reference) == {kind, "size"}]
    if not named:
        raise UserError(f"the reference has {str(reference)[:60]}; expected an object with box and size")
    return kinds[named[0]](reference[named[0]]), read_size(reference)


def _box(box: Any) -> Region:
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(is_number, box)):
        raise UserError(f"the reference's box is {str(box)[:60]}; expected [left, top, right, bottom] in pixels")
    left, top, right, bottom = box
    if left > right or top > bottom:
        raise UserError(
            f"the reference's box is {box}; expected left <= right and top <= bottom, not a width and height"
        )
    return lambda points: bool(points) and left <= points[0][0] <= right and top <= points[0][1] <= bottom


def _polygon(corners: Any) -> Region:
    if not isinstance(corners, list | tuple) or len(corners) < 3 or not all(map(_is_point, corners)):
        raise UserError(f"the reference's polygon is {str(corners)[:60]}; expected three or more [x, y] in pixels")
    return lambda points: bool(points) and inside(points[0], corners)


def _is_point(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value))


def inside(point: Point, corners: Sequence[Sequence[float]]) -> bool:
    """Whether a ray from a point to the right crosses the polygon's edges an odd number of times."""
    x, y = point
    crossed = 0
    for (x1, y1), (x2, y2) in zip(corners, [*corners[1:], corners[0]], strict=True):
        if (y1 > y) != (y2 > y):
            crossed += x < x1 + (y - y1) / (y2 - y1) * (x2 - x1)
    return crossed % 2 == 1


def _absent(value: Any) -> Region:
    if value is not True:
        raise UserError(f"the reference's absent is {value!r}; expected true")
    return lambda points: not points


class PointInBox(Scorer):
    name = "point_in_box"
    title = "the answer's first point is in the box"

    def check(self, references: Sequence[Any]) -> None:
        list(read_each(self.name, references, read))

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        best, count = 0.0, 0
        for right, size in read_each(self.name, references, read):
            points = image_points(prediction, size)
            best, count = max(best, float(right(points))), len(points)
        return Score(best, {"answered": count})


SCORER = PointInBox()
