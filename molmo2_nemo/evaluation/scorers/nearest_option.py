"""Multiple choice by the nearest option, the published evaluation's "mc": AI2D, ScienceQA, A-OKVQA, TOMATO and others.

A reference is an object with all options (evaluation/choice.py). The names of options are their letters, or their
texts where they were asked without letters. The option chosen is the one `nearest_name` finds for what `final_answer`
finds in the response: always one, so that an empty answer names one of the shortest options.

>>> cat = {"option": "A", "options": ["a cat", "a dog"]}
>>> [SCORER.score(text, [cat]).value for text in ("A", "A. a cat", "B. a cat", "a dog")]
[1.0, 1.0, 0.0, 1.0]
>>> SCORER.score("dog", [cat | {"option": "B", "unlabelled": True}]).value
1.0
"""

from __future__ import annotations

from collections.abc import Sequence

from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.choice import Choice, ChoiceScorer, nearest_name
from molmo2_nemo.evaluation.text import final_answer


class NearestOption(ChoiceScorer):
    name = "nearest_option"
    title = "the option nearest to the answer is the reference's"

    def choose(self, response: str, choices: Sequence[Choice]) -> Score:
        chosen = [nearest_name(final_answer(response), choice.names) for choice in choices]
        right = any(place == choice.index for place, choice in zip(chosen, choices, strict=True))
        return Score(float(right), {"option": choices[0].letters[chosen[0]]})


SCORER = NearestOption()
