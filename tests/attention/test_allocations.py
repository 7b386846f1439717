"""A whole training step on a pack of 36,864 tokens with one video of 384 frames: what tensors and arrays it makes."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import torch

from benchmarks.allocations import Allocations
from benchmarks.packs import long_video_pack, pack
from tests.support.pool import start_megatron

FRAME_PATCHES, POOLED = 9, 81  # patches of a 42-pixel frame; pooled tokens of a frame, as published


def long_video(size: int):
    """PackInputs of one video that fills `size` tokens, 384 frames in 36,864."""
    from molmo2_nemo.model.inputs import PackInputs

    frames = 384 * size // 36864
    example, branch, block = torch.from_numpy(pack(long_video_pack(size, frames)))
    first_extra = 64
    ids = torch.arange(size) % first_extra
    patch, starts, ends = block > 0, torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
    starts[1:], ends[:-1] = patch[1:] & ~patch[:-1], patch[:-1] & ~patch[1:]
    ids[patch], ids[starts], ids[ends] = first_extra + 2, first_extra + 7, first_extra + 8
    pooled = (ids == first_extra + 2).nonzero()[:, 0]
    assert len(pooled) == frames * POOLED
    one = torch.ones(frames, dtype=torch.long)
    return PackInputs(
        input_ids=ids[None],
        position_ids=torch.arange(size)[None],
        example_ids=example[None],
        branch_ids=branch[None],
        visual=patch[None],
        crops=torch.zeros(frames, FRAME_PATCHES, 588, dtype=torch.uint8),
        pooling=torch.arange(frames).repeat_interleave(POOLED)[:, None] * FRAME_PATCHES + torch.arange(9),
        pooled_positions=pooled,
        unit_crops=one,
        unit_rows=one * POOLED,
        labels=(torch.arange(size) % first_extra)[None],
        loss_weights=(branch >= 0).float()[None],
    )


def step_job(sizes: list[int]) -> list[tuple[int, int, str, int]]:
    """Per size: most bytes alive, elements and operation of the largest tensor, most bytes of numpy and Python."""
    from molmo2_nemo.model.config import preset
    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.model.molmo2 import Molmo2Model

    start_megatron()
    torch.set_num_threads(1)
    tiny = preset("tiny")
    vision = replace(tiny.vision, image_size=42, hidden_size=16, num_heads=2, ffn_size=16, num_layers=2)
    text = replace(tiny.text, hidden_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16, ffn_size=16)
    config = replace(
        tiny,
        vision=replace(vision, feature_layers=(-1, -2)),
        connector=replace(tiny.connector, hidden_size=16, num_heads=2, ffn_size=16),
        text=replace(text, vocab_size=64, max_position=36864),
    )
    model = Molmo2Model(config, transformer_config(config, use_cpu_initialization=True))
    found = []
    for size in sizes:
        inputs = long_video(size)
        model.zero_grad()
        tracemalloc.start()
        with Allocations() as allocations:
            model(inputs).backward()
        host = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.decoder.parameters())
        found.append((allocations.peak, *allocations.largest, host))
    return found


def test_a_step_of_36864_tokens_makes_nothing_quadratic(workers):
    small, large = 9216, 36864
    (few, *_), (many, elements, name, host) = workers.run(step_job, [small, large])[0]
    # The largest tensors are activations and crops, S times some width; a mask of bits would have S * 36,864 / 8
    assert elements < 256 * large, (elements, name)
    assert host < 1024 * large, f"{host} bytes of numpy arrays and Python objects"
    assert many <= 1.05 * (large // small) * few, (few, many)
