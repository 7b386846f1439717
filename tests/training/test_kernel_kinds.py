"""Kernels' names as profilers show them, each under its kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from molmo2_nemo.training.kernel_kinds import KINDS, kind_of

FIXTURE = Path(__file__).parents[1] / "fixtures" / "kernel_names.txt"  # names below a line "# kind"


def names() -> dict[str, list[str]]:
    parts = FIXTURE.read_text().removeprefix("# ").strip().split("\n# ")
    return {kind: listed.split("\n") for kind, listed in (part.strip().split("\n", 1) for part in parts)}


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_kernels(kind):
    assert {name: kind_of(name) for name in names()[kind]} == dict.fromkeys(names()[kind], kind)
