"""Moment retrieval: the segments of a video that an answer names, in seconds, against the annotated ones.

The score of an answer is the F1 of the released Molmo2 evaluation of QVHighlights (its QVHighlightsEval): each
annotated window, in order, takes the first segment, in order, that is free and has IoU >= 0.5 with it; precision is the
share of segments taken, recall the share of windows that took one.

Further figures, of QVHighlights (arXiv 2107.09609) and Charades-STA (arXiv 1705.02101), take the first segment of an
answer as its best one, since a text ranks its segments by nothing but their order:

    r1@0.3, r1@0.5, r1@0.7  answers whose first segment has that IoU or more with some window
    miou                    mean of the highest IoU of the first segment with a window
    map@0.5, map@0.75, map  interpolated average precision of the first ten segments at an IoU, mean over answers; `map`
                            is the mean over the thresholds 0.5, 0.55, ..., 0.95
    hit1                    where the reference has saliency: the clip in the middle of the first segment is rated
                            Very Good (4 of 4) by an annotator. The published HIT@1 takes the clip with the highest of
                            the scores that a model gives to every clip; a text has no such scores.

A segment is two times with a dash or `to` between, in brackets or not; a time is in seconds or as [h:]mm:ss. A pair
that does not begin before it ends counts as no segment.

A reference is a text with segments, or {"windows": [[start, end], ...]} in seconds, with the optional fields
"clips": [numbers of the clips that were rated] and "saliency": [[0 to 4 by each annotator], ...], and "clip_seconds",
the length of a clip (2).

>>> segments("Segments: [4-10.5], [1:00-1:30]")
[(4.0, 10.5), (60.0, 90.0)]
>>> round(iou((0, 10), (5, 15)), 3)
0.333
>>> SCORER.score("[0-10], [20-30]", [{"windows": [[0, 8], [50, 60]]}]).value
0.5
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from molmo2_nemo.data.json_values import is_number
from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.base import Score, Scorer

Span = tuple[float, float]  # start and end in seconds

TIME = r"(?:(?:\d{1,9}:)?\d{1,9}:)?\d{1,9}(?:\.\d{0,9})?"
SEGMENT = re.compile(rf"({TIME})\s*(?:s|sec|secs|seconds)?\s*(?:-|–|—|\bto\b)\s*({TIME})", re.ASCII | re.IGNORECASE)
MATCHED = 0.5  # IoU
THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))  # of the average precision
RANKED = 10  # segments that the average precision looks at
FIRST = (0.3, 0.5, 0.7)
VERY_GOOD = 4
CLIP_SECONDS = 2.0
NOTHING: dict[str, Any] = {
    "precision": 0.0,
    "recall": 0.0,
    "iou": 0.0,
    "ap": [0.0] * len(THRESHOLDS),
}  # details of no answer


def seconds(text: str) -> float:
    """A time, [[h:]mm:]ss, in seconds."""
    total = 0.0
    for part in text.split(":"):
        total = 60 * total + float(part)
    return total


def segments(answer: str) -> list[Span]:
    """The segments that a text names, in its order."""
    found = [(seconds(match[1]), seconds(match[2])) for match in SEGMENT.finditer(answer)]
    return [(start, end) for start, end in found if start < end]


def iou(a: Span, b: Span) -> float:
    """Intersection over union of two segments of positive length."""
    both = min(a[1], b[1]) - max(a[0], b[0])
    return both / ((a[1] - a[0]) + (b[1] - b[0]) - both) if both > 0 else 0.0


def matched(found: Sequence[Span], windows: Sequence[Span]) -> int:
    """How many windows take a segment, each the first that is free and overlaps enough."""
    free = list(found)
    for window in windows:
        taken = next((i for i, segment in enumerate(free) if iou(window, segment) >= MATCHED), None)
        if taken is not None:
            del free[taken]
    return len(found) - len(free)


def average_precision(found: Sequence[Span], windows: Sequence[Span], threshold: float) -> float:
    """Interpolated average precision of segments in the order of their rank.

    A segment is right if its IoU with a window that is still free is at least `threshold`; of several, it takes the one
    that it overlaps most.
    """
    free = set(range(len(windows)))
    right: list[bool] = []
    for segment in found:
        near = [(iou(segment, windows[i]), i) for i in free]
        best, index = max(near, default=(0.0, -1))
        right.append(best >= threshold)
        if right[-1]:
            free.remove(index)
    precisions = [sum(right[: n + 1]) / (n + 1) for n in range(len(right))]
    return sum(max(precisions[n:]) for n, hit in enumerate(right) if hit) / len(windows)


def windows_of(reference: Any) -> list[Span]:
    """The annotated windows of a reference.

    Raises:
        UserError: there is none, or one is not a start and a later end.
    """
    if isinstance(reference, str):
        windows = segments(reference)
        if not windows:
            raise UserError(f"moment_retrieval: the reference {reference!r} names no segment; expected [start-end]")
        return windows
    given = reference.get("windows") if isinstance(reference, dict) else None
    if not isinstance(given, list) or not given or not all(map(_is_span, given)):
        raise UserError(
            f'moment_retrieval: the reference is {reference!r}; expected {{"windows": [[start, end], ...]}} in '
            "seconds, each with 0 <= start < end"
        )
    return [(float(start), float(end)) for start, end in given]


def _is_span(value: Any) -> bool:
    return (
        isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value)) and 0 <= value[0] < value[1]
    )


def check_saliency(reference: Any) -> None:
    """Raises UserError where a reference has ratings of clips that do not belong together."""
    if not isinstance(reference, dict) or not {"clips", "saliency"} & set(reference):
        return
    clips, ratings = reference.get("clips"), reference.get("saliency")
    if not isinstance(clips, list) or not isinstance(ratings, list) or len(clips) != len(ratings):
        raise UserError("moment_retrieval: clips and saliency are lists of the same length, one entry for a clip")
    numbers = [*clips, *(value for rating in ratings for value in (rating if isinstance(rating, list) else [None]))]
    if not all(map(is_number, numbers)):
        raise UserError("moment_retrieval: clips are numbers, and saliency has a list of numbers for each")
    length = reference.get("clip_seconds", CLIP_SECONDS)
    if not is_number(length) or length <= 0:
        raise UserError(f"moment_retrieval: clip_seconds is {length!r}; expected a number above 0")


def hit(found: Sequence[Span], reference: dict[str, Any]) -> bool:
    """Whether the clip in the middle of the first segment is rated Very Good by an annotator."""
    if not found:
        return False
    clip = int(sum(found[0]) / 2 / reference.get("clip_seconds", CLIP_SECONDS))
    rated = dict(zip(reference["clips"], reference["saliency"], strict=True))
    return max(rated.get(clip, []), default=0) >= VERY_GOOD


class MomentRetrieval(Scorer):
    name = "moment_retrieval"
    title = "F1 of the segments of a video that the answer names, at IoU 0.5"

    def check(self, references: Sequence[Any]) -> None:
        if len(references) != 1:
            raise UserError(f"moment_retrieval: {len(references)} references; expected one, with all windows")
        windows_of(references[0])
        check_saliency(references[0])

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        self.check(references)
        (reference,) = references
        found, windows = segments(prediction), windows_of(reference)
        true = matched(found, windows)
        precision, recall = true / max(len(found), 1), true / len(windows)
        details: dict[str, Any] = {
            "segments": [list(segment) for segment in found],
            "precision": precision,
            "recall": recall,
            "iou": max((iou(found[0], window) for window in windows), default=0.0) if found else 0.0,
            "ap": [average_precision(found[:RANKED], windows, threshold) for threshold in THRESHOLDS],
        }
        if isinstance(reference, dict) and "saliency" in reference:
            details["hit1"] = float(hit(found, reference))
        return Score(2 * precision * recall / (precision + recall) if true else 0.0, details)

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        details = [NOTHING | score.details for score in scores]
        first = [detail["iou"] for detail in details]
        by_threshold = [_mean([detail["ap"][i] for detail in details]) for i in range(len(THRESHOLDS))]
        figures = {name: _mean([detail[name] for detail in details]) for name in ("precision", "recall")}
        figures |= {f"r1@{threshold}": _mean([float(value >= threshold) for value in first]) for threshold in FIRST}
        figures |= {"miou": _mean(first), "map": _mean(by_threshold)}
        figures |= {f"map@{t}": by_threshold[THRESHOLDS.index(t)] for t in (0.5, 0.75)}
        hits = [detail["hit1"] for detail in details if "hit1" in detail]
        return figures | ({"hit1": _mean(hits)} if hits else {})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


SCORER = MomentRetrieval()
