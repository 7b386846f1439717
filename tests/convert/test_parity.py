"""Imported models compute what transformers' own Molmo2 computes: logits, losses and every gradient."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from molmo2_nemo.convert import import_checkpoint
from molmo2_nemo.convert.names import external_shapes
from molmo2_nemo.model.config import preset
from tests.convert.parity import compare, greedy, read_cases, sharded_logits
from tests.fixtures.weights import fixture_weight

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@pytest.mark.parametrize("fixture", ["qwen3_tied", "qwen3_tied_odd", "qwen3_untied", "olmo3", "olmo3_gqa"])
def test_logits_losses_and_gradients(workers: Any, tmp_path: Path, fixture: str) -> None:
    checkpoint = import_checkpoint(FIXTURES / fixture, tmp_path / "megatron")
    worst = workers.run(compare, checkpoint, FIXTURES / fixture, ranks=1)[0]
    assert worst["logits"] < 2e-5
    assert worst["loss"] < 1e-5
    assert worst["gradient"] < 1e-4
    assert worst["noise"] < 1e-6


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=lambda layout: f"tp{layout[0]}cp{layout[1]}")
@pytest.mark.parametrize("fixture", ["tiny", "qwen3_tied", "olmo3_gqa"])
def test_logits_under_every_layout(workers: Any, tmp_path: Path, fixture: str, layout: tuple[int, int]) -> None:
    tensor, context = layout
    source = tiny_folder(tmp_path / "hf") if fixture == "tiny" else FIXTURES / fixture
    checkpoint = import_checkpoint(source, tmp_path / "megatron")
    parts = workers.run(sharded_logits, checkpoint, FIXTURES / fixture, tensor, context, ranks=tensor * context)
    for kind, case in read_cases(FIXTURES / fixture).items():
        # tensor-parallel ranks are consecutive: columns within, tokens across
        rows = [torch.cat([p[kind] for p in parts[c * tensor : (c + 1) * tensor]], -1) for c in range(context)]
        expected = case["logits"]
        logits = torch.cat(rows)[case["logit_positions"], : expected.shape[1]].numpy()
        assert np.abs(logits - expected).max() < 2e-5, kind


def test_an_imported_model_answers_about_pictures(workers: Any, tmp_path: Path) -> None:
    """Its crops are of 126 pixels, not the published 378; the tokens are those of transformers 5.24.0 and 4.57.6."""
    checkpoint = import_checkpoint(tiny_folder(tmp_path / "hf"), tmp_path / "megatron")
    assert workers.run(greedy, checkpoint)[0] == [120, 120, 120, 312, 312, 312, 312, 312]


def tiny_folder(folder: Path) -> Path:
    """The `tiny` fixture's weights, which are computed instead of stored."""
    shapes = external_shapes(preset("tiny"), "native")
    tensors = {name: torch.from_numpy(fixture_weight(name, shape, 6)) for name, shape in shapes.items()}
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"][:1024].clone()
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    shutil.copy(FIXTURES / "tiny" / "config.json", folder)
    return folder
