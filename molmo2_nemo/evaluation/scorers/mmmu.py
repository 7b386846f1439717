"""Accuracy of MMMU (arXiv 2311.16502), multiple choice and open questions, by its published parser.

Multiple choice: as parsed_choice; empty options do not count. Open questions: the end of each line of the answer (after
the last "is ", "so ", "answer ", "=" and others, whichever leaves least), and each number in it, is compared with each
reference: numbers agree to two decimals, texts if the reference lies in what was found.

A reference is an object with all options (evaluation/choice.py), or a text. The answer is what `final_answer` finds
in the response.

>>> [SCORER.score(text, ["1,000"]).value for text in ("So the answer is 1000.", "x = 1000.001", "1000 or 2")]
[1.0, 1.0, 1.0]
>>> SCORER.score("The area is a large square", ["square"]).value
1.0
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.choice import (
    Choice,
    TextOrChoiceScorer,
    chosen_score,
    last_named,
    read_choice,
    share_without,
)
from molmo2_nemo.evaluation.text import final_answer

SIGNS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")  # before an answer
MARKS = (":", ",", ".", "!", "?", ";", "'")
NUMBERS = (  # with commas, with an exponent, others
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def without_empty(choice: Choice) -> Choice:
    """A question without its empty options; the correct one is not among them."""
    kept = tuple(text for text in choice.options if text)
    return replace(choice, options=kept, index=sum(bool(text) for text in choice.options[: choice.index]))


def forms(text: str) -> list[str | float]:
    """What a text is compared as: a number to two decimals; or in lower case, one character with a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def line_end(line: str, signs: Sequence[str]) -> str:
    """The shortest of the texts after the last of each sign in a line; nothing if there is none.

    An empty one is passed over by any later."""
    end = ""
    for sign in signs:
        if sign in line:
            rest = line.split(sign)[-1].strip()
            end = rest if not end or len(rest) < len(end) else end
    return end


def found_answers(response: str) -> set[str | float]:
    """Everything in an answer to an open question that may be what it answers."""
    response = response.strip().strip(".").lower()
    lines = response.split("\n")
    ends = [line_end(line, (*SIGNS, "=") if line is lines[-1] else SIGNS) for line in lines]
    keys = [end for end in ends if end and end not in MARKS] or [response]
    numbers = [number for key in keys for pattern in NUMBERS for number in pattern.findall(key)]
    return {form for text in [*keys, *numbers] for form in forms(text)}


def agrees(response: str, references: Sequence[str]) -> bool:
    """Whether an answer to an open question is correct."""
    expected = {form for reference in references for form in forms(reference)}
    texts = [form for form in expected if isinstance(form, str)]
    return any(
        any(text in found for text in texts) if isinstance(found, str) else found in expected
        for found in found_answers(response)
    )


class Mmmu(TextOrChoiceScorer):
    name = "mmmu"
    title = "the option given last, or an answer with the reference in it, by MMMU's parser"

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        self.check(references)
        answer = final_answer(prediction)
        if isinstance(references[0], str):
            return Score(float(agrees(answer, [str(reference) for reference in references])))
        choices = [without_empty(read_choice(self.name, reference)) for reference in references]
        return chosen_score(last_named(answer, choices[0]), choices)

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        return share_without(scores)


SCORER = Mmmu()
