"""Multiple choice of LongVideoBench (arXiv 2407.15754): the first of the capitals A to E in the answer.

Phrases such as "The answer is" are taken out before. A reference is an object with all options (evaluation/choice.py).
For an answer without such a capital the published evaluation draws an option; here its value is what that is worth on
average, 1 / the number of options, and the figure `without an option` of a data set is the share of these answers.

>>> right = {"option": "C", "options": ["a", "b", "c", "d"]}
>>> [SCORER.score(text, [right]).value for text in ("C. c", "The answer is C", "A or C", "none")]
[1.0, 1.0, 0.0, 0.25]
"""

from __future__ import annotations

from collections.abc import Sequence

from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.choice import Choice, ChoiceScorer, chosen_score, first_letter, share_without

PHRASES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)
LETTERS = "ABCDE"


class LongVideoBench(ChoiceScorer):
    name = "longvideobench"
    title = "the first of the capitals A to E in the answer is the reference's option; chance without one"

    def choose(self, response: str, choices: Sequence[Choice]) -> Score:
        return chosen_score(first_letter(response.strip(), LETTERS, PHRASES), choices)

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        return share_without(scores)


SCORER = LongVideoBench()
