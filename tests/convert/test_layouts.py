"""Imported checkpoints load into the real model under other layouts, and come back bit-identical."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from molmo2_nemo.convert import export_checkpoint, import_checkpoint
from molmo2_nemo.convert.checkpoints import read_model_file
from tests.convert.parity import relayout
from tests.convert.test_checkpoints import FIXTURES, assert_same, load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("fixture", "tensor", "pipeline"),
    [
        ("olmo3", 2, 1),  # sharded full-width norms, vocabulary of 101 rows padded to 102
        ("qwen3_tied_odd", 1, 2),  # the tied head has a copy on the last stage
        ("qwen3_untied", 2, 2),
    ],
)
def test_a_change_of_layout_keeps_every_bit(
    workers: Any, tmp_path: Path, fixture: str, tensor: int, pipeline: int, dtype: torch.dtype
) -> None:
    source = import_checkpoint(FIXTURES / fixture, tmp_path / "megatron", dtype=dtype)
    workers.run(relayout, source, tmp_path / "moved", dtype, tensor, pipeline, ranks=tensor * pipeline)
    export_checkpoint(tmp_path / "moved", tmp_path / "hf", model_config=read_model_file(source))
    expected = {name: value.to(dtype) for name, value in load(FIXTURES / fixture).items()}
    assert_same(load(tmp_path / "hf"), expected)


@pytest.mark.parametrize(("stored", "trained"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_model_of_another_type_loads_it(
    workers: Any, tmp_path: Path, stored: torch.dtype, trained: torch.dtype
) -> None:
    """What `convert init` stores in fp32 may be trained in bf16, and the other way round."""
    source = import_checkpoint(FIXTURES / "olmo3", tmp_path / "megatron", dtype=stored)
    workers.run(relayout, source, tmp_path / "moved", trained, 2, 1, ranks=2)
    export_checkpoint(tmp_path / "moved", tmp_path / "hf", model_config=read_model_file(source))
    expected = {name: value.to(stored).to(trained) for name, value in load(FIXTURES / "olmo3").items()}
    assert_same(load(tmp_path / "hf"), expected)
