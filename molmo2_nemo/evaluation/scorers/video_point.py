"""Pointing in space and time: F1 of points in a video against points with their masks over time (Molmo2).

Points of the answer and of the reference, as (time, x, y) in percent of the duration, width and height and rounded to
a tenth, are matched so that the sum of distances is least. A matched point is right if the reference's object has a
mask at the answered time and its pixel, rounded, is in it; without masks, if it is near in space and time
(`point_references`). Precision, recall and F1 are as in `pointing`. Without a `duration` the last time of the
reference (at least 1 s) is taken for it.

    >>> reference = {"timestamps": [1.0, 4.0], "points": [[[10, 10]], [[90, 90]]], "size": [100, 100], "duration": 8}
    >>> SCORER.score('<points coords="1.0 1 100 100;6.0 2 900 900">cups</points>', [reference]).details
    {'precision': 0.5, 'recall': 0.5, 'right': 1, 'answered': 2, 'expected': 2}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from molmo2_nemo.evaluation.answer_points import video_points
from molmo2_nemo.evaluation.assignment import nearest_pairs
from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.hits import Hits, best, means
from molmo2_nemo.evaluation.point_references import VideoPoints, read_each, read_video_points


def percent(points: Sequence[tuple[float, float, float]], reference: VideoPoints) -> np.ndarray:
    """(time, x, y) in percent of a video, to a tenth: [n, 3]."""
    whole = (reference.duration, *reference.size)
    rows = [[round(value / full * 100, 1) for value, full in zip(point, whole, strict=True)] for point in points]
    return np.array(rows, float).reshape(-1, 3)


def hits(prediction: str, reference: VideoPoints) -> Hits:
    """What an answer found in a video."""
    answered = video_points(prediction, reference.size)
    pairs = nearest_pairs(percent(answered, reference), percent(reference.points, reference))
    right = sum(reference.right(answered[i], j) for i, j in pairs)
    return Hits(right, len(answered), len(reference.points))


class VideoPointing(Scorer):
    name = "video_point"
    title = "F1 of points in space and time, matched one to one and in the mask of that time, or near without masks"

    def check(self, references: Sequence[Any]) -> None:
        list(read_each(self.name, references, read_video_points))

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        read = read_each(self.name, references, read_video_points)
        return best([hits(prediction, reference).score() for reference in read])

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        return means(scores, ("precision", "recall"))


SCORER = VideoPointing()
