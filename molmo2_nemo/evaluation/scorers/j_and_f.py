"""J&F of masks of a tracked expression (DAVIS, arXiv 1704.00675; as of MeViS and Ref-YouTube-VOS).

A model answers with points; masks are what a segmentation model makes of them, outside of this repository. So the
answer here is not the model's text but these masks, as JSON, {"masks": {"name": [mask or null, ...]}}, one for each
frame of the reference, which is that of `track` with masks. In each frame the masks of all objects count as one, in
the answer as in the reference.

    J = |answer and reference| / |answer or reference|           1 where both are empty
    F = F1 of boundary pixels, found within ceil(0.008 * diagonal) pixels of one of the other boundary

A pixel is of the boundary if the pixel right of it, below it or right below is on the other side. J and F are means
over the frames, and the score is the mean of J and F. An answer without masks is 0, which `masks` in the details says.

    >>> mask = {"size": [2, 2], "counts": [0, 2, 2]}
    >>> frames = [{"time": 0, "points": {"a": [0, 0]}}]
    >>> reference = {"frames": frames, "size": [2, 2], "masks": {"a": [mask]}}
    >>> SCORER.score('{"masks": {"1": [{"size": [2, 2], "counts": [0, 1, 3]}]}}', [reference]).details["J"]
    0.5
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.hits import best, f1, means
from molmo2_nemo.evaluation.masks import read_mask
from molmo2_nemo.evaluation.point_references import read_each, read_tracks

REACH = 0.008  # of the diagonal


def region(a: np.ndarray, b: np.ndarray) -> float:
    """J of two masks, bool [H, W]."""
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """The boundary pixels of a mask: bool [H, W], both ways."""
    wide = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != wide[:-1, 1:]) | (mask != wide[1:, :-1]) | (mask != wide[1:, 1:])


def contour(a: np.ndarray, b: np.ndarray) -> float:
    """F of an answer `a` and a reference `b`, bool [H, W]."""
    ours, theirs = boundary(a), boundary(b)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    reach = math.ceil(REACH * math.hypot(*a.shape))
    precision = (ours & _widened(theirs, reach)).sum() / ours.sum()
    recall = (theirs & _widened(ours, reach)).sum() / theirs.sum()
    return f1(float(precision), float(recall))


def _widened(pixels: np.ndarray, reach: int) -> np.ndarray:
    """Pixels at most `reach` from one of these: bool [H, W], both ways."""
    height, width = pixels.shape
    found = np.zeros_like(pixels)
    wide = np.pad(pixels, reach)
    for down in range(-reach, reach + 1):
        for across in range(-reach, reach + 1):
            if down * down + across * across <= reach * reach:
                found |= wide[reach + down :, reach + across :][:height, :width]
    return found


def expected_masks(reference: Any) -> list[np.ndarray]:
    """The mask of all objects of a reference in each frame, bool [H, W].

    Raises:
        UserError: it is no reference of tracks, has no masks, or masks of unlike sizes.
    """
    read_tracks(reference)
    if reference.get("masks") is None:
        raise UserError("the reference has no masks; J&F compares masks")
    return merged(reference["masks"], len(reference["frames"]), _size(reference["masks"]))


def merged(masks: Mapping[str, Sequence[Any]], frames: int, size: tuple[int, int]) -> list[np.ndarray]:
    """The masks of all objects as one in each frame, bool [H, W].

    Args:
        size: height and width.

    Raises:
        UserError: masks of another number or size.
    """
    found = [np.zeros(size, bool) for _ in range(frames)]
    for name, listed in masks.items():
        if not isinstance(listed, list | tuple) or len(listed) != frames:
            raise UserError(f"masks of {name!r} are {str(listed)[:60]}; expected a list of {frames}, one a frame")
        for i, mask in enumerate(listed):
            pixels = None if mask is None else read_mask(mask).pixels()
            if pixels is not None and pixels.shape != size:
                raise UserError(f"a mask of {name!r} has the size {pixels.shape}; expected {size}, as of the others")
            if pixels is not None:
                found[i] |= pixels
    return found


def _size(masks: Mapping[str, Sequence[Any]]) -> tuple[int, int]:
    first = next((mask for listed in masks.values() for mask in listed if mask is not None), None)
    if first is None:
        return 1, 1
    mask = read_mask(first)
    return mask.height, mask.width


def answered_masks(prediction: str, like: Sequence[np.ndarray]) -> list[np.ndarray] | None:
    """The masks of an answer; None where it is no JSON of as many masks of this size."""
    try:
        given = json.loads(prediction)
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, dict) or not isinstance(given.get("masks"), dict):
        return None
    try:
        return merged(given["masks"], len(like), (like[0].shape[0], like[0].shape[1]) if like else (1, 1))
    except UserError:
        return None


class RegionAndContour(Scorer):
    name = "j_and_f"
    title = "J&F of masks, made of a model's points by a segmentation model; 0 without masks"

    def check(self, references: Sequence[Any]) -> None:
        list(read_each(self.name, references, expected_masks))

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        read = read_each(self.name, references, expected_masks)
        return best([self._score(prediction, expected) for expected in read])

    @staticmethod
    def _score(prediction: str, expected: Sequence[np.ndarray]) -> Score:
        answered = answered_masks(prediction, expected)
        if answered is None:
            return Score(0.0, {"J": 0.0, "F": 0.0, "masks": False})
        pairs = list(zip(answered, expected, strict=True))
        j, f = (sum(rule(a, b) for a, b in pairs) / len(pairs) if pairs else 1.0 for rule in (region, contour))
        return Score((j + f) / 2, {"J": j, "F": f, "masks": True})

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        return means(scores, ("J", "F", "masks"))


SCORER = RegionAndContour()
