"""Declared types of columns, and the check of rows against them."""

import math

import numpy as np
import pytest

from data_prep.sources.schema import check_row, image, maybe, number, one_of

POINT = {"x": number, "y": number}
KINDS = [
    (str, ["", "a"], [1, None, b"a"]),
    (int, [0, -5], [True, 1.0, "1", None]),
    (bool, [True, False], [1, None]),
    (float, [1.5, 2], [math.nan, math.inf, "1", True]),
    (number, [1.5, 2, np.float64(0.5)], [math.nan, -math.inf, None, False]),
    (bytes, [b""], ["", None]),
    (dict, [{}], [[]]),
    (object, [None, 1, "x"], []),
    (image, [b"x", "https://a/b.jpg", {"bytes": b"x", "path": None}, {"path": "a.jpg"}], [b"", "", {"bytes": None}, 1]),
    (maybe(str), ["a", None], [1]),
    (one_of(str, int), ["a", 1], [None, 1.5, True]),
    ([int], [[], [1, 2]], [[1, "a"], (1,), None]),
    ([POINT], [[], [{"x": 1, "y": 2.5, "z": "more"}]], [[{"x": 1}], [{"x": 1, "y": None}], [[1, 2]]]),
    ({"a": maybe([str]), "b": object}, [{}, {"a": None}, {"a": ["x"], "b": 1}], [{"a": "x"}, [], None]),
]


@pytest.mark.parametrize("kind, good, bad", KINDS, ids=[str(i) for i in range(len(KINDS))])
def test_kinds(kind, good, bad):
    for value in good:
        assert check_row({"c": value}, {"c": kind}) is None, value
    for value in bad:
        problem = check_row({"c": value}, {"c": kind})
        assert problem is not None and problem[0].startswith("c"), value


def test_the_place_of_a_bad_value_is_named():
    fields = {"frames": [{"time": number, "points": [POINT]}], "note": maybe(str)}
    row = {"frames": [{"time": 0, "points": []}, {"time": 1, "points": [{"x": 1, "y": "2"}]}], "more": 1}
    where, what = check_row(row, fields)
    assert where == "frames[1].points[0].y" and what == "a number was expected, not '2'"
    where, what = check_row({"note": None}, fields)
    assert where == "frames" and "is missing (there are: note)" in what


def test_fields_made_anew_are_not_mixed_up():
    for kind in [str, int] * 50:  # objects that may get the place of one that is gone
        assert check_row({"c": 1}, {"c": kind} if kind is int else {"c": str, "d": maybe(int)}) == (
            None if kind is int else ("c", "text was expected, not 1")
        )
