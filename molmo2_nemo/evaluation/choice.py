"""Multiple choice: the options that a reference holds, and the ways in which published evaluations read an answer.

A reference is {"option": "B", "options": ["a cat", "a dog"]}: the letter of the correct option and the texts of all, in
the order in which they were asked. `"unlabelled": true` says that they were asked without letters, as lines of text.
Some scorers read further fields, such as "group": the questions that are judged together.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from molmo2_nemo.errors import DataError, UserError
from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.reference_fields import object_reference
from molmo2_nemo.evaluation.text import edit_distance

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
STRIPPED = ",.!?;:'"  # marks that an answer may end or begin with
BRACKETS, BRACKET, DOT, COLON, SPACES = "({})", "{})", "{}.", "{}:", " {} "  # forms in which a letter is given
LISTED = re.compile(r"^\s*\(?([A-Z])[.):]\s*(.+)$", re.MULTILINE)
FORMS = (BRACKETS, BRACKET, DOT, COLON, SPACES)
LONG_ANSWER = 5  # words; only a longer answer is searched for the text of an option


@dataclass(frozen=True)
class Choice:
    """The options of a question and the correct one."""

    options: tuple[str, ...]
    index: int  # of the correct one
    labelled: bool = True  # asked with a letter before each

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.options)]

    @property
    def letter(self) -> str:
        return LETTERS[self.index]

    @property
    def names(self) -> Sequence[str]:
        """How an answer is to name each option: its letter or, without letters, its text."""
        return self.letters if self.labelled else self.options


def read_choice(scorer: str, reference: Any) -> Choice:
    """The options and the correct one in a reference.

    Raises:
        UserError: it is not of the form above.
    """
    entry = object_reference(scorer, reference, {"option": str, "options": list})
    options = entry["options"]
    if not 1 <= len(options) <= len(LETTERS) or not all(isinstance(text, str) for text in options):
        raise UserError(f"{scorer}: options is {options!r}; expected 1 to {len(LETTERS)} texts")
    letters = LETTERS[: len(options)]
    if len(entry["option"]) != 1 or entry["option"] not in letters:
        raise UserError(f"{scorer}: option is {entry['option']!r}; expected one of the letters {letters}")
    return Choice(tuple(options), letters.index(entry["option"]), not entry.get("unlabelled", False))


def place_of(letter: str) -> int:
    """The number of the option that a letter stands for, from 0.

    Raises:
        DataError: it is no capital letter.
    """
    if len(letter) != 1 or letter not in LETTERS:
        raise DataError(f"the answer is {letter!r}; expected the letter of an option")
    return LETTERS.index(letter)


def options_in(question: str) -> list[str]:
    """The options that stand in a question's text, a line each, from A."""
    return [text.strip() for _, text in LISTED.findall(question)]


def choice_reference(answer: int, options: Sequence[str], *, unlabelled: bool = False) -> dict[str, Any]:
    """The reference of a question, of which option number `answer` is correct.

    Raises:
        DataError: there is no such option.
    """
    if not 0 <= answer < len(options):
        raise DataError(f"the answer is {LETTERS[answer % len(LETTERS)]!r} of {len(options)} options")
    return {"option": LETTERS[answer], "options": list(options), "unlabelled": unlabelled}


class TextOrChoiceScorer(Scorer):
    """A scorer whose references are texts, or options with the correct one."""

    def check(self, references: Sequence[Any]) -> None:
        for reference in references:
            if not isinstance(reference, str):
                read_choice(self.name, reference)


def nearest_name(answer: str, names: Sequence[str]) -> int:
    """The option that an answer is nearest to, case and outer whitespace not counting: the one it equals; else the only
    one it begins with, that begins with it, or that it lies in; else the first of least edit distance. There always
    is one."""
    answer = answer.lower().strip()
    names = [name.lower().strip() for name in names]
    rules: list[Callable[[str], bool]] = [
        lambda name: name == answer,
        answer.startswith,
        lambda name: name.startswith(answer),
        lambda name: answer in name,
    ]
    for rule in rules:
        found = [place for place, name in enumerate(names) if rule(name)]
        if len(found) == 1 or (found and rule is rules[0]):
            return found[0]
    distances = [edit_distance(name, answer) for name in names]
    return distances.index(min(distances))


def first_letter(answer: str, letters: str, phrases: Sequence[str]) -> str | None:
    """The first capital letter among `letters` anywhere in an answer, after the phrases (in order) are taken out."""
    for phrase in phrases:
        answer = answer.replace(phrase, "")
    found = re.search(f"[{letters}]", answer)
    return found[0] if found else None


def stripped(answer: str) -> str:
    """An answer without marks at its ends, taken off one kind after the other, between two spaces."""
    for mark in STRIPPED:
        answer = answer.strip(mark)
    return f" {answer} "


def last_formed(answer: str, letters: str, form: str) -> str | None:
    """The letter whose last occurrence in a form, such as "({})", is the last of all letters'."""
    places = {letter: answer.rfind(form.format(letter)) for letter in letters}
    last = max(letters, key=lambda letter: places[letter])
    return last if places[last] >= 0 else None


def contents(answer: str, choice: Choice) -> dict[str, int]:
    """Where the text of an option last occurs in a long answer, by its letter; case does not count."""
    if len(answer.split()) <= LONG_ANSWER:
        return {}
    texts = [text.strip().lower() for text in choice.options]
    places = {letter: answer.lower().rfind(text) for letter, text in zip(choice.letters, texts, strict=True)}
    return {letter: place for letter, place in places.items() if place >= 0}


def last_named(answer: str, choice: Choice, forms: Sequence[str] = FORMS) -> str | None:
    """The letter that an answer gives in the first of the forms that occurs in it, the last if there are several; else,
    in a long answer, of the option whose text comes last."""
    answer = stripped(answer)
    for form in forms:
        if letter := last_formed(answer, choice.letters, form):
            return letter
    places = contents(answer, choice)
    return max(places, key=lambda letter: places[letter]) if places else None


def chosen_score(letter: str | None, choices: Sequence[Choice]) -> Score:
    """The score of a chosen option; of none (None), what drawing an option is worth on average."""
    value = 1 / len(choices[0].options) if letter is None else float(letter in [choice.letter for choice in choices])
    return Score(value, {"option": letter})


def share_without(scores: Sequence[Score]) -> dict[str, float]:
    """The share of answers in which no option was found."""
    found = [score.details["option"] for score in scores if "option" in score.details]
    return {"without an option": found.count(None) / len(found)} if found else {}


class ChoiceScorer(Scorer):
    """A scorer whose references are objects with all options."""

    def check(self, references: Sequence[Any]) -> None:
        for reference in references:
            read_choice(self.name, reference)

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        return self.choose(prediction, [read_choice(self.name, reference) for reference in references])

    @abstractmethod
    def choose(self, response: str, choices: Sequence[Choice]) -> Score:
        """The score of a response to a question, for which each of `choices` is right."""
