"""What every source relies on: schema checks, grouping in bounded memory, randomness from the key alone."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest

from data_prep.sources import base
from data_prep.sources.base import Context, File, Inline, Url, column_media, maybe, number
from data_prep.sources.schema import check_row, image, one_of


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (str, ["", "x"], [None, 1, b"x"]),
        (int, [0, -5], [True, 1.0, "1", None]),
        (float, [1, 2.5], [float("nan"), float("inf"), "1", True]),
        (number, [1, 2.5], [None, "x", float("nan")]),
        (bool, [True], [1, None]),
        (bytes, [b""], ["x"]),
        ([str], [[], ["a"]], ["a", ["a", 1], None, ("a",)]),
        ([[number]], [[[1, 2.0]], [[]]], [[1], [["x"]]]),
        (
            {"a": int, "b": maybe(str)},
            [{"a": 1}, {"a": 1, "b": None, "c": 0}],
            [{"b": "x"}, {"a": "1"}, {"a": 1, "b": 2}, []],
        ),
        (maybe([int]), [None, [1]], [["x"]]),
        (one_of(str, [str]), ["a", ["a"]], [1, [1]]),
        (image, ["a.jpg", b"x", {"bytes": b"x", "path": None}, {"path": "a.jpg"}], ["", None, {"bytes": None}, 5]),
        (object, [None, 1, "x"], []),
        (dict, [{}], [[]]),
        (list, [[]], [{}]),
    ],
)
def test_types_of_columns(kind, good, bad):
    for value in good:
        assert check_row({"x": value}, {"x": kind}) is None, value
    for value in bad:
        assert check_row({"x": value}, {"x": kind}) is not None, value


def test_what_is_wrong_is_named_to_the_innermost_field():
    row = {"qa": [{"q": "x", "points": [{"x": 1, "y": 2}, {"x": 1}]}]}
    name, detail = check_row(row, {"qa": [{"q": str, "points": [{"x": number, "y": number}]}]})
    assert name == "qa[0].points[1].y" and "is missing (there are: x)" in detail and "a number" in detail
    assert check_row({}, {"a": maybe(str), "b": object}) is None
    assert check_row({"other": 1}, {"a": str})[0] == "a"


def test_picture_columns():
    assert column_media({"bytes": b"x", "path": "a/b.PNG"}) == Inline(b"x", "png")
    assert column_media({"bytes": None, "path": "a/b.png"}) == File("a/b.png")
    assert column_media(b"x") == Inline(b"x") and column_media("https://h/x.jpg") == Url("https://h/x.jpg")
    assert column_media("a.jpg") == File("a.jpg")
    for nothing in (None, "", {}, 5, {"bytes": b""}):
        with pytest.raises(ValueError):
            column_media(nothing)


@pytest.mark.parametrize("held", [10_000, 7, 1])
def test_grouping_keeps_order_in_memory_or_on_disk(tmp_path, monkeypatch, held):
    monkeypatch.setattr(base, "GROUP_ROWS_IN_MEMORY", held)
    rows = [{"video": f"v{(i * i) % 11}", "n": i, "blob": bytes([i]), "deep": {"x": [None, 1.5]}} for i in range(100)]
    expected = {}
    for row in rows:
        expected.setdefault(row["video"], []).append(row)
    got = list(Context.for_tests(tmp_path / "scratch").grouped(rows, "video"))
    assert got == list(expected.items())
    assert got == list(Context.for_tests().grouped(iter(rows), lambda row: row["video"]))
    assert not list((tmp_path).rglob("rows.sqlite"))


def test_grouping_many_rows_takes_little_memory(tmp_path, monkeypatch):
    """Thirty times more rows than may be held do not raise the peak by the size of the rows."""
    monkeypatch.setattr(base, "GROUP_ROWS_IN_MEMORY", 200)
    rows = ({"k": i % 1500, "text": "x" * 3000 + str(i)} for i in range(6_000))
    tracemalloc.start()
    try:
        count = sum(len(group) for _, group in Context.for_tests(tmp_path).grouped(rows, "k"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 6_000 and peak < 4e6, peak  # the rows together: 18 MB


def test_randomness_depends_on_seed_source_and_key():
    def draw(source="a", seed=0, key="k"):
        return tuple(Context.for_tests(source=source, seed=seed).rng(key).integers(10**9, size=3))

    drawn = [draw(s, seed, key) for s, seed, key in itertools.product("ab", (0, 1), ("k", "l"))]
    assert len(set(drawn)) == 8 and draw() == draw()
