"""Multiple choice of NExT-QA (arXiv 2105.08276) as published for Molmo2.

As parsed_choice, but only the forms (B), B as a word of its own, and B., in this order. A reference is an object with
all options (evaluation/choice.py). The answer is what `final_answer` finds in the response.

>>> dog = {"option": "B", "options": ["a cat", "a dog"]}
>>> [SCORER.score(text, [dog]).value for text in ("B.", "A: it is B or so", "B: a dog")]
[1.0, 1.0, 0.5]
"""

from __future__ import annotations

from collections.abc import Sequence

from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.choice import (
    BRACKETS,
    DOT,
    SPACES,
    Choice,
    ChoiceScorer,
    chosen_score,
    last_named,
    share_without,
)
from molmo2_nemo.evaluation.text import final_answer


class NextQa(ChoiceScorer):
    name = "nextqa"
    title = "the option that the answer gives last, as (B), B or B., is the reference's; chance without one"

    def choose(self, response: str, choices: Sequence[Choice]) -> Score:
        return chosen_score(last_named(final_answer(response), choices[0], (BRACKETS, SPACES, DOT)), choices)

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        return share_without(scores)


SCORER = NextQa()
