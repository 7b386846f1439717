"""F1 of a caption by statements, as a judge model finds them.

The definition is that of the released Molmo2 evaluation of video captions (its VixMoCaptionEval); the questions to the
judge are our own, and so figures of the two are not to be compared.

    recall     the share of the reference's statements that the caption states
    precision  the share of the caption's statements that the reference states (released: "consistency")
    f1         2 * precision * recall / (precision + recall), per caption; the figure is the mean over captions

A judge is asked up to four questions for a caption: the statements of the caption, those of the reference, and which of
each the other text states. A reference is a text, or {"text": ..., "statements": [...]} with statements that are known
already, as the released data have them; several references are read as one text.

Differences from the released code: statements have no categories; replies are JSON, and one with too few or too many
verdicts is asked for again, where the released code leaves out the lines that it cannot read; a caption that cannot be
judged is left out and counted, where the released code takes an empty list as 0; an empty caption is 0 without asking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.measure import Ask, Item, Measure, json_object
from molmo2_nemo.evaluation.text import text_of

LIST = """Between the lines of equals signs is a description of a picture or a video.
Break it into the facts that it states: one short sentence for each object, property, action, place, number, written \
text or order of events. Every sentence must be clear on its own, with names in place of pronouns. Repeat none, leave \
none out, and add nothing that is not said.
Reply with JSON alone, in this form: {"statements": ["...", "..."]}
==========
%s
=========="""
CHECK = """Between the lines of equals signs is a description of a picture or a video, and below it are %d statements.
Say of each statement whether the description says so, in whatever words: true if it does, false if it says otherwise \
or does not say. Judge by the description alone.
Reply with JSON alone, with one entry for each statement in its order, in this form: {"verdicts": [true, false]}
==========
%s
==========
%s"""


def statements_of(reply: str) -> list[str] | None:
    """The statements that a reply lists; None where it is of another form, or lists none."""
    found = (json_object(reply) or {}).get("statements")
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        return None
    return [" ".join(text.split()) for text in found if text.strip()] or None


def verdicts_of(count: int) -> Callable[[str], list[bool] | None]:
    """Reads `count` verdicts out of a reply; None where it is of another form."""

    def read(reply: str) -> list[bool] | None:
        found = (json_object(reply) or {}).get("verdicts")
        right = isinstance(found, list) and len(found) == count and all(isinstance(value, bool) for value in found)
        return found if right else None

    return read


def whole(references: Sequence[Any]) -> str:
    """The references as one text."""
    return "\n\n".join(map(text_of, references)).strip()


class CaptionF1(Measure):
    name = "caption_f1"
    title = "F1 of the statements of caption and reference, as a judge model finds them"

    def check(self, references: Sequence[Any]) -> None:
        if not references:
            raise UserError("no reference")
        for reference in references:
            text = text_of(reference)
            known = reference.get("statements", []) if isinstance(reference, dict) else []
            if not text.strip():
                raise UserError("the reference is blank")
            if not isinstance(known, list) or not all(isinstance(line, str) and line.strip() for line in known):
                raise UserError(f"statements is {known!r}; expected a list of texts")

    def score(self, ask: Ask[Any], item: Item) -> Score:
        caption, reference = item.prediction.strip(), whole(item.references)
        if not caption:
            return Score(0.0, {"recall": 0.0, "precision": 0.0, "statements": 0})
        expected = self._known(item.references) or ask(LIST % reference, statements_of)
        said = ask(LIST % caption, statements_of)
        told, true = self._stated(ask, expected, caption), self._stated(ask, said, reference)
        recall, precision = sum(told) / len(told), sum(true) / len(true)
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        missed = [text for text, there in zip(expected, told, strict=True) if not there]
        wrong = [text for text, there in zip(said, true, strict=True) if not there]
        details = {"recall": recall, "precision": precision, "statements": len(said)}
        return Score(f1, details | {"missed": missed, "unsupported": wrong})

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        names = ("recall", "precision", "statements")
        return {name: sum(score.details[name] for score in scores) / len(scores) for name in names}

    @staticmethod
    def _known(references: Sequence[Any]) -> list[str]:
        """Statements that are known of every reference; empty otherwise."""
        known = [r.get("statements", []) if isinstance(r, dict) else [] for r in references]
        return [line for lines in known for line in lines] if all(known) else []

    @staticmethod
    def _stated(ask: Ask[Any], statements: list[str], text: str) -> list[bool]:
        numbered = "\n".join(f"{number}. {line}" for number, line in enumerate(statements, start=1))
        verdicts: list[bool] = ask(CHECK % (len(statements), text, numbered), verdicts_of(len(statements)))
        return verdicts


CAPTION_F1 = CaptionF1()
