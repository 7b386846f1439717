"""Points of an answer and of its reference on the picture that a report shows."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.evaluation.drawn import marks, shown_time, with_marks
from molmo2_nemo.evaluation.run import picture
from molmo2_nemo.preview.draw import rgb
from molmo2_nemo.preview.marks import ANSWERED, RIGHT, draw_answer
from tests.support.films import film, numbers


def places(image: Image.Image, colour: str) -> tuple[float, float] | None:
    """The middle of all pixels near a colour, in parts of the width and height."""
    rows, columns = np.nonzero(np.abs(np.asarray(image, int) - rgb(colour)).sum(-1) < 90)
    return (columns.mean() / image.width, rows.mean() / image.height) if len(rows) else None


def test_a_cross_and_a_ring_are_where_the_points_are():
    blank = Image.new("RGB", (300, 200), "black")
    drawn = draw_answer(blank, [(25, 75, "")], [(80, 10, "")], (100, 100))
    assert places(drawn, ANSWERED) == pytest.approx((0.25, 0.75), abs=0.01)
    assert places(drawn, RIGHT) == pytest.approx((0.8, 0.1), abs=0.01)
    assert drawn.size == blank.size and not np.asarray(blank).any()  # the original stays
    assert np.array_equal(np.asarray(draw_answer(blank, [], [], (100, 100))), np.asarray(blank))
    named = draw_answer(blank, [(25, 75, "7")], [(80, 10, "dog")], (100, 100))
    assert (np.asarray(named) != np.asarray(drawn)).any()
    draw_answer(blank, [(-5, 1e9, "x" * 99)], [(1e9, -5, "")], (100, 100))  # at the edge


IMAGE = {"points": [[10, 20]], "size": [100, 100]}
FILM = {"timestamps": [0.5, 2.0], "points": [[[1, 1]], [[30, 40]]], "size": [100, 100]}
TRACK = {"frames": [{"time": t, "points": {"a": [t, 5]}} for t in (0.0, 1.0, 2.0)], "size": [100, 100]}


@pytest.mark.parametrize(
    ("reference", "time", "answer", "answered", "right"),
    [
        (IMAGE, None, '<points coords="1 1 500 600">x</points>', [(50, 60, "")], [(10, 20, "")]),
        ({"images": [IMAGE, IMAGE]}, None, '<points coords="2 1 500 600">x</points>', [], [(10, 20, "")]),
        (FILM, 2.0, '<points coords="0.5 1 100 100;2.5 2 300 300">x</points>', [(30, 30, "")], [(30, 40, "")]),
        (TRACK, 1.0, '<tracks coords="0.0 4 100 100;1.0 4 300 300">x</tracks>', [(30, 30, "4")], [(1, 5, "a")]),
        (TRACK, 1.0, "nothing", [], [(1, 5, "a")]),
    ],
)
def test_what_is_drawn(reference, time, answer, answered, right):
    assert shown_time([reference]) == time
    found = marks(answer, [reference])
    assert found is not None and found.size == (100, 100)
    assert (found.answered, found.right) == (answered, right)


@pytest.mark.parametrize(
    "references", [[], ["a text"], [{"count": 3}], [{"points": 5, "size": [1, 1]}], [{"frames": [3]}]]
)
def test_nothing_is_drawn_without_points(references):
    assert shown_time(references) is None and marks("", references) is None
    assert with_marks("not looked at", "", references) == "not looked at"


def test_the_picture_of_an_answer_is_the_frame_with_its_points():
    builder = ExampleBuilder(DataConfig(), Molmo2Tokenizer.load("tiny"), training=False)
    example = builder.prompt(video=film(90), question="?")  # 3 s, 30 fps
    shown = picture(example, 0.5)
    frame = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown))))
    assert numbers(frame[None]) == [15]
    reference = {"timestamps": [0.5], "points": [[[80, 50]]], "size": [100, 100]}
    drawn = Image.open(io.BytesIO(base64.b64decode(with_marks(shown, "", [reference]))))
    found = places(drawn, RIGHT)
    assert found == pytest.approx((0.8, 0.5), abs=0.05)
