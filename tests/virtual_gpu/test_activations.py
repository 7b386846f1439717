"""The planner's bytes of one layer, of one block and of the head are what PyTorch's allocator counts, at full width."""

from __future__ import annotations

import functools
import json

import pytest

from molmo2_nemo.cost.layout import Layout
from molmo2_nemo.model.config import KernelConfig, preset
from molmo2_nemo.plan.memory import NONE_FUSED, block_bytes, fused_pieces, head_bytes, layer_bytes
from molmo2_nemo.settings.run import StageConfig
from tests.support import virtual_gpu
from tests.virtual_gpu.activations import CHUNK, MODELS, TOKENS

pytestmark = pytest.mark.skipif(virtual_gpu.problem() is not None, reason=str(virtual_gpu.problem()))


@functools.cache
def counted() -> dict[str, dict[str, float]]:
    report = virtual_gpu.run("tests.virtual_gpu.activations", gib=4096)  # all blocks of a video's crops at once
    assert report.returncode == 0, report.output[-3000:]
    return json.loads(report.output.rpartition("counted ")[2].splitlines()[0])


@pytest.mark.parametrize("kind", ["fused", "plain"])
@pytest.mark.parametrize("model", MODELS)
def test_layer_keeps_what_is_planned(model, kind):
    fused = fused_pieces(KernelConfig()) if kind == "fused" else NONE_FUSED
    for pack in ("layer", "layer of a video"):
        assert layer_bytes(preset(model), fused=fused) == pytest.approx(counted()[f"{model} {kind}"][pack], rel=0.01)


@pytest.mark.parametrize("kind", ["fused", "plain"])
@pytest.mark.parametrize("model", MODELS)
def test_block_keeps_what_is_planned(model, kind):
    assert block_bytes(preset(model), 2) == pytest.approx(counted()[f"{model} {kind}"]["block"], rel=0.02)


@pytest.mark.parametrize("kind", ["fused", "plain"])
@pytest.mark.parametrize("model", MODELS)
def test_trained_head_needs_what_is_planned(model, kind):
    fused = fused_pieces(KernelConfig()) if kind == "fused" else NONE_FUSED
    stage = StageConfig(train_base_embedding=True)
    planned = head_bytes(preset(model), stage, Layout(), CHUNK, TOKENS, fused)
    assert planned == pytest.approx(counted()[f"{model} {kind}"]["head"], rel=0.02)
