"""Points and times of a user's own records."""

import re

import numpy as np
import pytest

from molmo2_nemo.data.annotation_json import read_annotation
from molmo2_nemo.data.annotations import TrackFrame, TrackPoint
from molmo2_nemo.data.check import View
from molmo2_nemo.data.config import TextFormatConfig, VideoConfig
from molmo2_nemo.data.json_values import FieldError
from molmo2_nemo.data.places import (
    CLAMPED,
    CLIP_CUT,
    LINES_BLANK,
    LINES_CUT,
    LINES_OUT,
    REPEATED,
    SORTED,
    TO_EDGE,
    TWICE,
    Placing,
    check_places,
    place_clip,
    place_subtitles,
)
from molmo2_nemo.data.points import parse, seconds_text, track_text
from molmo2_nemo.data.prompts import PromptFormatter, VisualContext
from molmo2_nemo.data.video.sampling import TimeSampler
from molmo2_nemo.errors import DataError

PICTURE = (400, 300)
PER_FRAME = "video_point_track_per_frame"


def film(start=0.0, end=5.0):
    return Placing(View((), PICTURE, end - start, 25.0), start=start)


def picture():
    return Placing(View((PICTURE,)))


def place(placing, **fields):
    return placing.record({"annotations": [fields]})["annotations"][0]


def test_points_that_come_twice_are_counted():
    """They stay two points."""
    same, other = [[50, 50], [20, 20], [50, 50]], [[50, 50], [50, 20]]
    count = {"style": "point_count", "label": "ear", "point_scale": 100}
    for points, notes in ((same, {TWICE}), (other, set())):
        placing = picture()
        assert place(placing, **count, points=points)["points"] == points and placing.notes == notes
    placing = film()
    times = {"style": "video_point", "label": "ear", "timestamps": [1.0, 2.0], "point_scale": 100}
    assert place(placing, **times, points=[other, same])["points"] == [other, same] and placing.notes == {TWICE}
    placing = film()
    place(placing, **times, points=[other, other])
    assert placing.notes == set(), "at two times"
    placing = picture()
    inline = {"style": "user_qa", "question": "q", "answer": "<|POINTS|>", "answer_annotations": [{"points": same}]}
    place(placing, **inline)
    assert placing.notes == {TWICE}


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
        place(picture(), style="pointing", label="eye", **fields)
    assert caught.value.fault.field.startswith("annotations[0].")


def test_points_slightly_outside_are_counted():
    for point, notes in (([101, -1], {CLAMPED}), ([100, 0], set())):
        placing = picture()
        place(placing, style="pointing", label="eye", points=[point], point_scale=100)
        assert placing.notes == notes


def test_nested_forms_are_checked_with_their_fields():
    form = {"style": "pointing", "label": "eye", "point_scale": 100, "either": [{"points": [[50, 500]]}]}
    with pytest.raises(FieldError, match=r"annotations\[0\].either\[0\].points\[0\]"):
        picture().record({"annotations": [form]})
    turns = {"style": "pointing", "turns": [{"label": "eye", "points": [[50, 500]], "point_scale": 100}]}
    with pytest.raises(FieldError, match=r"variants\[0\]\[0\].turns\[0\].points\[0\]"):
        picture().record({"variants": [[turns]]})


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


def test_times_are_sorted_and_repeated_ones_kept():
    made, placing = video_points([3.0, 1.0, 3.0])
    assert made["timestamps"] == [1.0, 3.0, 3.0] and made["points"] == [[[11, 10]], [[10, 10]], [[12, 10]]]
    assert placing.notes == {SORTED, REPEATED}


def test_alternatives_keep_what_they_share():
    shared = {"style": "video_point", "label": "ear", "timestamps": [3.0, 2.5], "point_scale": 100}
    either = [{"points": [[[1, 1]], [[2, 2]]]}, {"points": [[[3, 3]], [[4, 4]]], "style": "video_point_count"}]
    made = place(film(2, 4), **shared, either=either)
    assert made["timestamps"] == [0.5, 1.0] and made["label"] == "ear"
    assert [form["points"] for form in made["either"]] == [[[[2, 2]], [[1, 1]]], [[[4, 4]], [[3, 3]]]]
    own_scale = {"style": "pointing", "label": "eye", "points": [[300, 500]], "either": [{"point_scale": 1000}]}
    assert place(picture(), **own_scale) == own_scale
    with pytest.raises(FieldError, match=r"annotations\[0\].points\[0\]"):
        place(picture(), **{**own_scale, "either": [{"point_scale": 1000}, {"point_scale": 100}]})
    messages = {"style": "text_sft", "messages": ["q", "a"], "turns": 5, "points": "x", "answer_annotations": 3}
    assert place(picture(), **messages) == messages


def test_points_in_the_text_of_an_answer():
    answer = {"style": "user_qa", "question": "Where?", "answer": "<|POINT|>"}
    for points, seen in (([[50, 100.5]], {CLAMPED}), ([[0, 100]], set())):
        placing = picture()
        place(placing, **answer, answer_annotations=[{"points": points, "inline_text": "here"}])
        assert placing.notes == seen
    with pytest.raises(FieldError, match="in percent") as caught:
        place(picture(), **answer, answer_annotations=[{"points": [[50, 500]], "inline_text": "here"}])
    assert caught.value.fault.field == "annotations[0].answer_annotations[0].points[0]"


def test_points_in_pixels_of_a_film_stored_smaller():
    placing = film()
    placing.write_size = True
    made = place(placing, style="video_point", label="ear", timestamps=[1.0], points=[[[200, 150]]])
    assert (made["width"], made["height"]) == PICTURE
    with pytest.raises(FieldError, match="height"):
        place(film(), style="video_point", label="ear", timestamps=[1.0], points=[[[200, 150]]], width=400)


# --- stored records ---------------------------------------------------------------------------------------------------


def stored(seconds=5.0):
    return Placing(View((), PICTURE, seconds, 25.0), stored=True)


@pytest.mark.parametrize(
    "fields, field",
    [
        ({"style": "video_point", "timestamps": [1.0, 0.5], "points": [[], []]}, "timestamps"),
        ({"style": "video_point", "timestamps": [6.0], "points": [[]]}, "timestamps[0]"),
        ({"style": "video_point", "timestamps": [1.0], "points": [[[500, 10]]]}, "points[0][0]"),
        ({"style": "video_frame_caption_timestamp", "text": "x", "time": 9}, "time"),
        ({"style": PER_FRAME, "points": [{"time": 0.37, "points": {"a": {"point": [90, 90]}}}]}, "points"),
        ({"style": PER_FRAME, "sampling_fps": 4, "points": []}, "sampling_fps"),
        ({"style": PER_FRAME, "sampling_fps": 1.5, "points": []}, "sampling_fps"),
    ],
)  # fmt: skip
def test_a_stored_record_is_refused_where_prepare_would_rewrite_it(fields, field):
    with pytest.raises(FieldError) as caught:
        place(stored(), label="x", **fields)
    assert caught.value.fault.field == f"annotations[0].{field}" and caught.value.fault.expected


def test_stored_subtitles_and_clips():
    data = {"annotations": [], "subtitles": [{"start": 1, "end": 9, "text": "x"}]}
    check_places(data, View((), PICTURE, 2.0, 25.0), (1.0, 3.0), 5.0)
    with pytest.raises(FieldError, match=r"subtitles\[0\].start"):
        check_places(data, View((), PICTURE, 0.5, 25.0), None, 0.5)
    with pytest.raises(FieldError, match="clip must be"):
        check_places(data, View((), PICTURE, 2.0, 25.0), (1.0, 7.0), 5.0)


# --- clips and subtitles ----------------------------------------------------------------------------------------------


def test_clips():
    notes = set()
    assert place_clip([1, 4], 5.0, notes) == (1.0, 4.0) and not notes
    assert place_clip([1, 5.8], 5.0, notes) == (1.0, 5.0) and notes == {CLIP_CUT}
    for clip in ([5, 6], [1, 6.1], [2, 2], [3, 1], [-1, 2], [0, 5000]):
        with pytest.raises(FieldError, match="inside the film of 5.000 s"):
            place_clip(clip, 5.0)


def test_subtitles():
    whole, notes = View((), PICTURE, 5.0, 25.0), set()
    assert place_subtitles([(0, 1, "a"), (1, 5, "b")], whole, None, notes) == [(0, 1, "a"), (1, 5, "b")] and not notes
    assert place_subtitles([(4, 7, "a")], whole, None, notes) == [(4, 5.0, "a")] and notes == {LINES_CUT}
    for lines, clip, note in (
        ([(1, 2, "b"), (0, 1, "a")], None, SORTED),
        ([(0, 1, " ")], None, LINES_BLANK),
        ([(0, 1, "a")], (2.0, 3.0), LINES_OUT),
    ):
        notes = set()
        place_subtitles(lines, whole, clip, notes)
        assert notes == {note}
    for line, says in (
        ((6, 7, "a"), "0 to 5"),
        ((1000, 2000, "a"), "milliseconds"),
        ((2, 1, "a"), "start <= end"),
        ((-1, 1, "a"), "start <= end"),
    ):
        with pytest.raises(FieldError, match=says) as caught:
            place_subtitles([(0, 1, "b"), line], whole, None, set())
        assert caught.value.fault.field.startswith("subtitles[1]")


# --- tracks -----------------------------------------------------------------------------------------------------------


def track(times, placing, style=PER_FRAME, **more):
    frames = [{"time": t, "points": {"a": {"point": [110 + i % 80, 110]}}} for i, t in enumerate(times)]
    return place(placing, style=style, label="dog", points=frames, **more)


def conversation(fields, placing, seed=0, **video):
    """(prompt, answer, points lost) as training words it."""
    view = placing.view
    times = TimeSampler.of(VideoConfig(**video), placing.sampling, view.fps)(view.duration)
    context = VisualContext(video_size=view.video_size, frame_times=times)
    annotation = read_annotation(fields, 0, True)
    (turn,) = PromptFormatter(TextFormatConfig()).conversation(annotation, context, np.random.default_rng(seed))
    return turn.user, turn.answer, turn.lost.get("points_unseen", 0)


def answered(text):
    return [float(group.frame) for tag in parse(text) for group in tag.groups]


@pytest.mark.parametrize("start", [0.0, 1.3])
@pytest.mark.parametrize("asked", [1, 2, 4])
@pytest.mark.parametrize("rate", [24, 25, 30000 / 1001, 30, 60])
def test_prompt_and_answer_agree(rate, asked, start):
    """A track with a position in every frame of the film: the answer has the times that the prompt promises."""
    for sampling in ({"max_fps": max(asked, 2)}, {"max_fps": 4}, {"mode": "fps", "sampling_fps": asked}):
        placing = Placing(View((), PICTURE, 7.0, rate), sampling, start=start)
        times = [i / rate for i in range(int((start + 7.0) * rate)) if i / rate >= start]
        made = track(times, placing, sampling_fps=asked)
        for seed in range(6):
            prompt, answer, lost = conversation(made, placing, seed)
            named = re.findall(r"\b(\d+) (?:fps|frames|positions|times)", prompt)
            assert named == [str(asked)] or (not named and asked == 2), prompt
            promised = [float(seconds_text(k / asked)) for k in range(7 * asked)]
            assert answered(answer)[: len(promised)] == promised and lost == 0
            assert answered(answer)[len(promised) :] in ([], [7.0])  # the end of the film is shown, too
            single, rest, _ = conversation({**made, "style": "video_single_point_track_per_frame"}, placing, seed)
            (begin,) = answered(single)
            assert answered(rest) == [t for t in answered(answer) if t > begin] and f"{asked} f" in single


def test_points_in_the_answer_and_those_left_out_add_up():
    """A track every second of a film whose frames are spread; some are taken from beside the frames shown."""
    for length in (400, 660, 3700):
        spread = film(0, length)
        for snap in (0.25, 0.5):
            made = track(list(range(length)), spread, sampling_fps=1, snap=snap)
            _, answer, lost = conversation(made, spread)
            assert lost == length - len(answered(answer)) and len(answered(answer)) > 50


def test_exact_times_that_the_rate_does_not_meet_are_counted():
    """Every 0.28 s for 10 s, two a second asked for: 20 half seconds, 0 and 7.0 of which have a position."""
    times = [round(0.28 * i, 6) for i in range(36)]
    _, answer, lost = conversation(track(times, film(0, 10), snap=0), film(0, 10))
    assert answered(answer) == [0.0, 7.0] and lost == 20 - 2
    assert conversation(track(times, film(0, 10)), film(0, 10))[2] == 0


def test_a_rate_that_is_not_shown_is_refused_or_chosen():
    with pytest.raises(FieldError, match="sampling_fps is 4, not a divisor of the 2 frames per second"):
        track([0.0, 0.5, 1.0], film(), sampling_fps=4)
    with pytest.raises(FieldError, match="whole number"):
        track([0.0, 0.5, 1.0], film(), sampling_fps=1.5)
    slow = film()
    slow.sampling = {"max_fps": 1}
    assert track([0.0, 1.0, 2.0], slow)["sampling_fps"] == 1
    assert "sampling_fps" not in track([0.0, 0.5, 1.0], film())
    slow.sampling = {"max_fps": 0.5}
    with pytest.raises(FieldError, match="divisor of the 0.5 frames"):
        track([0.0, 2.0], slow)


def test_tracks_on_sampled_times_stay_as_they_are():
    placing = film(0, 2)
    made = track([0.0, 0.5, 1.0, 2.0], placing)
    assert [f["time"] for f in made["points"]] == [0.0, 0.5, 1.0, 2.0] and not placing.notes
    assert answered(conversation(made, placing)[1]) == [0.0, 0.5, 1.0, 2.0]


def test_a_track_takes_the_shown_frame_that_it_means():
    placing = film()
    assert answered(conversation(track([0.37], placing), placing)[1]) == [0.5]
    with pytest.raises(FieldError, match="hold nothing to track"):
        track([0.37], film(), snap=0.1)


@pytest.mark.parametrize("times, expected", [
    ([9.2], [9.0]),
    ([9.25], [9.0]),
    ([8.4, 9.2], [8.5, 9.0]),
    ([9.16, 9.24], [9.0]),
    ([9.1, 9.2], [9.0]),
    ([0.0, 9.2], [0.0, 9.0]),
])  # fmt: skip
def test_a_track_near_the_end_takes_the_last_frame_that_an_answer_can_have(times, expected):
    """Of 9.28 s, 9.0 and the end are shown last; the end is no multiple of half a second."""
    placing = Placing(View((), PICTURE, 9.28, 25.0))
    made = track(times, placing)
    assert answered(conversation(made, placing)[1]) == expected
    (begin,) = answered(conversation({**made, "style": "video_single_point_track_per_frame"}, placing)[0])
    assert begin in expected
    with pytest.raises(FieldError, match="hold nothing to track"):
        track([9.26], Placing(View((), PICTURE, 9.28, 25.0)))


def test_a_long_film_says_what_a_track_loses():
    """Of 400 s, 128 frames are spread, or shown from the start at a rate."""
    times = [i / 25 for i in range(25 * 400)]
    spread = film(0, 400)
    made = track(times, spread, sampling_fps=1)
    prompt, answer, lost = conversation(made, spread)
    marks = np.linspace(0, 400, 128)
    assert lost == 400 - len(answered(answer)) == 272
    assert answered(answer) == [round(t, 1) for t in marks] and not re.search(r"\d", prompt), "no rate"
    single = {**made, "style": "video_single_point_track_per_frame"}
    assert len(answered(conversation(single, spread, 1)[1])) > 100
    rate = Placing(View((), PICTURE, 400.0, 25.0), {"mode": "fps", "sampling_fps": 1})
    made = track(times, rate, sampling_fps=1)
    _, answer, lost = conversation(made, rate)
    assert answered(answer) == list(range(128)) and lost == 272
    assert conversation(made, rate, max_frames=384)[2] == 16
    late = Placing(View((), PICTURE, 400.0, 25.0), {"mode": "fps", "sampling_fps": 1})
    with pytest.raises(FieldError, match="hold nothing to track"):
        track([300.0, 301.0], late, sampling_fps=1)
    made = {**made, "points": [{"time": 300.0, "points": {"a": {"point": [1, 1]}}}]}
    with pytest.raises(DataError, match="no visible point of its 1 tracked times"):
        conversation(made, rate)
    ends = {**track([0.0, 300.0], rate, "video_point_ground_start_end"), "width": 400, "height": 300}
    other = {"time": 300.0, "points": {"b": {"point": [1, 1]}}}
    assert conversation({**ends, "points": [*ends["points"], other]}, rate)[2] == 1


def test_one_object_is_at_one_place_at_a_time():
    frames = [{"time": 0.5, "points": {"a": {"point": [90, 90]}}}, {"time": 0.5, "points": {"b": {"point": [95, 95]}}}]
    placing = film()
    place(placing, style=PER_FRAME, label="dog", points=frames)
    assert placing.notes == {REPEATED}
    with pytest.raises(FieldError, match=r"points\[2\].points.a is another position"):
        place(film(), style=PER_FRAME, label="dog", points=[*frames, frames[0]])


def test_a_track_whose_points_are_all_hidden_has_an_empty_answer():
    hidden = TrackFrame(1.0, {"a": TrackPoint((1, 1), occluded=True)})
    assert track_text([hidden], (10, 10), "dog", "html-v2") == ""


# --- repeated times, as published -------------------------------------------------------------------------------------


def published_points(times, groups):
    """The published loader sorts groups by time and writes one after the other, numbered on; thousandths of 100."""
    number, written = 1, []
    for i, _ in sorted(enumerate(times), key=lambda pair: pair[1]):
        scaled = sorted((round(10 * x), round(10 * y)) for x, y in groups[i])
        rows = [f"{number + k} {x:03d} {y:03d}" for k, (x, y) in enumerate(scaled)]
        written.append(" ".join([f"{times[i]:.1f}", *rows]))
        number += len(scaled)
    return ";".join(written)


def published_track(frames, ends_only):
    """[(time, {object: (x, y)})] -> the published text: for the first and last places, frames of one time are one."""
    if ends_only:
        places = {}
        for i, (_, points) in enumerate(frames):
            for name in points:
                places.setdefault(name, []).append(i)
        merged = {}
        for i, (time, points) in enumerate(frames):
            kept = {name: p for name, p in points.items() if i in (places[name][0], places[name][-1])}
            if kept:
                merged.setdefault(time, {}).update(kept)
        frames = list(merged.items())
    written, numbers = [], {}
    for time, points in sorted(frames, key=lambda frame: frame[0]):
        scaled = sorted(((round(10 * x), round(10 * y)), name) for name, (x, y) in points.items())
        for _, name in scaled:
            numbers.setdefault(name, len(numbers) + 1)
        rows = sorted((numbers[name], xy) for xy, name in scaled)
        if rows:
            written.append(f"{time:.1f} " + " ".join(f"{n} {x:03d} {y:03d}" for n, (x, y) in rows))
    return ";".join(written)


def test_repeated_times_are_written_as_published():
    """Oracle: the published formatter, re-derived, on groups in any order with times that come twice."""
    rng = np.random.default_rng(3)
    for _ in range(200):
        times = (rng.integers(0, 6, rng.integers(1, 8)) / 2).tolist()
        groups = [rng.integers(0, 100, (rng.integers(1, 4), 2)).tolist() for _ in times]
        made = place(film(), style="video_point", label="ear", timestamps=times, points=groups, point_scale=100)
        _, answer, _ = conversation(made, film())
        assert answer == f'<points coords="{published_points(times, groups)}">ear</points>'


@pytest.mark.parametrize("style", [PER_FRAME, "video_point_ground_start_end"])
def test_repeated_times_of_tracks_are_written_as_published(style):
    rng = np.random.default_rng(4)
    repeated = 0
    for _ in range(200):
        times = (np.sort(rng.integers(0, 6, rng.integers(1, 8))) / 2).tolist()
        free = {t: list("abcdefgh") for t in times}
        frames = [
            (t, {free[t].pop(0): tuple(rng.integers(0, 100, 2).tolist()) for _ in range(rng.integers(1, 3)) if free[t]})
            for t in times
        ]
        repeated += len(set(times)) < len(times)
        points = [{"time": t, "points": {k: {"point": list(p)} for k, p in found.items()}} for t, found in frames]
        placing = film()
        made = place(placing, style=style, label="dog", points=points, point_scale=100)
        _, answer, _ = conversation(made, placing)
        expected = published_track(frames, style.endswith("end"))
        assert answer == (f'<tracks coords="{expected}">dog</tracks>' if expected else "")
    assert repeated > 50
