"""Scorers on points and tracks against what the official functions said of random answers (official/points.py).

docs/evaluation.md lists the differences that are meant; each is a condition here.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from molmo2_nemo.evaluation.answer_points import image_points, multi_image_points, tracks, video_points
from molmo2_nemo.evaluation.assignment import assign
from molmo2_nemo.evaluation.masks import read_mask
from molmo2_nemo.evaluation.scorers import find_scorer

FILE = Path(__file__).parent / "official" / "points.json.gz"


@cache
def stored() -> dict[str, list[dict]]:
    return json.loads(gzip.decompress(FILE.read_bytes()))


def cases(kind: str) -> list[dict]:
    found = stored()[kind]
    assert len(found) >= 500
    return found


def raises(value: object) -> bool:
    return isinstance(value, dict) and "raises" in value


def same_figures(scorer: str, case: dict, names: tuple[str, ...], value: str) -> None:
    score = find_scorer(scorer).score(case["answer"], [case["reference"]])
    official = case[scorer]
    if not raises(official):
        found = {name: score.details[name] for name in names}
        assert found == pytest.approx({name: official[name] for name in names}, abs=1e-9), case
        assert score.value == pytest.approx(official[value], abs=1e-9), case


def test_pointing():
    for case in cases("image"):
        same_figures("pointing", case, ("precision", "recall"), "f1")
    values = [case["pointing"]["f1"] for case in cases("image")]
    assert sum(0 < value < 1 for value in values) > 100  # not all or nothing
    assert sum(value == 1 for value in values) > 50


def test_points_of_images_are_extracted_alike():
    for case in cases("image"):
        found, official = image_points(case["answer"], case["reference"]["size"]), case["extract_points"]
        assert len(found) == len(official) and np.allclose(found, official, rtol=0, atol=1e-8), case


def test_point_count():
    clicks = 0
    for case in cases("image"):
        score = find_scorer("point_count").score(case["answer"], [{"count": len(case["reference"]["points"])}])
        if "Click(" in case["answer"]:  # the official counter lowers the answer's case first, and then finds no click
            clicks += 1
            continue
        assert (score.value, float(score.details["close"])) == (
            case["point_count"]["correct"],
            case["point_count"]["close"],
        )
    assert 0 < clicks < 60


def test_video_pointing():
    for case in cases("video"):
        same_figures("video_point", case, ("precision", "recall"), "f1")
    assert sum(0 < case["video_point"].get("f1", 0) < 1 for case in cases("video")) > 100


def test_points_of_videos_are_extracted_alike():
    for case in cases("video"):
        found = video_points(case["answer"], case["reference"]["size"])
        if not raises(case["extract_multi_image_points"]):
            official = case["extract_multi_image_points"]
            assert len(found) == len(official) and np.allclose(found, official, rtol=0, atol=1e-8), case


def test_points_of_several_images_are_extracted_alike():
    for case in cases("several_images"):
        found, elsewhere = multi_image_points(case["answer"], case["sizes"])
        if raises(case["extracted"]) or any(not 1 <= image <= len(case["sizes"]) for image, _, _ in case["extracted"]):
            continue  # an image that is not there: an error there, or counted from the last
        official = [[p[1:] for p in case["extracted"] if p[0] == i + 1] for i in range(len(case["sizes"]))]
        assert [len(group) for group in found] == [len(group) for group in official]
        assert all(np.allclose(a, b, rtol=0, atol=1e-8) for a, b in zip(found, official, strict=True)), case
        assert not elsewhere


def test_counts_that_answers_say():
    """Where the official one finds a number; else ours may: `There are 3 <points>`, one number among words, none."""
    more = 0
    for case in cases("count"):
        score = find_scorer("video_point_count").score(case["answer"], [{"count": case["expected"]}])
        if case["valid"]:
            assert (score.value, score.details["close"]) == (case["correct"], bool(case["close"])), case
            assert score.details["valid"]
        elif score.details["valid"]:
            more += 1
            assert "there are" in case["answer"].lower(), case
    assert 0 < more < 200


def test_tracks():
    names = ("precision", "recall", "HOTA", "DetA", "AssA")
    for case in cases("track"):
        same_figures("track", case, names, "f1")
    assert sum(0 < case["track"].get("HOTA", 0) < 1 for case in cases("track")) > 100
    assert sum(case["objects_come_and_go"] for case in cases("track")) > 100


def test_tracks_are_extracted_alike():
    for case in cases("track"):
        found = [
            [time, {n: list(p) for n, p in points.items()}]
            for time, points in tracks(case["answer"], case["reference"]["size"])
        ]
        if raises(case["extract_tracks"]):
            continue
        assert [frame[0] for frame in found] == [frame[0] for frame in case["extract_tracks"]], case
        for (_, ours), (_, theirs) in zip(found, case["extract_tracks"], strict=True):
            assert set(ours) == set(theirs)
            assert all(ours[n] == pytest.approx(theirs[n], rel=1e-6) for n in ours), case  # older forms: float32 there


def test_points_in_masks_and_boxes():
    for case in cases("target"):
        assert find_scorer("point_in_mask").score(case["answer"], [case["mask"]]).value == case["point_in_mask"], case
        assert [find_scorer("point_in_box").score(case["answer"], [case["box"]]).value] == case["point_in_box"], case
    assert 100 < sum(case["point_in_mask"] for case in cases("target")) < 500
    assert 100 < sum(case["point_in_box"][0] for case in cases("target")) < 500


def test_assignments_are_scipys_also_among_equal_ones():
    for case in cases("assignment"):
        assert [list(pair) for pair in assign(np.array(case["cost"], float))] == case["pairs"], case


def test_masks_are_cocos():
    for number, case in enumerate(cases("mask")):
        mask = read_mask(case["mask"])
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(case["bits"]), np.uint8))[: mask.height * mask.width]
        assert np.array_equal(mask.pixels(), bits.reshape(mask.height, mask.width))
        if number % 10:
            continue
        points = [(x, y) for x in range(-1, mask.width + 1) for y in range(-1, mask.height + 1)]
        inside = {(x, y) for y, x in np.argwhere(mask.pixels()).tolist()}
        assert {point for point in points if mask.covers(*point)} == inside
