"""Prints the pins of cpu.txt for those direct dependencies that are not installed, or too old: what an image lacks.

python requirements/lacking.py > lacking.txt && pip install --no-deps -r lacking.txt
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# Not here on purpose: torch, Megatron-core, NeMo and what they are built with. Those are the image's.
OPTIONAL = ("braceexpand", "intervaltree", "matplotlib", "tensorboard")  # of webdataset and lhotse; of the demo


def direct() -> list[Requirement]:
    """The `dependencies` of pyproject.toml (read as text: Python 3.10 has no tomllib), and some of theirs."""
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, flags=re.DOTALL | re.MULTILINE)
    assert block is not None
    return [Requirement(line) for line in (*re.findall(r'"([^"]+)"', block[1]), *OPTIONAL)]


def lacking(wanted: list[Requirement]) -> list[str]:
    """The pins of those that are absent or do not fit."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines()]
    here = [pin for pin in map(Requirement, filter(None, lines)) if pin.marker is None or pin.marker.evaluate()]
    pins = {canonicalize_name(pin.name): f"{pin.name}{pin.specifier}" for pin in here}
    found = []
    for requirement in wanted:
        try:
            fits = requirement.specifier.contains(version(requirement.name), prereleases=True)
        except PackageNotFoundError:
            fits = False
        if not fits:
            found.append(pins[canonicalize_name(requirement.name)])
    return found


if __name__ == "__main__":
    print("\n".join(lacking(direct())))
