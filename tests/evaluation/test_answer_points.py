"""Points that this repository writes in training answers are read back from a model's answer."""

from __future__ import annotations

import random

import pytest

from molmo2_nemo.data.annotations import TrackFrame, TrackPoint
from molmo2_nemo.data.points import PointTag, count_text, number_points, render, scale_point, track_text
from molmo2_nemo.evaluation.answer_points import image_points, multi_image_points, tracks, video_points

SIZE = (1000, 1000)  # a thousandth is a pixel
LABELS = ("cups", 'the "left" one', "a > b; c, d: e", "<points> of interest", "größte\tTasse")


def drawn(rng: random.Random, least: int = 1) -> list[tuple[int, int]]:
    return sorted({(rng.randrange(1001), rng.randrange(1001)) for _ in range(rng.randint(least, 8))})


@pytest.mark.parametrize("point_format", ["html-v1", "html-v2"])
@pytest.mark.parametrize("seed", range(20))
def test_points_come_back(seed, point_format):
    rng = random.Random(seed)
    points = [drawn(rng) for _ in range(3)]
    label, alt = rng.choice(LABELS), rng.choice((None, "them"))
    one = PointTag(number_points([("1", points[0])]), label, alt)
    for mode in ("point", "point_count", "count_point"):
        assert image_points(count_text(mode, one, point_format), SIZE) == points[0]
    several = PointTag(number_points([(str(i), group) for i, group in enumerate(points, 1)]), label, alt)
    assert multi_image_points(render(several, point_format), [SIZE] * 3) == (points, 0)
    film = PointTag(number_points(zip(("0.0", "12.5", "300.1"), points, strict=True)), label, alt)
    expected = [(time, *point) for time, group in zip((0.0, 12.5, 300.1), points, strict=True) for point in group]
    assert video_points(render(film, point_format), SIZE) == expected


@pytest.mark.parametrize("point_format", ["html-v1", "html-v2"])
@pytest.mark.parametrize("seed", range(20))
def test_tracks_come_back(seed, point_format):
    rng = random.Random(seed)
    size = (640, 360)
    frames = []
    for second in range(rng.randint(1, 5)):
        points = {name: (rng.uniform(0, 640), rng.uniform(0, 360)) for name in rng.sample("abcde", rng.randint(1, 5))}
        hidden = {name: rng.random() < 0.2 for name in points}
        frames.append(TrackFrame(second / 2, {n: TrackPoint(p, hidden[n]) for n, p in points.items()}))
    found = tracks(track_text(frames, size, rng.choice(LABELS), point_format), size)
    visible = [(f.time, {n: p.point for n, p in f.points.items() if not p.occluded}) for f in frames]
    assert [time for time, _ in found] == [time for time, points in visible if points]
    names: dict[str, str] = {}  # the answer's number -> the object
    for (_, ours), (_, theirs) in zip(found, [entry for entry in visible if entry[1]], strict=True):
        assert len(ours) == len(theirs)
        for number, (x, y) in ours.items():
            name = names.setdefault(number, min(theirs, key=lambda n: abs(theirs[n][0] - x) + abs(theirs[n][1] - y)))
            assert scale_point((x, y), size) == scale_point(theirs[name], size)
