"""Scoring a stream of answers with the chosen scorers, and the aggregate of each scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.scorers import find_scorer


class Scoring:
    """The scorers of one evaluation, and the scores so far.

    Args:
        names: of scorers.

    Raises:
        UserError: no name, an unknown name, or a duplicate.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if not names or len(set(names)) < len(names):
            raise UserError(f"{','.join(names)!r}: name scorers, each once, with commas between")
        self.scorers: list[Scorer] = [find_scorer(name) for name in names]
        self.scores: dict[str, list[Score]] = {name: [] for name in names}

    def references(self, key: str, reference: Any) -> list[Any]:
        """The references of one answer, as a list; of blank texts and empty objects, none.

        Args:
            reference: a text, an object of JSON values, a list of them, or None.

        Raises:
            UserError: fewer references than a scorer needs, or one that it cannot compare with; names `key`.
        """
        given = reference if isinstance(reference, list | tuple) else [reference]
        given = [one for one in given if (one.strip() if isinstance(one, str) else one)]
        if not given:
            raise UserError(f"{key} has no reference answer to score against")
        self.needs(len(given), key)
        for scorer in self.scorers:
            try:
                scorer.check(given)
            except UserError as error:
                raise UserError(f"{key}: {error}") from None
        return given

    def needs(self, count: int, key: str = "a record of --data") -> None:
        """Refuses scorers that need more than `count` references of an answer.

        Raises:
            UserError: names `key` and the scorer.
        """
        for scorer in self.scorers:
            if count < scorer.min_references:
                raise UserError(
                    f"{key} has {count} reference answer{'s' if count > 1 else ''}, but {scorer.name} needs "
                    f"{scorer.min_references} or more"
                )

    def score(self, key: str, prediction: str, reference: Any) -> dict[str, dict[str, Any]]:
        """Scores of one answer: name of the scorer -> {"value": 0 to 1, and the details it was computed from}.

        Raises:
            UserError: too few references, or one that a scorer cannot use; names `key`.
        """
        given = self.references(key, reference)
        found = {}
        for scorer in self.scorers:
            try:
                score = scorer.score(prediction, given)
            except UserError as error:
                raise UserError(f"{key}: {error}") from None
            assert 0 <= score.value <= 1, (scorer.name, score)
            self.scores[scorer.name].append(score)
            found[scorer.name] = {"value": score.value, **score.details}
        return found

    def table(self) -> str:
        """The aggregate of each scorer over all answers, as a text table."""
        width = max(len(scorer.name) for scorer in self.scorers)
        lines = [f"{'scorer':{width}}  {'answers':>7}  {'score':>7}"]
        for scorer in self.scorers:
            scores = self.scores[scorer.name]
            figure = f"{100 * scorer.aggregate(scores):.1f} %" if scores else "-"
            lines.append(f"{scorer.name:{width}}  {len(scores):7}  {figure:>7}  {scorer.title}")
        return "\n".join(lines)
