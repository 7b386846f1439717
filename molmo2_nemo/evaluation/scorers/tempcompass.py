"""Accuracy of TempCompass (arXiv 2403.00476), the rules that need no judge.

A reference is {"task": "multi-choice", "answer": "B. clockwise"}; the task is multi-choice, caption_matching or yes_no.
Multiple choice and caption matching: the response is the answer, or a letter A to D, or begins with one and "." or ")":
then it must be the answer's first character. Yes or no: what the response begins with. A response that no rule can read
is wrong, as published without a judge (with one, a language model is asked); the figure `by rule` of a data set is the
share of the others. Captioning needs a judge and has no rule. A further field "aspect" breaks the figures down.

>>> spin = {"task": "multi-choice", "answer": "B. clockwise"}
>>> [SCORER.score(text, [spin]).value for text in ("B", "B) clockwise", "clockwise")]
[1.0, 1.0, 0.0]
>>> SCORER.score("Yes, it does.", [{"task": "yes_no", "answer": "yes"}]).value
1.0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.groups import mean_by, mean_of
from molmo2_nemo.evaluation.reference_fields import object_reference

LETTERS = ("A", "B", "C", "D")
CHOICE, YES_NO = ("multi-choice", "caption_matching"), "yes_no"


def chosen(response: str, answer: str) -> bool | None:
    """Whether a response chooses the answer; None if no rule can read it."""
    if response == answer:
        return True
    if response in LETTERS or response.startswith(tuple(letter + mark for letter in LETTERS for mark in ".)")):
        return response[0] == answer[0]
    return None


def said(response: str, answer: str) -> bool | None:
    """Whether a response says yes or no as the answer does; None if it says neither."""
    for word in ("yes", "no"):
        if response.lower().startswith(word):
            return word == answer
    return None


class TempCompass(Scorer):
    name = "tempcompass"
    title = "the option's letter, or yes or no, at the start of the response is the reference's; no judge"

    def check(self, references: Sequence[Any]) -> None:
        for reference in references:
            entry = object_reference(self.name, reference, {"task": str, "answer": str})
            if entry["task"] not in (*CHOICE, YES_NO) or not entry["answer"]:
                raise UserError(f"{self.name}: no rule for task {entry['task']!r}, answer {entry['answer']!r}")

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        self.check(references)
        response, entry = prediction.strip(), references[0]
        right = (said if entry["task"] == YES_NO else chosen)(response, entry["answer"])
        named = {name: entry[name] for name in ("task", "aspect") if name in entry}
        return Score(float(bool(right)), {"by rule": right is not None, **named})

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        return mean_of(scores, ["by rule"]) | mean_by(scores, "task") | mean_by(scores, "aspect")


SCORER = TempCompass()
