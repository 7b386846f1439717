"""What `make test-thorough` runs and `make test` skips: the same equality again, on another layout or on more cases.

A case belongs here if what it shows is shown by another case too, and if it costs more than a few seconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest

THOROUGH = bool(os.environ.get("MOLMO2_THOROUGH"))


def thorough(*values: Any) -> Any:
    """A case of `parametrize` that make test skips."""
    return pytest.param(*values, marks=pytest.mark.thorough)


def mostly(names: Iterable[str], *usual: str) -> list[Any]:
    """Cases by name: make test runs only the `usual` ones."""
    names = list(names)
    unknown = set(usual) - set(names)
    assert not unknown, f"no such case: {unknown}"
    return [name if name in usual else thorough(name) for name in names]
