"""Pointing at things in images: F1 of points against points, matched one to one (Molmo, arXiv 2409.17146; Molmo2).

Points of the answer and of the reference are matched so that the sum of distances is least (Hungarian matching). A
matched point is right if its pixel, rounded, is in the mask of the reference's point; without masks, if it is near
(`point_references`).

    precision = right / points of the answer        recall = right / points of the reference
    F1 = 2 * precision * recall / (precision + recall)

Where the reference has no point, all three are 1 for an answer without a point and 0 for another. The score of a data
set is the mean of F1. In several images matching stays within an image, and right points, answered and expected ones
are counted over all of them; points in an image that is not there are wrong.

    >>> reference = {"points": [[10, 10], [90, 90]], "size": [100, 100]}
    >>> SCORER.score('<points coords="1 1 100 120 2 500 500">cups</points>', [reference]).details
    {'precision': 0.5, 'recall': 0.5, 'right': 1, 'answered': 2, 'expected': 2}
    >>> SCORER.score("There are none.", [{"points": [], "size": [100, 100]}]).value
    1.0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from molmo2_nemo.evaluation.answer_points import Point, image_points, multi_image_points
from molmo2_nemo.evaluation.assignment import nearest_pairs
from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.hits import Hits, best, means
from molmo2_nemo.evaluation.point_references import ImagePoints, read_each, read_image_points


def right_points(answered: Sequence[Point], reference: ImagePoints) -> int:
    """How many points of an answer are right, in one image."""
    pairs = nearest_pairs(np.array(answered, float).reshape(-1, 2), np.array(reference.points, float).reshape(-1, 2))
    return sum(reference.right(answered[i], j) for i, j in pairs)


def hits(prediction: str, images: Sequence[ImagePoints]) -> Hits:
    """What an answer found in the images of a reference."""
    if len(images) == 1:
        answered, elsewhere = [image_points(prediction, images[0].size)], 0
    else:
        answered, elsewhere = multi_image_points(prediction, [image.size for image in images])
    right = sum(right_points(points, image) for points, image in zip(answered, images, strict=True))
    return Hits(right, elsewhere + sum(map(len, answered)), sum(len(image.points) for image in images))


class Pointing(Scorer):
    name = "pointing"
    title = "F1 of points, matched one to one with the reference's and in its mask, or near without one"

    def check(self, references: Sequence[Any]) -> None:
        list(read_each(self.name, references, read_image_points))

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        read = read_each(self.name, references, read_image_points)
        return best([hits(prediction, reference).score() for reference in read])

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        return means(scores, ("precision", "recall"))


SCORER = Pointing()
