"""References: scorers whose references are texts, and reading the fields of objects, with the errors a user sees."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.text import final_answer


def text_reference(scorer: str, reference: Any) -> str:
    """A reference that is a text.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(reference, str):
        raise UserError(f"{scorer}: the reference is {reference!r}; expected a text")
    return reference


def object_reference(scorer: str, reference: Any, fields: dict[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """A reference that is an object with at least these fields, each of its type.

    Raises:
        UserError: it is something else, or lacks a field; names the field.
    """
    expected = ", ".join(fields)
    if not isinstance(reference, dict):
        raise UserError(f"{scorer}: the reference is {reference!r}; expected an object with {expected}")
    for field, kind in fields.items():
        value = reference.get(field)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{scorer}: {field} is {value!r} in the reference {reference!r}; expected {expected}")
    return reference


class TextScorer(Scorer):
    """A scorer that compares the answer in a response with texts."""

    def check(self, references: Sequence[Any]) -> None:
        for reference in references:
            text_reference(self.name, reference)

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        self.check(references)
        return self.compare(final_answer(prediction), references)

    @abstractmethod
    def compare(self, answer: str, references: Sequence[str]) -> Score:
        """The score of what `final_answer` finds in a response."""
