"""Counting by pointing: as many points in the answer as there are things (PixMo-Count, arXiv 2409.17146; Molmo2).

Only points count: an answer that says a number, right or wrong, and points at nothing has counted nothing. A reference
is the number as `{"count": 3}` or in a text, or points in images or a video, which are counted.

Figures: `close`, at most one off; `correct_0_5` and so on, the share of right counts where the reference counts 0 to 4,
5 to 9, ..., 25 and more.

    >>> SCORER.score('Counting the <points coords="1 1 100 100 2 500 500">cups</points> are 2.', ["2"]).value
    1.0
    >>> SCORER.score("3", [{"count": 3}]).details
    {'count': 0, 'expected': 3, 'close': False}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.answer_points import image_points
from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.hits import means
from molmo2_nemo.evaluation.point_references import read_each, read_image_points, read_video_points
from molmo2_nemo.evaluation.scorers.counting import count

BINS = (0, 5, 10, 15, 20, 25)  # first counts


def expected_count(reference: Any) -> int:
    """The number that a reference has.

    Raises:
        UserError: it has none.
    """
    if isinstance(reference, Mapping) and {"timestamps", "points"} <= set(reference):
        return len(read_video_points(reference).points)
    if isinstance(reference, Mapping) and set(reference) & {"points", "images"}:
        return sum(len(image.points) for image in read_image_points(reference))
    found = reference.get("count") if isinstance(reference, Mapping) else None
    if isinstance(reference, str):
        found = 0 if re.search(r"\bnone\b", reference.lower()) else count(reference)
    if type(found) is not int or found < 0:
        raise UserError(
            f'the reference {str(reference)[:60]!r} has no count; expected {{"count": 3}}, a number, or points'
        )
    return found


def binned(scores: Sequence[Score]) -> dict[str, float]:
    """The share of right counts by what is counted, of the bins that have answers. One that failed is in none."""
    known = [(score.details["expected"], score.value) for score in scores if "expected" in score.details]
    groups: dict[str, list[float]] = {}
    for low, high in zip(BINS, (*BINS[1:], None), strict=True):
        name = f"correct_{low}_{high}" if high else f"correct_{low}_more"
        groups[name] = [value for count, value in known if low <= count and (high is None or count < high)]
    return {name: sum(values) / len(values) for name, values in groups.items() if values}


class PointCount(Scorer):
    name = "point_count"
    title = "as many points as the reference counts"

    def check(self, references: Sequence[Any]) -> None:
        list(read_each(self.name, references, expected_count))

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        expected = list(read_each(self.name, references, expected_count))
        found = len(image_points(prediction, (100, 100)))
        nearest = min(expected, key=lambda n: abs(n - found))
        return Score(float(found == nearest), {"count": found, "expected": nearest, "close": abs(found - nearest) <= 1})

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        return {**means(scores, ("close",)), **binned(scores)}


SCORER = PointCount()
