"""Points and times of a user's own records."""

import pytest

from data_prep.placing import BETWEEN, CLAMPED, MERGED, SNAPPED, SORTED, TO_EDGE, Placing
from molmo2_nemo.data.annotations import TrackFrame, TrackPoint
from molmo2_nemo.data.json_values import FieldError
from molmo2_nemo.data.points import track_text

PICTURE = (400, 300)


def film(start=0.0, end=5.0):
    return Placing((), PICTURE, start, end, 25.0)


def place(placing, **fields):
    return placing.record({"annotations": [fields]})["annotations"][0]


def video_points(times, placing=None, **more):
    points = [[[10 + i, 10]] for i in range(len(times))]
    placing = placing or film()
    return place(
        placing, style="video_point", label="ear", timestamps=times, points=points, point_scale=100, **more
    ), placing


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"points": [[610, 704]], "point_scale": 100}, "point_scale 1000"),
        ({"points": [[300, 200]], "point_scale": 100}, "without point_scale"),
        ({"points": [[401, 310]]}, r"0 to 400 and 0 to 300"),
        ({"points": [[-2, 5]], "point_scale": 100}, "inside the picture"),
        ({"points": [[50, 50]], "point_scale": 0}, "above 0"),
        ({"points": [[50, 50]], "point_scale": -1}, "above 0"),
        ({"points": [[50, 50]], "width": 0, "height": 10}, "above 0"),
    ],
)
def test_points_that_cannot_be_meant(fields, says):
    with pytest.raises(FieldError, match=says) as caught:
        place(Placing([PICTURE]), style="pointing", label="eye", **fields)
    assert caught.value.fault.field.startswith("annotations[0].")


def test_points_slightly_outside_are_counted():
    for point, notes in (([101, -1], {CLAMPED}), ([100, 0], set())):
        placing = Placing([PICTURE])
        place(placing, style="pointing", label="eye", points=[point], point_scale=100)
        assert placing.notes == notes


def test_nested_forms_are_checked_with_their_fields():
    form = {"style": "pointing", "label": "eye", "point_scale": 100, "either": [{"points": [[50, 500]]}]}
    with pytest.raises(FieldError, match=r"annotations\[0\].either\[0\].points\[0\]"):
        Placing([PICTURE]).record({"annotations": [form]})
    turns = {"style": "pointing", "turns": [{"label": "eye", "points": [[50, 500]], "point_scale": 100}]}
    with pytest.raises(FieldError, match=r"variants\[0\]\[0\].turns\[0\].points\[0\]"):
        Placing([PICTURE]).record({"variants": [[turns]]})


def test_times_count_from_the_film_and_are_stored_from_the_clip():
    made, placing = video_points([2.0, 3.5, 4.0], film(2, 4))
    assert made["timestamps"] == [0.0, 1.5, 2.0] and not placing.notes
    with pytest.raises(FieldError, match="start of the film, not of the clip"):
        video_points([1.0], film(2, 4))
    caption = place(film(2, 4), style="video_clip_caption_start_end", text="x", start=2.5, end=3.5)
    assert (caption["start"], caption["end"]) == (0.5, 1.5)


def test_times_outside_the_film():
    with pytest.raises(FieldError, match=r"timestamps\[0\] is 150.5"):
        video_points([150.5])
    with pytest.raises(FieldError, match="number of a frame, it is 4 s at 25"):
        video_points([100])
    made, placing = video_points([5.03])
    assert made["timestamps"] == [5.0] and placing.notes == {TO_EDGE}


def test_times_are_sorted_and_merged():
    made, placing = video_points([3.0, 1.0, 3.0])
    assert made["timestamps"] == [1.0, 3.0] and made["points"] == [[[11, 10]], [[10, 10], [12, 10]]]
    assert placing.notes == {SORTED, MERGED}


def track(times, placing, **more):
    frames = [{"time": t, "points": {"a": {"point": [10 + i, 10]}}} for i, t in enumerate(times)]
    return place(placing, style="video_point_track_per_frame", label="dog", points=frames, **more)["points"]


def test_tracks_at_25_fps_have_a_frame_at_every_sampled_time():
    placing = film(0, 2)
    found = track([i / 25 for i in range(50)], placing)
    times = [frame["time"] for frame in found]
    assert {0.0, 0.5, 1.0, 1.5} <= set(times) and times == sorted(times)
    assert placing.notes == {SNAPPED, BETWEEN}


def test_tracks_on_sampled_times_stay_as_they_are():
    placing = film(0, 2)
    assert [f["time"] for f in track([0.0, 0.5, 1.005, 2.0], placing)] == [0.0, 0.5, 1.005, 2.0]
    assert not placing.notes


def test_a_track_that_no_sampled_frame_shows():
    assert [f["time"] for f in track([0.37], film())] == [0.5]
    placing = Placing((), PICTURE, 0.0, 5.0, 25.0, max_fps=0.5)
    with pytest.raises(FieldError, match="hold nothing to track"):
        track([1.0], placing)


def test_a_single_object_without_later_frame_has_an_empty_answer():
    hidden = TrackFrame(1.0, {"a": TrackPoint((1, 1), occluded=True)})
    assert track_text([hidden], (10, 10), "dog", "html-v2") == ""
