"""Tracking of objects in a video: mean F1 over frames, and HOTA (Molmo2; HOTA: arXiv 2009.07736, see `hota`).

In every frame that the answer or the reference has, points are matched so that the sum of distances is least, whatever
their numbers; a matched point is right if its pixel, rounded, is in the mask that its object has in this frame;
without masks, if it is near (`point_references`). Precision, recall and F1 of a frame are as in `pointing`; a video's
are the means over its frames. HOTA looks at the numbers: an object should keep one. Details and figures have DetA and
AssA too.

A time of the answer belongs to the frame at the nearest multiple of 1 / fps seconds if the reference has `fps`, else to
the frame whose time has the same one decimal. Of several times of an answer that fall on one frame the last counts.

J&F compares masks, and an answer has points: no figure here is J&F. For masks that a segmentation model made of such
points there is `j_and_f`.

    >>> frames = [{"time": time, "points": {"a": [10, 10], "b": [90, 90]}} for time in (0, 0.5)]
    >>> answer = '<tracks coords="0.0 1 100 100 2 900 900;0.5 1 900 900 2 100 100">cats</tracks>'
    >>> score = SCORER.score(answer, [{"frames": frames, "size": [100, 100]}])
    >>> score.value, score.details["DetA"], round(score.details["AssA"], 3)  # all found, but the numbers are swapped
    (1.0, 1.0, 0.333)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from molmo2_nemo.evaluation.answer_points import Point, tracks
from molmo2_nemo.evaluation.assignment import nearest_pairs
from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.hits import Hits, best, means
from molmo2_nemo.evaluation.hota import FrameMatch, hota
from molmo2_nemo.evaluation.point_references import TrackReference, read_each, read_tracks

Frames = Mapping[float | str, Mapping[str, Point]]  # the position of each object by its name, in each frame
DETAILS = ("precision", "recall", "HOTA", "DetA", "AssA")


def answered_frames(prediction: str, reference: TrackReference) -> Frames:
    """The frames of an answer, by the reference's keys."""
    return {reference.key(time): points for time, points in tracks(prediction, reference.size)}


def frame_hits(answered: Mapping[str, Point], frame: float | str, reference: TrackReference) -> Hits:
    """What an answer found in one frame."""
    expected = reference.frames.get(frame, {})
    points, names = list(answered.values()), list(expected)
    a, b = (np.array(list(m.values()), float).reshape(-1, 2) for m in (answered, expected))
    right = sum(reference.right(points[i], frame, names[j]) for i, j in nearest_pairs(a, b))
    return Hits(right, len(answered), len(expected))


def frame_matches(answer: Frames, reference: TrackReference) -> list[FrameMatch]:
    """The points of each frame for HOTA, in order of time; tracks numbered in order of their names."""
    keys = sorted({*answer, *reference.frames}, key=float)
    numbers = [
        {name: i for i, name in enumerate(sorted({name for points in frames.values() for name in points}))}
        for frames in (reference.frames, answer)
    ]
    found = []
    for key in keys:
        expected, answered = (sorted(frames.get(key, {})) for frames in (reference.frames, answer))
        right = [[reference.right(answer[key][p], key, g) for p in answered] for g in expected]
        found.append(
            FrameMatch(
                np.array([numbers[0][name] for name in expected], np.int64),
                np.array([numbers[1][name] for name in answered], np.int64),
                np.array(right, bool).reshape(len(expected), len(answered)),
            )
        )
    return found


def score_against(prediction: str, reference: TrackReference) -> Score:
    """The score of one video."""
    answer = answered_frames(prediction, reference)
    frames = [frame_hits(answer.get(key, {}), key, reference) for key in {**reference.frames, **answer}]
    frames = frames or [Hits(0, 0, 0)]  # nothing to track, and nothing tracked
    mean = {name: sum(getattr(hit, name) for hit in frames) / len(frames) for name in ("precision", "recall", "f1")}
    whole = hota(frame_matches(answer, reference))
    figures = {"HOTA": whole.hota, "DetA": whole.detection, "AssA": whole.association}
    value = mean.pop("f1")
    return Score(value, {**mean, **figures, "frames": len(reference.frames), "answered": len(answer)})


class Tracking(Scorer):
    name = "track"
    title = "mean F1 over frames of tracked points, in the object's mask or near; and HOTA, which looks at the numbers"

    def check(self, references: Sequence[Any]) -> None:
        list(read_each(self.name, references, read_tracks))

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        return best([score_against(prediction, reference) for reference in self._read(references)])

    def _read(self, references: Sequence[Any]) -> list[TrackReference]:
        return list(read_each(self.name, references, read_tracks))

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        return means(scores, DETAILS)


SCORER = Tracking()
