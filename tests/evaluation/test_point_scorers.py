"""Scorers on points and tracks: worked examples, the rule without masks against brute force, and what is refused."""

from __future__ import annotations

import doctest
import importlib
import itertools
import math
import random

import numpy as np
import pytest

from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.assignment import assign
from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.masks import read_mask, write_mask
from molmo2_nemo.evaluation.scorers import find_scorer

SCORERS = (
    "pointing",
    "point_count",
    "video_point",
    "video_point_count",
    "track",
    "point_in_mask",
    "point_in_box",
)
WITH_EXAMPLES = (*(f"scorers.{name}" for name in SCORERS), "answer_points", "assignment", "masks")


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_worked_examples(name):
    result = doctest.testmod(importlib.import_module(f"molmo2_nemo.evaluation.{name}"))
    assert result.attempted > 0 and result.failed == 0


def value(name: str, answer: str, reference: dict) -> float:
    return find_scorer(name).score(answer, [reference]).value


def nearest_by_brute_force(a: list, b: list) -> list[tuple[int, int]]:
    """The matching of least total distance, of all there are."""
    if len(a) > len(b):
        return [(i, j) for j, i in nearest_by_brute_force(b, a)]
    ways = itertools.permutations(range(len(b)), len(a))
    best = min(ways, key=lambda way: sum(math.dist(a[i], b[j]) for i, j in enumerate(way)))
    return list(enumerate(best))


@pytest.mark.parametrize("seed", range(30))
def test_assignments_cost_least(seed):
    random_ = np.random.default_rng(seed)
    cost = random_.random((random_.integers(1, 6), random_.integers(1, 6)))
    wide = cost if cost.shape[0] <= cost.shape[1] else cost.T
    ways = itertools.permutations(range(wide.shape[1]), wide.shape[0])
    pairs = assign(cost)
    assert sum(cost[pair] for pair in pairs) == pytest.approx(
        min(sum(wide[i, j] for i, j in enumerate(w)) for w in ways)
    )
    assert len(pairs) == min(cost.shape) == len({i for i, _ in pairs}) == len({j for _, j in pairs})


@pytest.mark.parametrize("seed", range(60))
def test_points_without_masks_are_right_within_a_twentieth_of_the_longer_side(seed):
    rng = random.Random(seed)
    size = (1000, rng.choice((400, 1000)))  # thousandths are pixels across
    expected = [(rng.randrange(1000), rng.randrange(size[1])) for _ in range(rng.randint(1, 5))]
    found = [(min(999, max(0, x + rng.choice((0, 20, 49, 51, 90)))), y) for x, y in expected if rng.random() < 0.8]
    inside = " ".join(f"{i} {x:03d} {round(1000 * y / size[1]):03d}" for i, (x, y) in enumerate(found, 1))
    text = f'<points coords="1 {inside}">cups</points>'
    read = [(x, round(1000 * y / size[1]) / 1000 * size[1]) for x, y in found]
    right = sum(math.dist(read[i], expected[j]) <= 50 for i, j in nearest_by_brute_force(read, expected))
    f1 = 2 * right / (len(read) + len(expected)) if read else 0
    assert value("pointing", text, {"points": expected, "size": size}) == pytest.approx(f1)


def test_video_points_without_masks_are_near_in_time_too():
    reference = {"timestamps": [2.0], "points": [[[50, 50]]], "size": [100, 100], "duration": 10}
    for time, expected in (("2.0", 1), ("2.5", 1), ("1.5", 1), ("2.6", 0), ("1.4", 0)):
        assert value("video_point", f'<points coords="{time} 1 500 540">it</points>', reference) == expected
    assert value("video_point", '<points coords="2.0 1 500 551">it</points>', reference) == 0


def test_several_images_are_matched_each_by_itself():
    images = [{"points": [[90, 90]], "size": [100, 100]}, {"points": [[10, 10], [20, 40]], "size": [100, 50]}]
    score = find_scorer("pointing").score(
        '<points coords="1 1 900 900\t2 2 100 200\t3 3 500 500">it</points>', [{"images": images}]
    )
    assert score.details == {"precision": 2 / 3, "recall": 2 / 3, "right": 2, "answered": 3, "expected": 3}
    assert value("pointing", '<points coords="2 1 900 900">it</points>', {"images": images}) == 0  # not in that image


def track_reference(**more) -> dict:
    frames = [{"time": t, "points": {"a": [10, 10], "b": [90, 90]}} for t in (0.0, 0.333, 0.667)]
    return {"frames": frames, "size": [100, 100], **more}


def test_hota_by_hand():
    """Three frames, two objects; object 2 is never answered, object 1 in all but the last, with one number.
    TP 2, FN 4, FP 0: DetA 1/3. The match has 2 frames of the 3 that have either: AssA 2/3. HOTA sqrt(2/9)."""
    score = find_scorer("track").score('<tracks coords="0.0 1 100 100;0.3 1 100 100">it</tracks>', [track_reference()])
    assert score.details["DetA"] == pytest.approx(1 / 3)
    assert score.details["AssA"] == pytest.approx(2 / 3)
    assert score.details["HOTA"] == pytest.approx(math.sqrt(2 / 9))
    assert score.details["precision"] == pytest.approx(2 / 3) and score.details["recall"] == pytest.approx(1 / 3)
    assert score.value == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_times_of_tracks_have_one_decimal_or_a_rate():
    answer = '<tracks coords="0.0 1 100 100 2 900 900;0.3 1 100 100 2 900 900;0.7 1 100 100 2 900 900">it</tracks>'
    assert value("track", answer, track_reference()) == 1
    assert value("track", answer, track_reference(fps=3)) == 1
    assert value("track", answer.replace("0.3 ", "0.4 "), track_reference(fps=3)) == 1
    assert value("track", answer.replace("0.3 ", "0.4 "), track_reference()) < 1
    assert value("track", answer, track_reference(fps=30)) < 1  # 0.333 s is frame 10 there, but 0.3 frame 9


def test_an_object_is_right_in_its_own_mask_whatever_its_place_in_the_list():
    """Object b enters in the second frame, and its mask stands first."""
    left, right = np.zeros((10, 10), bool), np.zeros((10, 10), bool)
    left[:, :5], right[:, 5:] = True, True
    reference = {
        "frames": [{"time": 0, "points": {"a": [2, 2]}}, {"time": 1, "points": {"a": [2, 2], "b": [8, 8]}}],
        "size": [10, 10],
        "masks": {"b": [None, write_mask(right)], "a": [write_mask(left), write_mask(left)]},
    }
    score = find_scorer("track").score(
        '<tracks coords="0.0 1 200 200;1.0 1 200 200 2 800 800">it</tracks>', [reference]
    )
    assert (score.value, score.details["HOTA"]) == (1, 1)


def test_the_nearest_of_several_references_counts():
    far, close = ({"points": [[x, 10]], "size": [100, 100]} for x in (90, 10))
    answer = '<points coords="1 1 100 100">it</points>'
    assert find_scorer("pointing").score(answer, [far, close]).value == 1
    assert find_scorer("point_count").score(answer, [{"count": 3}, {"count": 1}]).value == 1


def test_figures_of_a_data_set():
    scorer = find_scorer("point_count")
    one = '<points coords="1 1 100 100">it</points>'
    scores = [scorer.score(one, [{"count": n}]) for n in (1, 1, 2, 7, 40)]
    assert scorer.figures(scores) == {"close": 0.6, "correct_0_5": 2 / 3, "correct_5_10": 0, "correct_25_more": 0}
    scorer = find_scorer("track")
    scores = [scorer.score("", [track_reference()]), scorer.score("", [{"frames": [], "size": [9, 9]}])]
    assert scorer.figures(scores) == {name: 0.5 for name in ("precision", "recall", "HOTA", "DetA", "AssA")}


@pytest.mark.parametrize("name", SCORERS)
def test_an_answer_that_failed_counts_nothing(name):
    assert all(figure == 0 for figure in find_scorer(name).figures([Score(0.0)]).values())


HOSTILE = (
    "",
    "<points",
    '<points coords="',
    '<points coords="1.2.3 1 100 100">x</points>',
    '<points coords=". 1 100 100">x</points>',
    f'<points coords="{"9" * 5000} {"9" * 5000} 100 100">x</points>',
    '<points coords="0 1 100 100\t99 1 100 100">x</points>',
    f'<tracks coords="{"1" * 400} 1 100 100">x</tracks>',
    "<points 1 2/> <points a b c d/> <points nan 1 nan nan/> <points inf 1 2 3/>",
    "time 1\n{0: [1, 2], 0: (3}",
    f"time {'9' * 5000}\n{{{'8' * 5000}: [{'7' * 5000}, 1]}}",
    "time 0.5\n{0: 5, 1: [1, 2, 3]}",
    "\x00\ud800<points>" + "<points " * 300,
    "a total of " + "9" * 5000,
    "٣ points",
)


@pytest.mark.parametrize("seed", range(40))
def test_no_answer_raises(seed):
    """Hostile answers, and pieces of them in any order."""
    rng = random.Random(seed)
    references = {
        "pointing": {"images": [{"points": [[1, 1]], "size": [100, 50]}] * (1 + seed % 3)},
        "point_count": {"count": 3},
        "video_point": {"timestamps": [2.0], "points": [[[50, 50]]], "size": [100, 100]},
        "video_point_count": {"count": 3},
        "track": track_reference(**({"fps": 2} if seed % 2 else {})),
        "point_in_mask": {"mask": {"size": [2, 2], "counts": [4]}, "size": [2, 2]},
        "point_in_box": {"box": [0, 0, 1, 1], "size": [2, 2]},
    }
    pieces = [text[rng.randrange(len(text) + 1) :][: rng.randrange(1, 60)] for text in rng.choices(HOSTILE, k=5)]
    for text in (HOSTILE[seed % len(HOSTILE)], "".join(pieces)):
        for name, reference in references.items():
            assert 0 <= value(name, text, reference) <= 1


MASK = {"size": [2, 3], "counts": [2, 4]}


@pytest.mark.parametrize(
    ("name", "reference", "says"),
    [
        ("pointing", "three", "expected an object with points, size"),
        ("pointing", {"points": [[1, 2]], "size": [3, 2], "mask": []}, "perhaps masks"),
        ("pointing", {"points": [[1, "2"]], "size": [3, 2]}, r"a point \[1, '2'\]"),
        ("pointing", {"points": [[1, 2]], "size": [3, 0]}, "size is"),
        ("pointing", {"points": [[1, 2]], "size": [3, 2], "masks": []}, "0 masks where 1"),
        ("pointing", {"points": [[1, 2]], "size": [3, 2], "masks": [{"size": [2, 3], "counts": [2, 5]}]}, "sum to 7"),
        (
            "pointing",
            {"points": [[1, 2]], "size": [3, 2], "masks": [{"size": [2, 3], "counts": "2\x7f"}]},
            "counts are",
        ),
        ("video_point", {"timestamps": [1], "points": [], "size": [3, 2]}, "1 timestamps, but points of 0"),
        ("video_point", {"timestamps": [-1], "points": [[]], "size": [3, 2]}, "positive number"),
        ("track", {"frames": [{"time": 0}], "size": [3, 2]}, "time, points"),
        ("track", {"frames": [], "size": [3, 2], "fps": 0}, "fps has 0"),
        ("track", {"frames": [{"time": 0, "points": {}}], "size": [3, 2], "masks": {"a": []}}, "0 masks where 1"),
        ("point_count", {"count": -1}, "no count"),
        ("point_count", "two or three", "no count"),
        ("video_point_count", {"count": True}, "no count"),
        ("point_in_mask", {"mask": MASK}, "mask and size"),
        ("point_in_box", {"box": [5, 5, 1, 1], "size": [9, 9]}, "not a width and height"),
    ],
)
def test_references_that_are_none_are_refused(name, reference, says):
    for check in (find_scorer(name).check, lambda given: find_scorer(name).score("", given)):
        with pytest.raises(UserError, match=f"^{name}: .*{says}"):
            check([reference])


def test_masks_are_written_and_read_back():
    random_ = np.random.default_rng(0)
    for _ in range(50):
        pixels = random_.random((random_.integers(1, 9), random_.integers(1, 9))) < random_.choice([0.0, 0.5, 1.0])
        assert np.array_equal(read_mask(write_mask(pixels)).pixels(), pixels)
