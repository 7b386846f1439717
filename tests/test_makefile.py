"""The Makefile's targets that need no environment."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("venv", [".venv", "elsewhere"])
def test_clean_leaves_every_environment_as_it_is(venv, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = {".venv/lib", ".venv-3.12/lib", ".venv-fixtures", f"{venv}/lib"}
    for folder in (*kept, "molmo2_nemo", "tests/data"):
        (tmp_path / folder / "__pycache__").mkdir(parents=True)
    subprocess.run(["make", "-s", "clean", f"VENV={venv}", "PYTHON=python3"], cwd=tmp_path, check=True)
    left = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("__pycache__")}
    assert left == kept
