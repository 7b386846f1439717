"""Multiple choice of EgoSchema (arXiv 2308.09126) as published for Molmo2.

Of the letters given as (B), B before a space, or B., the one whose last occurrence comes first; else, in an answer of
more than five words, the option whose text's last occurrence comes first. For an answer without either the published
evaluation draws an option; here its value is what that is worth on average, 1 / the number of options. A reference is
an object with all options (evaluation/choice.py). The answer is what `final_answer` finds in the response.

>>> dog = {"option": "B", "options": ["a cat", "a dog"]}
>>> [SCORER.score(text, [dog]).value for text in ("B. or A.", "A. or B.", "a dog")]
[1.0, 0.0, 0.5]
"""

from __future__ import annotations

from collections.abc import Sequence

from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.choice import Choice, ChoiceScorer, chosen_score, contents, share_without, stripped
from molmo2_nemo.evaluation.text import final_answer

FORMS = ("({})", "{} ", "{}.")


def earliest(answer: str, choice: Choice) -> str | None:
    """The letter of the option that an answer gives."""
    answer = stripped(answer)
    found = [(answer.rfind(form.format(letter)), letter) for form in FORMS for letter in choice.letters]
    if given := [(place, letter) for place, letter in found if place >= 0]:
        return min(given, key=lambda entry: entry[0])[1]
    places = contents(answer, choice)
    return min(places, key=lambda letter: places[letter]) if places else None


class EgoSchema(ChoiceScorer):
    name = "egoschema"
    title = "the option that the answer gives first is the reference's; chance without one"

    def choose(self, response: str, choices: Sequence[Choice]) -> Score:
        return chosen_score(earliest(final_answer(response), choices[0]), choices)

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        return share_without(scores)


SCORER = EgoSchema()
