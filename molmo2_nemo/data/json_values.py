"""What the readers of a record's JSON share: whether a value is a number, and how a value is shown in a message."""

from __future__ import annotations

import math
from typing import Any


def is_number(value: Any) -> bool:
    """A finite int or float; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int too large for a float
        return False


def show(value: Any) -> str:
    """At most 60 characters of a value."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
