"""Questions that are judged together: a group is right if all its answers are."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from molmo2_nemo.evaluation.base import Score


def all_right(scores: Iterable[Score]) -> float:
    """The share of groups (details "group"), of at least one, all of whose answers have the value 1.

    A score without a group, of a question that could not be asked, is a group of its own.
    """
    right: dict[Hashable, bool] = {}
    for number, score in enumerate(scores):
        group = score.details.get("group", number)
        right[group] = right.get(group, True) and score.value == 1
    return sum(right.values()) / len(right)


def mean_by(scores: Sequence[Score], field: str) -> dict[str, float]:
    """The mean value by a field of the details; scores without it do not count."""
    values: dict[str, list[float]] = {}
    for score in scores:
        if field in score.details:
            values.setdefault(str(score.details[field]), []).append(score.value)
    return {name: sum(found) / len(found) for name, found in sorted(values.items())}


def mean_of(scores: Sequence[Score], fields: Sequence[str]) -> dict[str, float]:
    """The mean of each field of the details over the scores that have it; fields that none has are left out."""
    found = {name: [float(score.details[name]) for score in scores if name in score.details] for name in fields}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def by_kind(scores: Sequence[Score]) -> dict[str, float]:
    """The share of groups that are right among the scores of each kind (details "kind")."""
    kinds: dict[str, list[Score]] = {}
    for score in scores:
        if "kind" in score.details:
            kinds.setdefault(score.details["kind"], []).append(score)
    return {kind: all_right(found) for kind, found in sorted(kinds.items())}
