"""benchmarks/optimizer.py: every way takes a step from the same gradients; its figures are what it says."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.optimizer import NORMS, STEPS, main, peak


def bench_job(out: str) -> dict:
    return main(["--model", "tiny", "--vocabulary", "300", "--repeats", "1", "--out", out])


def test_every_way_is_measured(workers, tmp_path):
    found = workers.run(bench_job, str(tmp_path / "r.json"))[0]
    assert set(found["step"]) == set(STEPS) and set(found["norms"]) == set(NORMS)
    for row in (*found["step"].values(), *found["norms"].values()):
        assert row["seconds"] > 0 and len(row["times"]) == 1
    assert found["step"]["plain"]["ratio"] == 1.0
    assert found["norms"]["plain"]["error"] == 0.0 < found["norms"]["foreach"]["error"]
    assert found["norms"]["fused"]["error"] < 2e-7
    fp64 = 8 * found["parameters"] / found["tensors"]  # the largest tensor has at least that many bytes in fp64
    assert found["norms"]["plain"]["peak"] > fp64 > found["norms"]["fused"]["peak"]
    assert json.loads((tmp_path / "r.json").read_text())["norms"] == found["norms"]


def test_memory_inside_operations_is_seen():
    x = torch.ones(1 << 20)
    inside = peak(lambda: torch.linalg.vector_norm(x, dtype=torch.float64))
    assert inside == pytest.approx(8 << 20, rel=0.01)
    both = peak(lambda: (x + 1, x + 2))  # one tuple: both live at once
    assert both == pytest.approx(8 << 20, rel=0.01)
