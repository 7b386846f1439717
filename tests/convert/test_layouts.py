"""Imported checkpoints load into the real model under other layouts, and come back bit-identical."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from molmo2_nemo.convert import export_checkpoint, import_checkpoint
from molmo2_nemo.convert.checkpoints import read_model_file
from tests.convert.test_checkpoints import FIXTURES, assert_same, load

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fixture", "tensor", "pipeline"),
    [
        ("olmo3", 2, 1),  # sharded full-width norms, vocabulary of 101 rows padded to 102
        ("qwen3_tied_odd", 1, 2),  # the tied head has a copy on the last stage
    ],
)
def test_a_change_of_layout_keeps_every_bit(tmp_path: Path, fixture: str, tensor: int, pipeline: int) -> None:
    source = import_checkpoint(FIXTURES / fixture, tmp_path / "megatron", dtype=torch.float32)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={tensor * pipeline}", "--standalone"]
    arguments = [source, tmp_path / "moved", tensor, pipeline]
    command += [str(Path(__file__).with_name("relayout.py")), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    export_checkpoint(tmp_path / "moved", tmp_path / "hf", config=read_model_file(source))
    expected = {name: value.float() for name, value in load(FIXTURES / fixture).items()}
    assert_same(load(tmp_path / "hf"), expected)
