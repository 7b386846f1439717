"""Pointing at what is asked for, as of Point-Bench (PointArena, arXiv 2505.09990): all points are in one mask.

1 if the answer has a point and the pixel of each, rounded down, is in the image and in the mask; else 0. A reference
is {"mask": mask, "size": [width, height]}, with `size` that of the image in pixels; a mask may have another (some
published ones do), and is not scaled.

    >>> mask = {"size": [10, 10], "counts": [0, 50, 50]}  # the left half
    >>> SCORER.score('<points coords="1 1 100 100 2 499 900">it</points>', [{"mask": mask, "size": [10, 10]}]).value
    1.0
    >>> SCORER.score('<points coords="1 1 100 100 2 501 900">it</points>', [{"mask": mask, "size": [10, 10]}]).value
    0.0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.answer_points import Size, image_points
from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.masks import Mask, read_mask
from molmo2_nemo.evaluation.point_references import read_each, read_size


def read(reference: Any) -> tuple[Mask, Size]:
    """Raises UserError: not a reference of this scorer."""
    if not isinstance(reference, Mapping) or set(reference) != {"mask", "size"}:
        raise UserError(f"the reference has {str(reference)[:60]}; expected an object with mask and size")
    return read_mask(reference["mask"]), read_size(reference)


class PointInMask(Scorer):
    name = "point_in_mask"
    title = "the answer has points, and all are in the mask"

    def check(self, references: Sequence[Any]) -> None:
        list(read_each(self.name, references, read))

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        best, count = 0.0, 0
        for mask, (width, height) in read_each(self.name, references, read):
            points = image_points(prediction, (width, height))
            inside = [0 <= x < width and 0 <= y < height and mask.covers(int(x), int(y)) for x, y in points]
            best, count = max(best, float(bool(points) and all(inside))), len(points)
        return Score(best, {"answered": count})


SCORER = PointInMask()
