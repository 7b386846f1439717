"""benchmarks/imports.py runs every way, and a way that fails is an error."""

from __future__ import annotations

import json

import pytest

from benchmarks import imports


@pytest.mark.thorough  # three processes that import NeMo
def test_every_way_is_measured(tmp_path):
    found = imports.main(["--repeats", "1", "--out", str(tmp_path / "r.json")])
    assert set(found) == set(imports.WAYS) and all(times[0] > 1 for times in found.values())
    assert json.loads((tmp_path / "r.json").read_text())["ratios"]["nemo"] == 1


def test_a_way_that_fails_is_an_error(monkeypatch):
    monkeypatch.setitem(imports.WAYS, "none", "import no_such_module")
    with pytest.raises(SystemExit, match="no_such_module"):
        imports.seconds("none")
