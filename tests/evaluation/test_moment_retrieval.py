"""Moment retrieval against the published functions, and answers that they read differently."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.scorers import find_scorer
from molmo2_nemo.evaluation.scorers.moment_retrieval import THRESHOLDS, segments

CASES = json.loads(gzip.decompress((Path(__file__).parent / "official/moment_retrieval.json.gz").read_bytes()))
SCORER = find_scorer("moment_retrieval")


def test_as_the_published_functions():
    assert len(CASES) >= 500
    for case in CASES:
        score = SCORER.score(case["answer"], [{"windows": case["windows"]}])
        assert score.details["segments"] == case["segments"]
        official = case["precision"], case["recall"], case["f1"]
        assert (score.details["precision"], score.details["recall"], score.value) == pytest.approx(official)
        figures = SCORER.figures([score])
        for threshold, value in case.get("r1", {}).items():
            assert 100 * figures[f"r1@{threshold}"] == value
        if "ap" in case:
            ap = {"average": figures["map"]} | dict(zip(map(str, THRESHOLDS), score.details["ap"], strict=True))
            assert {name: 100 * value for name, value in ap.items()} == pytest.approx(case["ap"], abs=0.00501)
    assert sum(0 < case["f1"] < 1 for case in CASES) > 100  # not only trivial ones
    assert sum(len({*case.get("ap", {}).values()}) > 2 for case in CASES) > 100


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Segments: [4-10.5], [20-30]", [(4, 10.5), (20, 30)]),
        ("4 - 10", [(4, 10)]),
        ("from 4 to 10 seconds", [(4, 10)]),
        ("4s – 10s", [(4, 10)]),
        ("1:05-1:20", [(65, 80)]),
        ("1:00:05 to 1:00:20.5", [(3605, 3620.5)]),
        ("[10-4], [7-7]", []),  # they do not begin before they end
        ("at 10", []),
        ("", []),
        ("1-2-3", [(1, 2)]),
        ("4 tomatoes 10", []),
    ],
)
def test_segments_of_an_answer(answer, expected):
    assert segments(answer) == expected


def test_figures_are_means_over_answers():
    window = [{"windows": [[0, 10]]}]
    answers = ["[0-10]", "[0-6]", "nothing", "[50-60], [0-10]"]
    scores = [SCORER.score(answer, window) for answer in answers]
    assert [score.value for score in scores] == pytest.approx([1, 1, 0, 2 / 3])
    figures = SCORER.figures(scores)
    assert figures["r1@0.3"] == figures["r1@0.5"] == 0.5 and figures["r1@0.7"] == 0.25
    assert figures["miou"] == pytest.approx((1 + 0.6 + 0 + 0) / 4)
    assert figures["map@0.5"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert figures["map@0.75"] == pytest.approx((1 + 0 + 0 + 0.5) / 4)
    assert "hit1" not in figures


def test_the_first_segments_clip_is_rated_very_good():
    rated = {"windows": [[0, 8]], "clips": [0, 1, 2, 3], "saliency": [[4, 4, 4], [3, 3, 3], [2, 4, 1], [0, 0, 0]]}
    scores = [SCORER.score(answer, [rated]) for answer in ("[0-1.5]", "[2-4]", "[4-5]", "[20-30]", "none")]
    assert [score.details["hit1"] for score in scores] == [1, 0, 1, 0, 0]
    assert SCORER.figures(scores)["hit1"] == 0.4


def test_an_answer_that_could_not_be_asked_for_counts_0():
    scores = [SCORER.score("[0-10]", [{"windows": [[0, 10]]}]), Score(0.0)]
    assert SCORER.figures(scores) == pytest.approx(
        dict.fromkeys(("precision", "recall", "r1@0.3", "r1@0.5", "r1@0.7", "miou", "map", "map@0.5", "map@0.75"), 0.5)
    )


def test_a_text_may_be_the_reference():
    assert SCORER.score("[0-10]", ["Segments: [0-10], [20-30]"]).details["recall"] == 0.5


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        ([], "0 references; expected one"),
        (["[0-1]", "[0-1]"], "2 references; expected one"),
        (["yes"], "'yes' names no segment"),
        ([{"windows": []}], 'expected {"windows": [[start, end], ...]}'),
        ([{"windows": [[5, 5]]}], "each with 0 <= start < end"),
        ([{"windows": [["0", "5"]]}], "each with 0 <= start < end"),
        ([7], "the reference is 7"),
        ([{"windows": [[0, 1]], "clips": [1], "saliency": []}], "lists of the same length"),
        ([{"windows": [[0, 1]], "saliency": [[1]]}], "lists of the same length"),
        ([{"windows": [[0, 1]], "clips": [0], "saliency": [[1, "4"]]}], "numbers"),
        ([{"windows": [[0, 1]], "clips": [0], "saliency": [[1]], "clip_seconds": 0}], "clip_seconds is 0"),
    ],
)
def test_references_that_cannot_be_compared_with(references, expected):
    with pytest.raises(UserError) as error:
        SCORER.check(references)
    assert expected in str(error.value) and str(error.value).startswith("moment_retrieval: ")
