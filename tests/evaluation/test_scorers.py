"""Scorers against values worked out by hand from their published definitions."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation import choice, scorers, text
from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.scorers import find_scorer, scorer_names
from molmo2_nemo.evaluation.scorers.vqa_accuracy import processed
from molmo2_nemo.evaluation.text import edit_distance


def score(name: str, prediction: str, *references: str) -> float:
    return find_scorer(name).score(prediction, references).value


def test_all_scorers_are_found():
    known = {"exact_match", "vqa_accuracy", "anls", "relaxed_accuracy", "multiple_choice", "counting"}
    files = {path.stem for path in Path(scorers.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(scorer_names()) == files >= known
    assert all(find_scorer(name).title for name in scorer_names())


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The cat.", ["a CAT"], 1),
        ("  Santa   Claus!", ["Mr. Claus", "santa claus"], 1),
        ("don't", ["dont"], 1),  # punctuation goes, the word stays whole
        ("theatre", ["atre"], 0),  # "the" in a word is no article
        ("", ["cat"], 0),
        ("", ["The"], 1),  # nothing is left of either, as officially
        ("Zürich", ["zürich"], 1),
        ("Zurich", ["Zürich"], 0),
        ("3.5", ["35"], 1),  # officially so: punctuation is dropped before anything else
    ],
)
def test_exact_match(prediction, references, expected):
    assert score("exact_match", prediction, *references) == expected


@pytest.mark.parametrize(("same", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_humans(same, expected):
    """The leave-one-out figure, with k of 10 agreeing: k leave-outs see k - 1 of them, 10 - k see k. For 2:
    (2 * 1/3 + 8 * 2/3) / 10 = 0.6. The value itself is k / 3, at most 1."""
    humans = ["yes"] * same + ["no"] * (10 - same)
    found = find_scorer("vqa_accuracy").score("Yes.", humans)
    assert found.value == pytest.approx(min(1, same / 3))
    assert find_scorer("vqa_accuracy").figures([found]) == {"leave one out": pytest.approx(expected)}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A  Dog", "dog"),
        ("two", "2"),
        ("none", "0"),
        ("Isnt", "isn't"),
        ("it's 10:30", "it's 10:30"),
        ("3.50", "3.50"),
        ("mr. smith.", "mr smith"),
        ("1,000", "1000"),
        ("black/white", "black white"),
        ("red, blue", "red blue"),
        ("what?", "what"),
        ("dog\n", "dog"),
        ("", ""),
        ("Café", "café"),
    ],
)
def test_answers_are_processed_as_vqa_says(answer, expected):
    assert processed(answer) == expected


def test_vqa_accuracy_processes_both_sides():
    assert score("vqa_accuracy", "2", "two", "Two", "2", "the two") == 1
    assert score("vqa_accuracy", "", "cat", "cat", "dog", "cat") == 0
    assert find_scorer("vqa_accuracy").min_references == 3


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [("kitten", "sitting", 3), ("", "", 0), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("naïve", "naive", 1)],
)
def test_edit_distance(a, b, expected):
    assert edit_distance(a, b) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("Hello  World", ["hello world"], 1.0),
        ("hallo", ["hello"], 0.8),
        ("helo", ["hello"], 0.8),
        ("abcd", ["abxy"], 0.0),  # NL is 0.5: not below the threshold
        ("abc", ["abx"], 2 / 3),
        ("sitting", ["kitten", "sittin"], 6 / 7),
        ("", ["x"], 0.0),
        ("", [""], 1.0),
        ("Straße", ["strasse"], 5 / 7),  # one replaced, one more
    ],
)
def test_anls(prediction, references, expected):
    assert score("anls", prediction, *references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("105", ["100"], 1),
        ("95", ["100"], 1),
        ("105.01", ["100"], 0),
        ("94.99", ["100"], 0),
        ("1.05", ["1"], 0),  # 1.05 - 1 is above 0.05 in double precision, as published
        ("-1.05", ["-1"], 0),
        ("105", ["100"], 1),
        ("21", ["20"], 1),
        ("1", ["-1"], 0),
        ("12%", ["0.12"], 1),
        ("12", ["12%"], 0),
        ("0", ["0.0"], 0),  # nothing is relative to 0: texts
        ("0", ["0"], 1),
        ("0.01", ["0"], 0),
        ("1e3", ["1000"], 1),
        ("1,000", ["1000"], 0),  # no number by the definition, and another text
        ("Nan", ["nan"], 1),
        ("inf", ["5"], 0),
        ("Yes", ["yes"], 1),
        ("yes it is", ["yes"], 0),
        ("2011", ["2010", "1990"], 1),
        ("", ["3"], 0),
        ("٣", ["3"], 0),
    ],
)
def test_relaxed_accuracy(prediction, references, expected):
    assert score("relaxed_accuracy", prediction, *references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("B", ["B"], 1),
        ("b", ["B. a cat"], 1),
        ("(B)", ["B"], 1),
        ("B.", ["B. a cat"], 1),
        ("B) a dog", ["B. a cat"], 1),  # letters decide
        ("A. a cat", ["B. a cat"], 0),
        ("A cat.", ["B. a cat"], 1),  # no letter: an article
        ("a dog", ["B. a cat"], 0),
        ("C", ["B", "C"], 1),
        ("B", ["a cat"], 0),
        ("", ["B"], 0),
        ("the", ["a"], 0),
        ("Ä", ["B. Ä"], 1),
        ("Both", ["B"], 0),
        ("a.m.", ["A"], 0),
        ("Answer: B", ["B"], 1),
        ("B", [{"option": "B", "options": ["a cat", "a dog"]}], 1),
        ("the dog", [{"option": "B", "options": ["a cat", "a dog"]}], 1),
        ("(a) a cat", [{"option": "B", "options": ["a cat", "a dog"]}], 0),
        ("a doe", [{"option": "B", "options": ["a cat", "a dog"]}], 0),  # nothing is guessed
        ("B", [{"option": "B", "options": ["a cat", "a dog"], "unlabelled": True}], 0),
        ("C", [{"option": "A", "options": ["C", "A"], "unlabelled": True}], 1),
    ],
)
def test_multiple_choice(prediction, references, expected):
    assert score("multiple_choice", prediction, *references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("5", ["5"], 1),
        ("five.", ["5"], 1),
        ("There are 5 cats.", ["five"], 1),
        ('Counting the <points coords="1 1 500 500 2 30 40">cats</points> shows a total of 2.', ["2"], 1),
        ("1,000", ["1000"], 1),
        ("4 or 5", ["5"], 0),
        ("5.5", ["5"], 0),
        ("5 and 5", ["5"], 1),
        ("-5", ["5"], 0),
        ("", ["0"], 0),
        ("zero", ["0"], 1),
        ("some", ["3"], 0),
        ("someone", ["1"], 0),
        ("3", ["2", "3"], 1),
        ("٣", ["3"], 0),
    ],
)
def test_counting(prediction, references, expected):
    assert score("counting", prediction, *references) == expected


def test_counting_needs_a_number_to_compare_with():
    with pytest.raises(UserError, match="'many' has no number"):
        score("counting", "3", "3", "many")


def test_details():
    assert find_scorer("counting").score("3 cats", ["3"]) == Score(1.0, {"count": 3})
    assert find_scorer("multiple_choice").score("(c)", ["B"]) == Score(0.0, {"option": "C"})
    assert find_scorer("vqa_accuracy").score("yes", ["yes", "yes", "no", "no"]).details["agree"] == 2


def test_the_figure_is_the_mean():
    assert find_scorer("anls").aggregate([Score(1.0), Score(0.5), Score(0.0)]) == 0.5


@pytest.mark.parametrize("name", ["counting", "relaxed_accuracy"])
def test_a_number_that_is_too_long_is_no_number(name):
    assert score(name, "9" * 5000, "3") == 0


@pytest.mark.parametrize("name", sorted(scorer_names()))
def test_the_worked_examples_of_a_scorer(name):
    module = importlib.import_module(f"molmo2_nemo.evaluation.scorers.{name}")
    found = doctest.testmod(module)
    assert found.failed == 0


@pytest.mark.parametrize("module", [text, choice])
def test_the_worked_examples_of_what_scorers_share(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("name", "reference", "message"),
    [
        ("anls", {"option": "A"}, "expected a text"),
        ("nearest_option", "A", "expected an object with option, options"),
        ("nearest_option", {"option": "D", "options": ["a", "b"]}, "'D'; expected one of the letters AB"),
        ("nearest_option", {"option": "A", "options": []}, "expected 1 to 26 texts"),
        ("nearest_option", {"option": "A", "options": ["a", 3]}, "expected 1 to 26 texts"),
        ("multiple_choice", {"options": ["a"]}, "option is None"),
        ("clock", {"hour": 3, "minute": "5", "second": -1}, "minute is '5'"),
        ("clock", {"hour": True, "minute": 5, "second": -1}, "hour is True"),
        ("mathvista", {"answer": "3", "type": "number"}, "expected one of choice, integer"),
        ("mathvista", {"answer": "3", "type": "float"}, "precision is None"),
        ("mathvista", {"answer": "3", "type": "choice"}, "options is None"),
        ("tempcompass", {"task": "captioning", "answer": "x"}, "no rule for task 'captioning'"),
        ("temporalbench", {"option": "A", "options": ["a", "b"]}, "group is None"),
        ("vsi_bench", {"number": "3", "kind": "object_counting"}, "number is '3'"),
    ],
)
def test_references_that_a_scorer_cannot_use(name, reference, message):
    with pytest.raises(UserError, match=re.escape(message)):
        find_scorer(name).check([reference])


def test_figures_of_answers_without_an_option():
    right = {"option": "A", "options": ["a", "b", "c", "d"]}
    scorer = find_scorer("videomme")
    scores = [scorer.score(answer, [right]) for answer in ("A", "A", "B", "none")]
    assert scorer.aggregate(scores) == 0.5
    assert scorer.figures(scores) == {"of answered": pytest.approx(2 / 3), "without an option": 0.25}
    scorer = find_scorer("parsed_choice")
    scores = [scorer.score(answer, [right]) for answer in ("A", "none")]
    assert (scorer.aggregate(scores), scorer.figures(scores)) == (0.625, {"without an option": 0.5})


def test_vsi_bench_averages_kinds_of_question():
    """Directions: (1 + 0 + 0) / 3; counting: 0.5; so (1/3 + 0.5) / 2."""
    scorer = find_scorer("vsi_bench")
    right = {"option": "A", "options": ["left", "right"]}
    asked = [("A", right | {"kind": f"object_rel_direction_{grade}"}) for grade in ("easy",)]
    asked += [("B", right | {"kind": f"object_rel_direction_{grade}"}) for grade in ("medium", "hard")]
    asked += [("2", {"number": 2, "kind": "object_counting"}), ("9", {"number": 2, "kind": "object_counting"})]
    scores = [scorer.score(answer, [reference]) for answer, reference in asked]
    assert scorer.aggregate(scores) == pytest.approx((1 / 3 + 0.5) / 2)
    assert scorer.figures(scores)["object_counting"] == 0.5


def test_questions_judged_together():
    scorer = find_scorer("vinoground")
    asked = [(pair, kind, answer) for pair in "12" for kind in ("text", "video") for answer in "AB"]
    wrong = {("2", "video", "B")}
    scores = [
        scorer.score(
            "x" if case in wrong else f"({case[2]}) {case[2]}", [{"answer": case[2], "id": case[0], "kind": case[1]}]
        )
        for case in asked
    ]
    assert scorer.aggregate(scores) == 0.5
    assert scorer.figures(scores) == {"text": 1.0, "video": 0.5, "single questions": 7 / 8}


@pytest.mark.parametrize("name", sorted(scorer_names()))
def test_answers_without_details(name):
    """Questions that could not be asked: their score has nothing but the value 0."""
    scorer = find_scorer(name)
    assert scorer.aggregate([Score(0.0), Score(0.0)]) == 0
    assert all(0 <= value <= 1 for value in scorer.figures([Score(0.0)]).values())


def test_questions_that_could_not_be_asked_lower_a_score():
    right = {"number": 2, "kind": "object_counting"}
    scorer = find_scorer("vsi_bench")
    assert scorer.aggregate([scorer.score("2", [right]), Score(0.0)]) == 0.5
    scorer = find_scorer("videohallucer")
    assert scorer.aggregate([scorer.score("yes", [{"answer": "yes", "group": "a-1"}]), Score(0.0)]) == 0.5
