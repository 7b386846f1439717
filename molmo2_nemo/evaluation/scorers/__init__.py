"""The scorers, one file each. To add one, put a file here that defines `SCORER`, whose name is that of the file."""

from __future__ import annotations

import importlib
import pkgutil

from molmo2_nemo.errors import UserError, nearest
from molmo2_nemo.evaluation.base import Scorer


def scorer_names() -> list[str]:
    """Names of all scorers, from their files."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_scorer(name: str) -> Scorer:
    """The scorer with a name.

    Raises:
        UserError: there is none; the message suggests the nearest name.
    """
    if name not in scorer_names():
        raise UserError(f"unknown scorer {name!r}; {nearest(name, scorer_names())}")
    scorer = importlib.import_module(f"{__name__}.{name}").SCORER
    assert isinstance(scorer, Scorer) and scorer.name == name, f"scorers/{name}.py: SCORER is not a Scorer of that name"
    return scorer
