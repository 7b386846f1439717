"""HOTA, higher order tracking accuracy (arXiv 2009.07736), of answers that are either right or wrong.

With TP, FN, FP the matched, missed and surplus points of all frames, and for a match c of reference track g and
answered track p, A(c) = |frames in which g is matched with p| / |frames that have g or p, a frame with both matched
once|:

    DetA = TP / (TP + FN + FP)      AssA = mean of A(c) over all matches c      HOTA = sqrt(DetA * AssA)

Points are matched frame by frame so that tracks which agree over the whole video go together, as in the authors'
TrackEval: the weight of a pair is its overall agreement where the point is right. Since a point is in a mask or is not,
all thresholds of HOTA give the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from molmo2_nemo.evaluation.assignment import assign

EPSILON = float(np.finfo("float").eps)


@dataclass(frozen=True)
class FrameMatch:
    """The reference's and the answer's points in one frame."""

    expected: np.ndarray  # int64 [n], numbers of reference tracks from 0
    answered: np.ndarray  # int64 [m], numbers of answered tracks from 0
    right: np.ndarray  # bool [n, m]: the answer's point is at the reference's object


@dataclass(frozen=True)
class Hota:
    """The figures of one video, 0 to 1."""

    hota: float
    detection: float
    association: float


def hota(frames: Sequence[FrameMatch]) -> Hota:
    """HOTA of one video. Neither expected nor answered points: all 1; only one of them: all 0."""
    expected = sum(len(frame.expected) for frame in frames)
    answered = sum(len(frame.answered) for frame in frames)
    if not expected or not answered:
        value = float(expected == answered)
        return Hota(value, value, value)
    agreement, expected_count, answered_count = _agreement(frames)
    matches = np.zeros_like(agreement)
    for frame in frames:
        where = np.ix_(frame.expected, frame.answered)
        for row, column in assign(-agreement[where] * frame.right):
            if frame.right[row, column]:
                matches[frame.expected[row], frame.answered[column]] += 1
    found = float(matches.sum())
    shared = matches / np.maximum(1, expected_count[:, None] + answered_count - matches)
    detection = found / (expected + answered - found)
    association = float((matches * shared).sum()) / max(1.0, found)
    return Hota(math.sqrt(detection * association), detection, association)


def _agreement(frames: Sequence[FrameMatch]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How well each two tracks agree over the video, [G, P], 0 to 1, and how many points each has: [G] and [P]."""
    tracks = 1 + max(int(frame.expected.max(initial=-1)) for frame in frames)
    answers = 1 + max(int(frame.answered.max(initial=-1)) for frame in frames)
    together, expected_count, answered_count = np.zeros((tracks, answers)), np.zeros(tracks), np.zeros(answers)
    for frame in frames:
        right = frame.right.astype(float)
        either = right.sum(0)[None] + right.sum(1)[:, None] - right
        together[np.ix_(frame.expected, frame.answered)] += np.divide(right, either, where=either > 0, out=0 * right)
        expected_count[frame.expected] += 1
        answered_count[frame.answered] += 1
    agreement = together / (expected_count[:, None] + answered_count - together + EPSILON)
    return agreement, expected_count, answered_count
