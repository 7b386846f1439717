"""Length and recall of captions by rule; recall against another package's ROUGE-1."""

from __future__ import annotations

import doctest
import gzip
import importlib
import json
from pathlib import Path

import pytest

from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.scorers import find_scorer
from molmo2_nemo.evaluation.scorers.caption_recall import content_words

CASES = json.loads(gzip.decompress((Path(__file__).parent / "official/caption_recall.json.gz").read_bytes()))
RECALL, LENGTH = find_scorer("caption_recall"), find_scorer("caption_length")


def test_recall_is_rouge_1_over_content_words():
    assert len(CASES) >= 500
    for case in CASES:
        score = RECALL.score(case["caption"], [case["reference"]])
        assert score.value == score.details["recall"]
        assert score.details == pytest.approx({name: case[name] for name in ("recall", "precision", "f1")}), case
    assert sum(0 < case["recall"] < 1 for case in CASES) > 200


def test_content_words():
    assert content_words("The dog's 2 bowls aren't HERE; two berries (red, Red)") == {
        **{"dog": 1, "2": 1, "bowl": 1, "two": 1, "berry": 1, "red": 2}
    }
    assert not content_words("It isn't, and they don’t.") and not content_words("")


def test_recall_takes_the_reference_that_is_told_best():
    score = RECALL.score("a red boat", ["two horses", "a boat on a river"])
    assert score.value == 0.5 and score.details["precision"] == 0.5


@pytest.mark.parametrize("texts", [["it is"], ["Кошка на диване."], ["一只猫", "the of"]])
def test_a_reference_without_content_is_none(texts):
    with pytest.raises(UserError, match=f"no content word of English in the reference '{texts[0]}'"):
        RECALL.check(texts)
    assert RECALL.score("a dog", [*texts, "a red dog"]).value == 0.5


def test_figures_of_recall():
    scores = [RECALL.score(text, ["red boat"]) for text in ("red boat", "boat", "sun moon")]
    assert RECALL.aggregate(scores) == 0.5
    assert RECALL.figures(scores) == pytest.approx({"precision": 2 / 3, "f1": (1 + 2 / 3) / 3})
    assert RECALL.figures([*scores[:1], Score(0.0)]) == {"precision": 0.5, "f1": 0.5}  # one that could not be asked for


@pytest.mark.parametrize(
    ("caption", "references", "expected"),
    [
        ("one two", ["one two three four"], 0.5),
        ("one two three four", ["one two"], 0.5),
        ("", ["one"], 0),
        ("", [""], 1),
        ("one two", ["x", "a b c"], 0.5),  # of two that are equally near, the first
        ("one  two\n", ["x", "a b"], 1),
    ],
)
def test_length(caption, references, expected):
    assert LENGTH.score(caption, references).value == expected


def test_figures_of_length():
    scores = [LENGTH.score("one two ", ["ab"]), LENGTH.score("", ["a b c"])]
    assert LENGTH.figures(scores) == {
        **{"words": 1, "characters": 3.5, "reference_words": 2, "reference_characters": 3.5, "words_ratio": 0.5}
    }
    assert LENGTH.figures([LENGTH.score("one two", ["ab"]), Score(0.0)])["words"] == 2
    assert LENGTH.figures([Score(0.0)]) == {}
    assert "words_ratio" not in LENGTH.figures([LENGTH.score("a", [""])])


@pytest.mark.parametrize("scorer", [RECALL, LENGTH])
def test_a_reference_may_be_an_object_with_a_text(scorer):
    assert scorer.score("a red boat", [{"text": "a red boat"}]).value == 1
    scorer.check(["boat", {"text": "boat"}])
    with pytest.raises(UserError, match="expected a text or"):
        scorer.check(["a", {"points": []}])


@pytest.mark.parametrize("name", ["caption_length", "caption_recall", "moment_retrieval"])
def test_examples_in_the_definitions(name):
    found = doctest.testmod(importlib.import_module(f"molmo2_nemo.evaluation.scorers.{name}"))
    assert found.attempted and not found.failed
