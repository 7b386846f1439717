"""Counting in videos: the number that the answer says (Molmo2).

The number of an answer is the whole answer where that is an integer; else the one after `a total of` or after `the
total number ... is:`; else the one number outside of tags, in digits or words (`There are 3 <points
...>cups</points>.`); else 0 where the answer says `none`. Points are not counted. References are those of
`point_count`.

Figures: `close`, off by at most 1 + 5 % of the reference's count, rounded down; `valid`, the answer says a number; and
right counts by what is counted, as in `point_count`.

    >>> SCORER.score('Counting the <points coords="0.5 1 100 100">cups</points> shows a total of 21.', ["20"]).details
    {'count': 21, 'expected': 20, 'close': True, 'valid': True}
    >>> SCORER.score("There are none.", [{"count": 0}]).value
    1.0
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.hits import means
from molmo2_nemo.evaluation.point_references import read_each
from molmo2_nemo.evaluation.scorers.counting import count
from molmo2_nemo.evaluation.scorers.point_count import binned, expected_count

TOTAL = re.compile(r"(?:a total of|the total number(?:\s+of\s+.+?)?\s+is:)\s*([0-9]{1,18})")
NONE = re.compile(r"\bnone\b")


def said_count(prediction: str) -> int | None:
    """The number that an answer says; None if it says none or several."""
    text = prediction.lower().strip().rstrip(".").strip()
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        return int(text)
    if total := TOTAL.search(text):
        return int(total[1])
    found = count(text)
    return 0 if found is None and NONE.search(text) else found


class VideoPointCount(Scorer):
    name = "video_point_count"
    title = "the number that the answer says is the reference's, whatever it points at"

    def check(self, references: Sequence[Any]) -> None:
        list(read_each(self.name, references, expected_count))

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        expected = list(read_each(self.name, references, expected_count))
        found = said_count(prediction)
        nearest = expected[0] if found is None else min(expected, key=lambda n: abs(n - found))
        close = found is not None and abs(found - nearest) <= 1 + nearest // 20
        details = {"count": found, "expected": nearest, "close": close, "valid": found is not None}
        return Score(float(found == nearest), details)

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        return {**means(scores, ("close", "valid")), **binned(scores)}


SCORER = VideoPointCount()
