"""What offload pins of the host's memory is what is planned, not rounded up, and used again by the next micro-batch."""

from __future__ import annotations

import functools
import json

import pytest

from benchmarks.train_step import with_layers
from molmo2_nemo.cost.layout import Layout
from molmo2_nemo.model.config import KernelConfig, preset
from molmo2_nemo.plan.memory import fused_pieces, host_bytes
from tests.support import virtual_gpu
from tests.virtual_gpu.offloaded import LAYERS, TOKENS

pytestmark = pytest.mark.skipif(virtual_gpu.problem() is not None, reason=str(virtual_gpu.problem()))
PAGE, PART = 16 << 20, 1 << 20


@functools.cache
def counted() -> dict:
    report = virtual_gpu.run("tests.virtual_gpu.offloaded")
    assert report.returncode == 0, report.output[-3000:]
    return json.loads(report.output.rpartition("counted ")[2].splitlines()[0])


def test_pinned_memory_is_what_waits():
    found, text = counted(), preset("4b").text
    layer = TOKENS * (2 * text.hidden_size + (2 * text.head_dim + 4) * text.num_heads)
    exact = found["moved"] / 2
    assert exact > LAYERS * layer
    used = found["steps"][0]["used"]
    assert exact <= used <= exact + (3 * LAYERS + 2) * PART
    assert found["steps"][0]["held"] <= used + PAGE
    assert found["pinned"] == pytest.approx(found["steps"][0]["held"], abs=PART)  # the batch's small arrays beside it


def test_next_micro_batch_uses_the_same_pages():
    found = counted()
    assert found["steps"][1] == found["steps"][0] and found["left"] == 0


def test_pages_are_given_back():
    assert counted()["after release"] == pytest.approx(0, abs=PART)


def test_planner_says_what_is_pinned():
    planned = host_bytes(
        with_layers(preset("4b"), LAYERS), Layout(recompute="full", offload=True), TOKENS, fused_pieces(KernelConfig())
    )
    assert planned == counted()["steps"][0]["used"]
