"""benchmarks/kernels.py runs every piece by its ways that need no compiler."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.kernels import MEASURED, main
from molmo2_nemo.fused import compiled
from molmo2_nemo.fused.choice import PIECES


@pytest.fixture
def no_compiler(monkeypatch):
    """A machine that cannot compile: what the script says of such ways, in a second."""
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    compiled._missing.cache_clear()
    yield
    compiled._missing.cache_clear()


def test_every_piece_is_measured(no_compiler, tmp_path):
    small = ["--tokens", "64", "--crops", "1", "--repeats", "1"]
    owned = not torch.distributed.is_initialized()
    found = main([*small, "--out", str(tmp_path / "r.json")])
    if owned:
        torch.distributed.destroy_process_group()
    assert set(MEASURED) == {"norm", "rotary", "swiglu", "residual", "vision", "pooling", "loss"}
    rows = {(row["piece"], row["way"]): row for row in found["rows"]}
    assert set(rows) == {(piece, way) for piece in MEASURED for way in PIECES[piece]}
    for (_, way), row in rows.items():
        if way == "compiled":
            assert "there is no compiler on the path" in row["cannot run"]
        else:
            assert row["seconds"] > 0 and row["peak"] > 0
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == found["rows"]
