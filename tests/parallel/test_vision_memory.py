"""Chunks bound what the vision encoder keeps: its activations do not grow with the number of crops."""

from __future__ import annotations

import torch

from tests.model.oracle import build
from tests.support.pool import start_megatron


def peaks_job() -> dict[tuple[int | None, int], int]:
    """(crops at once, crops) -> bytes alive at the peak of encoding them, forward and backward."""
    from molmo2_nemo.model.config import MemoryConfig, preset
    from molmo2_nemo.model.inputs import PackInputs
    from molmo2_nemo.parallel.crops import VisionRanks, plan_crops
    from tests.support.allocations import Allocations

    start_megatron()
    config = preset("tiny")
    vision, found = config.vision, {}
    for chunk in (None, 2):
        model = build(config, memory=MemoryConfig(vision_chunk=chunk)).train()
        for crops in (8, 32):
            units, rows = torch.ones(crops, dtype=torch.int64), torch.arange(crops)
            token_arrays = [torch.zeros(1, crops, dtype=torch.int64)] * 4
            pixels = torch.zeros(crops, vision.num_patches, vision.patch_dim, dtype=torch.uint8)
            windows = rows[:, None] * vision.num_patches + torch.arange(4)
            inputs = PackInputs(*token_arrays, torch.ones(1, crops, dtype=bool), pixels, windows, rows, units, units)
            plan = plan_crops(inputs.vision_units(config), VisionRanks(), chunk)
            model.zero_grad()
            with Allocations() as allocations:
                model._encode(inputs, plan).sum().backward()
            found[chunk, crops] = allocations.peak
    return found


def test_chunks_bound_the_encoder(workers):
    found = workers.run(peaks_job)[0]
    # without chunks four times the crops keep almost four times as much; the rest is gradients of parameters
    assert found[None, 32] - found[None, 8] > 2 * found[2, 8]
    assert found[2, 32] < 1.1 * found[2, 8]
