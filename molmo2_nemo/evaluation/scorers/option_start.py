"""Multiple choice by the first character, as published for MVBench, MLVU, LVBench, MotionBench ("em_start").

The response is right if what `final_answer` finds in it begins with the letter of the reference, in either case: so
does "A ball is seen", whatever it is an answer to. A reference is an object with all options (evaluation/choice.py).

>>> ball = {"option": "A", "options": ["a ball", "a bat"]}
>>> [SCORER.score(text, [ball]).value for text in ("(A)", "A. a ball", "a bat")]
[0.0, 1.0, 1.0]
"""

from __future__ import annotations

from collections.abc import Sequence

from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.choice import Choice, ChoiceScorer
from molmo2_nemo.evaluation.text import final_answer


class OptionStart(ChoiceScorer):
    name = "option_start"
    title = "the answer begins with the letter of the reference's option"

    def choose(self, response: str, choices: Sequence[Choice]) -> Score:
        answer = final_answer(response).strip().upper()
        return Score(float(answer.startswith(tuple(choice.letter for choice in choices))), {"option": answer[:1]})


SCORER = OptionStart()
