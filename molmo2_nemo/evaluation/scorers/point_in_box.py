"""Pointing at a part of a screen, as of ScreenSpot-v2, ScreenSpot-Pro and OSWorld-G: the first point is in the box.

1 if the answer has a point and its first one lies in the box or on its edge; else 0. A reference is
{"box": [left, top, right, bottom], "size": [width, height]} in pixels of `size`.

    >>> reference = {"box": [0, 0, 10, 10], "size": [100, 100]}
    >>> SCORER.score('<points coords="1 1 100 100 2 900 900">it</points>', [reference]).value
    1.0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from molmo2_nemo.data.json_values import is_number
from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.answer_points import Size, image_points
from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.point_references import read_each, read_size


def read(reference: Any) -> tuple[Sequence[float], Size]:
    """Raises UserError: not a reference of this scorer."""
    if not isinstance(reference, Mapping) or set(reference) != {"box", "size"}:
        raise UserError(f"the reference has {str(reference)[:60]}; expected an object with box and size")
    box = reference["box"]
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(is_number, box)):
        raise UserError(f"the reference's box is {str(box)[:60]}; expected [left, top, right, bottom] in pixels")
    if box[0] > box[2] or box[1] > box[3]:
        raise UserError(
            f"the reference's box is {box}; expected left <= right and top <= bottom, not a width and height"
        )
    return box, read_size(reference)


class PointInBox(Scorer):
    name = "point_in_box"
    title = "the answer's first point is in the box"

    def check(self, references: Sequence[Any]) -> None:
        list(read_each(self.name, references, read))

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        best, count = 0.0, 0
        for (left, top, right, bottom), size in read_each(self.name, references, read):
            points = image_points(prediction, size)
            inside = bool(points) and left <= points[0][0] <= right and top <= points[0][1] <= bottom
            best, count = max(best, float(inside)), len(points)
        return Score(best, {"answered": count})


SCORER = PointInBox()
