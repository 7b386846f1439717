"""Multiple choice of Video-MME (arXiv 2405.21075): the first of the capitals A to D in the answer.

Phrases such as "The answer is" and "Answer:" are taken out before. A reference is an object with all options
(evaluation/choice.py). An answer without such a capital is wrong; the published evaluation leaves it out of the mean,
which is the figure `of answered` of a data set.

>>> right = {"option": "C", "options": ["a", "b", "c", "d"]}
>>> [SCORER.score(text, [right]).value for text in ("C. c", "The best answer is C", "Answer: C", "A or C", "none")]
[1.0, 1.0, 1.0, 0.0, 0.0]
"""

from __future__ import annotations

from collections.abc import Sequence

from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.choice import Choice, ChoiceScorer, first_letter

PHRASES = (  # in the order in which they are taken out; two of them are two phrases in one, as published
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
    "Answer:",
    "Option:",
    "The correct answer",
    "The correct option",
)
LETTERS = "ABCD"


class VideoMme(ChoiceScorer):
    name = "videomme"
    title = "the first of the capitals A to D in the answer is the reference's option"

    def choose(self, response: str, choices: Sequence[Choice]) -> Score:
        found = first_letter(response.strip(), LETTERS, PHRASES)
        return Score(float(found in [choice.letter for choice in choices]), {"option": found})

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        answered = [score.value for score in scores if score.details.get("option")]
        of_answered = {"of answered": sum(answered) / len(answered)} if answered else {}
        return of_answered | {"without an option": 1 - len(answered) / len(scores)}


SCORER = VideoMme()
