"""Scorers on text against the published evaluation, replayed from tests/evaluation/official/text_scorers.py."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from molmo2_nemo.evaluation.scorers import find_scorer

FILE = Path(__file__).parent / "official" / "text_scorers.json.gz"
CASES: dict[str, list[tuple[str, list[Any], dict[str, float | None]]]] = json.loads(gzip.decompress(FILE.read_bytes()))
NO_NUMBER = re.compile(r"[+-]?(nan|inf)|\d_\d|٣", re.IGNORECASE)  # numbers to the published code, texts here


def ours(name: str, prediction: str, references: list[Any]) -> dict[str, Any]:
    """The score, its details and the figures of a data set of this answer alone, all by name."""
    scorer = find_scorer(name)
    scorer.check(references)
    score = scorer.score(prediction, references)
    return {"value": score.value, **score.details, **scorer.figures([score])}


def differs_on_purpose(name: str, prediction: str, references: list[Any]) -> bool:
    """The differences that docs/evaluation.md lists."""
    if name == "relaxed_accuracy":
        return any(NO_NUMBER.search(text) for text in (prediction, *references))
    return False


def expected(published: float | None, references: list[Any]) -> float | None:
    """The published score; where that is drawn by chance, what it is worth on average."""
    return 1 / len(references[0]["options"]) if published is None else published


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_scorer_scores_as_published(name):
    different = []
    for prediction, references, published in CASES[name]:
        found = ours(name, prediction, references)
        for key, value in published.items():
            if key == "of answered" and value is None:
                assert found["value"] == 0 and "of answered" not in found
            elif not math.isclose(float(found[key]), expected(value, references), abs_tol=1e-6):
                different.append((prediction, references, key, value, found[key]))
    different = [case for case in different if not differs_on_purpose(name, case[0], case[1])]
    assert not different, (len(different), different[:3])


def test_there_are_enough_cases_of_both_outcomes():
    for name, cases in CASES.items():
        values = [case[2].get("value", case[2].get("of answered")) for case in cases]
        assert len(cases) >= 500, name
        assert sum(value is not None and value > 0 for value in values) > 50 and values.count(0) > 50, name
