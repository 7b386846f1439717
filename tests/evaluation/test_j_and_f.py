"""J&F against its definition, pixel by pixel."""

from __future__ import annotations

import doctest
import json
import math
from typing import Any

import numpy as np
import pytest

from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.masks import write_mask
from molmo2_nemo.evaluation.scorers import find_scorer, j_and_f


def edge(mask: np.ndarray) -> set[tuple[int, int]]:
    """Boundary pixels: a neighbour to the right, below or right below, inside the image, is on the other side."""
    height, width = mask.shape
    found = set()
    for y in range(height):
        for x in range(width):
            # at the border only the neighbours that are in the image count
            around = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            around = [(min(b, height - 1), min(a, width - 1)) for b, a in around]
            if any(mask[place] != mask[y, x] for place in around):
                found.add((y, x))
    return found


def f_by_pixels(a: np.ndarray, b: np.ndarray) -> float:
    ours, theirs = edge(a), edge(b)
    if not ours or not theirs:
        return float(ours == theirs)
    reach = math.ceil(0.008 * math.hypot(*a.shape))
    shares = [
        sum(any(math.dist(p, q) <= reach for q in other) for p in some) / len(some)
        for some, other in ((ours, theirs), (theirs, ours))
    ]
    return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0


def drawn(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x, ry, rx = rng.uniform(0, height), rng.uniform(0, width), *rng.uniform(1, height / 2, 2)
    rows, columns = np.mgrid[:height, :width]
    return ((rows - y) / ry) ** 2 + ((columns - x) / rx) ** 2 <= 1


@pytest.mark.parametrize("seed", range(25))
def test_region_and_contour(seed):
    rng = np.random.default_rng(seed)
    height, width = (12, 17) if seed % 5 else (120, 160)  # a reach of one or of two pixels
    a = drawn(rng, height, width)
    b = np.roll(a, rng.integers(0, 4, 2), (0, 1)) if seed % 2 else drawn(rng, height, width)
    if seed == 3:
        a = np.zeros_like(a)
    assert j_and_f.region(a, b) == pytest.approx(np.logical_and(a, b).sum() / max(1, np.logical_or(a, b).sum()))
    assert j_and_f.contour(a, b) == pytest.approx(f_by_pixels(a, b))


def reference(masks: dict[str, list[Any]], frames: int) -> dict[str, Any]:
    return {"frames": [{"time": t, "points": {}} for t in range(frames)], "size": [8, 8], "masks": masks}


def test_objects_count_as_one_and_frames_are_averaged():
    left, right = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    left[:, :4], right[:, 4:] = True, True
    expected = reference({"a": [write_mask(left), write_mask(left)], "b": [write_mask(right), None]}, 2)
    answer = json.dumps({"masks": {"1": [write_mask(left | right), None]}})
    score = find_scorer("j_and_f").score(answer, [expected])
    assert score.details == {"J": 0.5, "F": 0.5, "masks": True} and score.value == 0.5
    exact = json.dumps({"masks": expected["masks"]})
    assert find_scorer("j_and_f").score(exact, [expected]).value == 1
    assert find_scorer("j_and_f").score('{"masks": {}}', [reference({}, 0)]).value == 1


@pytest.mark.parametrize(
    "answer",
    ["", "[1]", '<tracks coords="0.0 1 500 500">x</tracks>', '{"masks": 3}', '{"masks": {"1": []}}', "[" * 99999]
    + ['{"masks": {"1": [{"size": [9, 9], "counts": [81]}]}}', '{"masks": {"1": [7]}}'],
)
def test_an_answer_without_masks_is_nothing(answer):
    score = find_scorer("j_and_f").score(answer, [reference({"a": [write_mask(np.ones((8, 8), bool))]}, 1)])
    assert (score.value, score.details["masks"]) == (0, False)


def test_references_without_masks_are_refused():
    for wrong, says in (
        ({"frames": [], "size": [8, 8]}, "no masks; J&F compares masks"),
        (reference({"a": [{"size": [8, 8], "counts": [64]}, {"size": [4, 4], "counts": [16]}]}, 2), r"size \(4, 4\)"),
        ({"points": []}, "frames, size"),
    ):
        with pytest.raises(UserError, match=f"^j_and_f: .*{says}"):
            find_scorer("j_and_f").check([wrong])


def test_worked_example():
    assert doctest.testmod(j_and_f) == (0, 4)
