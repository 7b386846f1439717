"""Accuracy of RealWorldQA as published for Molmo2: the nearest of the letters A to D, or the same text.

A reference is an object with all options (evaluation/choice.py): the answer must be nearest to its letter, of the four
letters whatever the number of options. Or it is a text: both must agree after VQA processing. The answer is what
`final_answer` finds in the response.

>>> [SCORER.score(text, [{"option": "B", "options": ["1", "2"]}]).value for text in ("B. 2", "C")]
[1.0, 0.0]
>>> SCORER.score("two", ["2"]).value
1.0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.choice import TextOrChoiceScorer, nearest_name, read_choice
from molmo2_nemo.evaluation.scorers.vqa_accuracy import processed
from molmo2_nemo.evaluation.text import final_answer

LETTERS = "ABCD"


class RealWorldQa(TextOrChoiceScorer):
    name = "realworldqa"
    title = "the letter nearest to the answer is the reference's, or the texts agree"

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        self.check(references)
        answer = final_answer(prediction)
        texts = [processed(reference) for reference in references if isinstance(reference, str)]
        letters = [read_choice(self.name, entry).letter for entry in references if not isinstance(entry, str)]
        right = processed(answer) in texts or LETTERS[nearest_name(answer, LETTERS)] in letters
        return Score(float(right))


SCORER = RealWorldQa()
