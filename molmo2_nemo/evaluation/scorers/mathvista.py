"""Accuracy of MathVista (arXiv 2310.02255), the part that needs no judge.

The published evaluation has a language model extract the answer from the response, and then compares by rule; here
the whole response is the answer, as published without the model. Multiple choice: the nearest letter's option. An
integer, or a number rounded to the reference's precision, must be written as the reference is; any other answer must
be the reference. An answer with words around the number is thus wrong here and may be right as published.

A reference is {"answer": "1.2", "type": "float", "precision": 1}, with type integer, float, text or list; or
{"answer": "a cat", "type": "choice", "options": ["a cat", "a dog"]}.

>>> [SCORER.score(text, [{"answer": "1.2", "type": "float", "precision": 1}]).value for text in ("1.23", "It is 1.2")]
[1.0, 0.0]
>>> SCORER.score("B", [{"answer": "a dog", "type": "choice", "options": ["a cat", "a dog"]}]).value
1.0
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.choice import LETTERS, nearest_name
from molmo2_nemo.evaluation.reference_fields import object_reference
from molmo2_nemo.evaluation.text import edit_distance

TYPES = ("choice", "integer", "float", "text", "list")


def chosen(response: str, options: Sequence[str]) -> str:
    """The text of the option that a response names. A text with a letter and a colon in it counts as that letter, as
    published."""
    letters = LETTERS[: len(options)]
    text = options[nearest_name(response, letters)].strip()
    if found := re.search(r"([a-zA-Z]):", text):
        text = found[1].upper()
    if len(text) == 1 and text in letters:
        return options[letters.index(text)]
    return min(options, key=lambda option: edit_distance(text, option))


def written(response: str, entry: dict[str, Any]) -> str | None:
    """A response in the form in which the reference is written; None if it is not of its type."""
    if entry["type"] == "choice":
        return chosen(response, entry["options"])
    try:
        if entry["type"] == "integer":
            return str(int(response) if re.fullmatch(r"\s*[+-]?\d+\s*", response) else int(float(response)))
        if entry["type"] == "float":
            return str(round(float(response), entry["precision"]))
    except (ValueError, OverflowError):
        return None
    return response


class MathVista(Scorer):
    name = "mathvista"
    title = "the response is the reference's number or option; no judge"

    def check(self, references: Sequence[Any]) -> None:
        for reference in references:
            self.entry(reference)

    def entry(self, reference: Any) -> dict[str, Any]:
        entry = object_reference(self.name, reference, {"answer": str, "type": str})
        if entry["type"] not in TYPES:
            raise UserError(f"{self.name}: type is {entry['type']!r}; expected one of {', '.join(TYPES)}")
        further: dict[str, dict[str, type | tuple[type, ...]]] = {
            "float": {"precision": int},
            "choice": {"options": list},
        }
        return object_reference(self.name, reference, further.get(entry["type"], {}))

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        entries = [self.entry(reference) for reference in references]
        found = [written(prediction.strip(), entry) for entry in entries]
        right = any(text == entry["answer"] for text, entry in zip(found, entries, strict=True))
        return Score(float(right), {"answer": found[0]})


SCORER = MathVista()
