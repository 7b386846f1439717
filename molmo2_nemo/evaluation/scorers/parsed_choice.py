"""Multiple choice by MMMU's parser (arXiv 2311.16502), as published for MuirBench, MMIU, MMSI-Bench, BLINK, MulSet,
Mantis.

The letter given in the first of the forms (B), B), B., B:, or as a word of its own that occurs in the answer; the
last if there are several. Else, in an answer of more than five words, the option whose text comes last. For an answer
without either the published evaluation draws an option; here its value is what that is worth on average, 1 / the
number of options, and the figure `without an option` of a data set is the share of these answers.

A reference is an object with all options (evaluation/choice.py), or a text (Mantis' short answers), with which the
answer must agree after VQA processing. The answer is what `final_answer` finds in the response.

>>> dog = {"option": "B", "options": ["a cat", "a dog"]}
>>> [SCORER.score(text, [dog]).value for text in ("(A) or (B)", "B", "I am sure that is a dog", "a dog")]
[1.0, 1.0, 1.0, 0.5]
>>> SCORER.score("Two.", ["2"]).value
1.0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.choice import TextOrChoiceScorer, chosen_score, last_named, read_choice, share_without
from molmo2_nemo.evaluation.scorers.vqa_accuracy import processed
from molmo2_nemo.evaluation.text import final_answer


class ParsedChoice(TextOrChoiceScorer):
    name = "parsed_choice"
    title = "the option that the answer gives last is the reference's; chance without one"

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        answer = final_answer(prediction)
        if isinstance(references[0], str):
            return Score(float(processed(answer) in [processed(str(reference)) for reference in references]))
        choices = [read_choice(self.name, reference) for reference in references]
        return chosen_score(last_named(answer, choices[0]), choices)

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        return share_without(scores)


SCORER = ParsedChoice()
