"""Point and track texts: the reference's strings, and writer against parser."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2_nemo.data.annotations import TrackFrame, TrackPoint
from molmo2_nemo.data.points import (
    PointGroup,
    PointTag,
    clean_alt,
    clean_label,
    count_text,
    first_and_last,
    number_points,
    on_grid,
    parse,
    render,
    scale_point,
    seconds_text,
    seen_track_frames,
    track_text,
)


def located(tag, width, height):
    """(frame number or seconds, point number, x, y) of every point, in pixels of a width x height image."""
    return [
        (float(group.frame), number, x * width / 1000, y * height / 1000)
        for group in tag.groups
        for number, x, y in group.points
    ]


def image_tag(points, size, label):
    return PointTag(number_points([("1", [scale_point(p, size) for p in points])]), label)


CARS = image_tag([(100, 50), (20, 300), (640, 480)], (640, 480), "red cars")


def test_picture():
    text = '<points coords="1 1 031 625 2 156 104 3 1000 1000">red cars</points>'
    assert render(CARS, "html-v2") == render(CARS, "html-v1") == text
    assert count_text("point", CARS, "html-v2") == text
    assert count_text("point_count", CARS, "html-v2") == f"Counting the {text} shows a total of 3."
    assert count_text("count_point", CARS, "html-v2") == f"There are 3 {text}."
    assert count_text("count", CARS, "html-v2") == "3"


def test_several_pictures():
    groups = number_points([("1", [(500, 500), (100, 200)]), ("2", []), ("3", [(999, 0)])])
    tag = PointTag(groups, "dog")
    assert render(tag, "html-v2") == '<points coords="1 1 100 200 2 500 500;3 3 999 000">dog</points>'
    assert render(tag, "html-v1") == '<points coords="1 1 100 200 2 500 500\t3 3 999 000">dog</points>'


def test_video():
    timed = [(0.5, [(500, 500)]), (2.0, [(100, 200), (50, 990)]), (12.25, [(333, 667)])]
    tag = PointTag(number_points([(seconds_text(t), p) for t, p in timed]), "ball")
    expected = '<points coords="0.5 1 500 500;2.0 2 050 990 3 100 200;12.2 4 333 667">ball</points>'
    assert render(tag, "html-v2") == expected
    assert seconds_text(3) == "3.0"


def frame(time, **points):
    return TrackFrame(time, {k: TrackPoint(tuple(p[:2]), occluded=len(p) > 2) for k, p in points.items()})


def test_track():
    """Numbers by first appearance in (x, y) order, constant afterwards, written in numeric order."""
    size = (640, 480)
    frames = [
        frame(0.5, a=[110, 100], b=[50, 100], c=[5.6, 4.7]),
        frame(0.0, a=[100, 100], b=[300, 100], hidden=[1, 1, "occluded"]),
        frame(1.0, b=[40, 100], c=[7, 4.7]),
    ]
    expected = (
        '<tracks coords="0.0 1 156 208 2 469 208;0.5 1 172 208 2 078 208 3 009 010;'
        '1.0 2 062 208 3 011 010">people</tracks>'
    )
    assert track_text(frames, size, "people", "html-v2") == expected
    assert track_text([], size, "people", "html-v2") == "No tracks available."
    assert track_text([frame(0.0, a=[1, 1, "occluded"])], size, "people", "html-v2") == ""


def test_inline():
    tag = PointTag((PointGroup("1", ((1, 100, 200),)),), "the car", alt="red car")
    assert render(tag, "html-v2") == '<points alt="red car" coords="1 1 100 200">the car</points>'
    assert parse(f"See {render(tag, 'html-v2')} and more") == [tag]


def test_none():
    assert {count_text(m, PointTag((), "x"), "html-v2") for m in ("point", "point_count", "count_point", "count")} == {
        "There are none."
    }


@pytest.mark.parametrize(
    "point, size, expected",
    [
        ((0, 0), (100, 100), (0, 0)),
        ((0.05, 0.25), (100, 100), (0, 2)),  # halves go to the even number
        ((100, 50), (100, 100), (1000, 500)),
        ((-5, 120), (100, 100), (0, 1000)),
    ],
)
def test_scaling(point, size, expected):
    assert scale_point(point, size) == expected


@pytest.mark.parametrize("point", [(float("nan"), 1), (1, float("inf")), (1,), (1, 2, 3)])
def test_bad_points(point):
    with pytest.raises(ValueError, match="two finite numbers"):
        scale_point(point, (100, 100))


def test_bad_settings():
    with pytest.raises(ValueError, match="positive scale"):
        scale_point((1, 1), (0, 10))
    with pytest.raises(ValueError, match="html-v1, html-v2"):
        render(CARS, "xml")
    with pytest.raises(AssertionError, match="unknown counting mode"):
        count_text("guess", CARS, "html-v2")


coordinate = st.integers(0, 1000)
points = st.lists(st.tuples(coordinate, coordinate), min_size=1, max_size=5)
seconds = st.floats(0, 100_000, allow_nan=False).map(seconds_text)
numbers = st.integers(1, 400).map(str)
label = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(["</points>", "</tracks>x", '<points coords="1 1 000 000">', 'a"b', "a;b\tc", "5 1 222 333"]),
)
formats = st.sampled_from(["html-v1", "html-v2"])


@given(
    st.lists(st.tuples(st.one_of(seconds, numbers), points), min_size=1, max_size=5),
    label,
    label,
    st.booleans(),
    formats,
)
@settings(max_examples=300, deadline=None)
def test_parser_reads_what_the_writer_makes(groups, text, alt, with_alt, point_format):
    tag = PointTag(number_points(groups), text, alt if with_alt else None)
    expected = PointTag(tag.groups, clean_label(text), clean_alt(alt) if with_alt else None)
    assert [p.groups for p in parse(render(tag, point_format))] == [tag.groups]
    assert parse(f"See {render(tag, point_format)} and {render(CARS, point_format)}.") == [expected, CARS]
    for mode in ("point", "point_count", "count_point"):
        assert parse(count_text(mode, tag, point_format)) == [expected]


objects = st.dictionaries(
    st.sampled_from("abcde"),
    st.builds(TrackPoint, point=st.tuples(coordinate, coordinate), occluded=st.booleans()),
)
track = st.lists(objects, min_size=1, max_size=6).map(
    lambda frames: [TrackFrame(i * 0.5, f) for i, f in enumerate(frames)]
)


@given(track, formats)
@settings(max_examples=200, deadline=None)
def test_tracks_can_be_read_back(frames, point_format):
    text = track_text(frames, (1000, 1000), "it", point_format)
    visible = [(f.time, k, p.point) for f in frames for k, p in f.points.items() if not p.occluded]
    if not visible:
        assert text == ""
        return
    (tag,) = parse(text)
    assert tag.kind == "tracks"
    read = located(tag, 1000, 1000)
    assert sorted((t, xy) for t, _, xy in visible) == sorted((t, (x, y)) for t, _, x, y in read)
    # One number per object, whatever the frame (points that coincide cannot tell objects apart).
    names = {}
    for t, number, x, y in read:
        candidates = {k for time, k, xy in visible if time == t and xy == (x, y)}
        names[number] = names.get(number, candidates) & candidates
        assert names[number]
    assert set(names) == set(range(1, len(names) + 1))


def test_parser_survives_anything_else():
    assert parse("") == [] and parse('<points coords="1 1 100">x</points>')[0].groups == ()
    (tag,) = parse('<points coords="1 1 100 200 2 1001 300;x 3 100 100;2 4 300 400">x</points>')
    assert [g.frame for g in tag.groups] == ["1", "2"] and tag.count == 2
    for separator in "\t:,;":
        (tag,) = parse(f'<points coords="0.5 1 100 200{separator}1.0 2 300 400">x</points>')
        assert located(tag, 100, 10) == [(0.5, 1, 10.0, 2.0), (1.0, 2, 30.0, 4.0)]


def test_frames_of_a_track_that_the_model_sees():
    frames = [frame(t, a=[1, 1]) for t in (0.0, 0.25, 0.5, 0.755, 1.0, 1.5)]
    times = np.array([0.0, 0.25, 0.5, 0.75, 1.0, 1.25])
    seen = seen_track_frames(frames, times)
    assert [f.time for f in seen] == [0.0, 0.25, 0.5, 0.755, 1.0]
    assert [f.time for f in on_grid(seen, 2)] == [0.0, 0.5, 1.0]
    assert [f.time for f in on_grid(seen, 1)] == [0.0, 1.0]


def test_first_and_last_of_every_object():
    frames = [
        frame(0, a=[1, 1], c=[9, 9]),
        frame(1, a=[2, 2], b=[3, 3], c=[9, 9]),
        frame(2, a=[4, 4], b=[5, 5, "occluded"], c=[9, 8, "occluded"]),
    ]
    kept = first_and_last(frames)
    assert [(f.time, sorted(f.points)) for f in kept] == [(0, ["a", "c"]), (1, ["b"]), (2, ["a", "b", "c"])]
    text = track_text(kept, (1000, 1000), "it", "html-v2")  # what is hidden at its end is not written
    assert text == '<tracks coords="0.0 1 001 001 2 009 009;1.0 3 003 003;2.0 1 004 004">it</tracks>'
