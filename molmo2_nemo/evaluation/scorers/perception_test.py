"""Multiple choice of the Perception Test (arXiv 2305.13786): the first capital A to D that is a word of its own.

A reference is an object with all options (evaluation/choice.py). The answer is what `final_answer` finds in the
response.

>>> right = {"option": "B", "options": ["a", "b", "c"]}
>>> [SCORER.score(text, [right]).value for text in ("(B) b", "Both", "I think B", "A or B")]
[1.0, 0.0, 1.0, 0.0]
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.choice import Choice, ChoiceScorer
from molmo2_nemo.evaluation.text import final_answer

LETTER = re.compile(r"\b([A-D])\b")


class PerceptionTest(ChoiceScorer):
    name = "perception_test"
    title = "the first capital A to D that is a word of its own is the reference's option"

    def choose(self, response: str, choices: Sequence[Choice]) -> Score:
        found = LETTER.search(final_answer(response))
        letter = found[1] if found else None
        return Score(float(letter in [choice.letter for choice in choices]), {"option": letter})


SCORER = PerceptionTest()
