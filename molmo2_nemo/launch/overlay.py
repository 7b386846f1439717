"""The folder of packages that the command `molmo2` of an image looks into first (requirements/overlay.py makes it)."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from molmo2_nemo.errors import UserError

RECORD = "molmo2_overlay.json"
AGAIN = "make it again: requirements/overlay.py, or build the image anew"


@dataclass(frozen=True)
class Overlay:
    site: Path  # the folder in PYTHONPATH
    beside: dict[str, str]  # versions of the environment's own packages, as they were when it was made

    @property
    def command(self) -> Path:
        """The `molmo2` that looks into it."""
        return self.site.parent / "bin" / "molmo2"


def find_overlay() -> Overlay | None:
    """The one that this process looks into, or None.

    Raises:
        UserError: its record is damaged.
    """
    for entry in sys.path:
        path = Path(entry) / RECORD
        if os.path.isfile(path):
            return Overlay(path.parent.resolve(), _beside(path))
    return None


def _beside(record: Path) -> dict[str, str]:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))["beside"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{record} is not what requirements/overlay.py writes ({error!r}); {AGAIN}") from error
    if not isinstance(found, dict) or not all(isinstance(version, str) for version in found.values()):
        raise UserError(f"{record}: 'beside' is {str(found)[:60]}, expected versions by package; {AGAIN}")
    return found


def origin_of(name: str) -> str:
    """Where an installed package comes from: "overlay", or "environment" (of the image, or of this python)."""
    overlay = find_overlay()
    try:
        place = Path(str(distribution(name).locate_file(""))).resolve()
    except PackageNotFoundError:
        return "environment"
    return "overlay" if overlay is not None and place == overlay.site else "environment"
