"""CoSyn rows in their published schema -> samples."""

import pytest

from data_prep.sources.base import Inline
from tests.support.source_rows import conversations, only, png, prepare, reasons

IMAGE = {"bytes": png(), "path": "chart_1.png"}
PAIRS = {
    "question": ["What is the largest bar?", "Is B above 3?"],
    "explanation": ["A is 5 and B is 2.", "B is 2."],
    "answer": ["A", "No"],
}


@pytest.mark.parametrize("kind", ["chart", "chemical", "diagram", "math", "music", "table"])
def test_explained(kind):
    row = {"id": f"{kind}-1", "image": IMAGE, "qa_pairs": PAIRS, "metadata": {"figure_type": "bar"}, "code": "x"}
    samples, skips = prepare(f"cosyn_{kind}_exp", [row])
    sample = only(samples)
    assert not skips and sample.key == f"{kind}-1" and list(sample.images) == [Inline(png(), "png")]
    assert sample.annotations[0] == {
        "style": f"cosyn_{kind}_exp",
        "question": "What is the largest bar?",
        "answer": "A",
        "explanation": "A is 5 and B is 2.",
    }
    turns = dict(turn for (turn,) in conversations(sample))
    assert set(turns.values()) == {"A is 5 and B is 2. Answer: A", "B is 2. Answer: No"}
    assert all(asked.startswith(f"cosyn_{kind}_exp: ") for asked in turns)
    assert all(any(question in asked for asked in turns) for question in PAIRS["question"])


def test_documents_are_answered_without_explanation():
    sample = only(prepare("cosyn_document", [{"id": "d", "image": IMAGE, "qa_pairs": PAIRS}])[0])
    assert sample.annotations[1] == {"style": "cosyn_document", "question": "Is B above 3?", "answer": "No"}
    assert ("cosyn_document: Is B above 3?", "No") in [turn for (turn,) in conversations(sample)]


def test_what_cannot_be_learned():
    short = {**PAIRS, "answer": ["A"]}
    empty = [{"question": "q", "explanation": None, "answer": a} for a in (None, "No")]  # as a list of objects
    rows = [{"id": str(i), "image": IMAGE, "qa_pairs": pairs} for i, pairs in enumerate([short, empty])]
    samples, skips = prepare("cosyn_chart_exp", rows)
    assert only(samples).annotations == [{"style": "cosyn_chart_exp", "question": "q", "answer": "No"}]
    assert reasons(skips) == {"0": "lists of different lengths", "1#0": "empty answer"}


@pytest.mark.parametrize("kind", ["chart", "chemical", "diagram", "doc", "music", "table"])
def test_several_pictures(kind):
    row = {"id": "m", "images": [IMAGE, IMAGE, IMAGE], "qa_pairs": PAIRS, "metadata": {"num_images": 3}}
    many = {**row, "id": "six", "images": [IMAGE] * 6, "metadata": {"num_images": 6}}
    samples, skips = prepare(f"cosyn_multidoc_{kind}_exp", [row, many])
    sample = only(samples)
    assert len(sample.images) == 3 and sample.annotations[1]["style"] == f"cosyn_{kind}_exp"
    assert sample.annotations[1]["explanation"] == "B is 2."
    assert reasons(skips) == {"six": "more than 5 images"}


@pytest.mark.parametrize("names", [["Button", "legend"], None])
def test_points(names):
    row = {
        "id": "p",
        "image": IMAGE,
        "questions": ["Point to the button", "Where is the legend?"],
        "answer_points": [{"x": [10.0, 50.0], "y": [20.0, 60.0]}, [{"x": 1.25, "y": 99.0}]],
        **({"names": names} if names else {}),
    }
    sample = only(prepare("cosyn_point", [row])[0])
    assert [a["points"] for a in sample.annotations] == [[[10.0, 20.0], [50.0, 60.0]], [[1.25, 99.0]]]
    turns = {turn for (turn,) in conversations(sample)}
    label = "button" if names else "point to the button"
    assert ("Point to the button", f'<points coords="1 1 100 200 2 500 600">{label}</points>') in turns


def test_points_that_do_not_match():
    row = {
        "id": "p",
        "image": IMAGE,
        "questions": ["a", "b"],
        "answer_points": [{"x": [], "y": []}, {"x": [1], "y": [2]}],
        "names": ["a", "b"],
    }
    samples, skips = prepare("cosyn_point", [row, {**row, "id": "q", "names": ["a"]}])
    assert [a["label"] for a in only(samples).annotations] == ["b"]
    assert reasons(skips) == {"p#0": "no points", "q": "lists of different lengths"}
