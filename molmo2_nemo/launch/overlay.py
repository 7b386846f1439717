"""The folder of packages that the command `molmo2` of an image looks into first (requirements/overlay.py makes it)."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

RECORD = "molmo2_overlay.json"


@dataclass(frozen=True)
class Overlay:
    site: Path  # the folder in PYTHONPATH
    beside: dict[str, str]  # versions of the environment's own packages, as they were when it was made

    @property
    def command(self) -> Path:
        """The `molmo2` that looks into it."""
        return self.site.parent / "bin" / "molmo2"


def find_overlay() -> Overlay | None:
    """The one that this process looks into, or None."""
    for entry in sys.path:
        path = Path(entry) / RECORD
        if path.is_file():
            return Overlay(path.parent.resolve(), json.loads(path.read_text())["beside"])
    return None


def origin_of(name: str) -> str:
    """Where an installed package comes from: "overlay", or "environment" (of the image, or of this python)."""
    overlay = find_overlay()
    try:
        place = Path(str(distribution(name).locate_file(""))).resolve()
    except PackageNotFoundError:
        return "environment"
    return "overlay" if overlay is not None and place == overlay.site else "environment"
