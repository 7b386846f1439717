"""A whole training step on a pack of 36,864 tokens with one video of 384 frames: what tensors and arrays it makes."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from molmo2_nemo.attention import flash
from molmo2_nemo.attention.kernels import choose
from molmo2_nemo.attention.regions import region_of
from molmo2_nemo.attention.ring import merge, visible_keys
from molmo2_nemo.data.example import Example
from molmo2_nemo.settings.run import RunConfig
from tests.support.allocations import Allocations
from tests.support.pool import start_megatron
from tests.support.trees import long_video_pack, pack, token_mask

FRAME_PATCHES, POOLED = 9, 81  # patches of a 42-pixel frame; pooled tokens of a frame, as published
IM_PATCH = 66  # with a vocabulary of 64


def video_example(size: int) -> Example:
    """One video that fills `size` tokens, 384 frames in 36,864."""
    frames = 384 * size // 36864
    _, branch, block = pack(long_video_pack(size, frames))
    first_extra = 64
    ids = np.arange(size) % first_extra
    visual, starts, ends = block > 0, np.zeros(size, bool), np.zeros(size, bool)
    starts[1:], ends[:-1] = visual[1:] & ~visual[:-1], visual[:-1] & ~visual[1:]
    ids[visual], ids[starts], ids[ends] = IM_PATCH, first_extra + 7, first_extra + 8
    assert (ids == IM_PATCH).sum() == frames * POOLED
    one = np.ones(frames, np.int64)
    return Example(
        input_ids=ids,
        labels=np.arange(size) % first_extra,
        loss_weights=(branch >= 0).astype(np.float32),
        position_ids=np.arange(size),
        branch_ids=branch,
        visual=visual,
        crops=np.zeros((frames, FRAME_PATCHES, 588), np.uint8),
        pooling=np.arange(frames).repeat(POOLED)[:, None] * FRAME_PATCHES + np.arange(9),
        unit_crops=one,
        unit_pooled_tokens=one * POOLED,
    )


def step_job(sizes: list[int]) -> list[tuple[int, int, str, int]]:
    """Per size, from examples to gradients: most bytes alive, elements and operation of the largest tensor, most bytes
    of numpy and Python."""
    from molmo2_nemo.data.collate import collate
    from molmo2_nemo.model.config import preset
    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.model.inputs import PackInputs
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
    model = Molmo2Model(config, transformer_config(config, use_cpu_initialization=True), seed=RunConfig.seed)
    found = []
    for size in sizes:
        example = video_example(size)
        model.zero_grad()
        tracemalloc.start()
        with Allocations() as allocations:
            batch = collate([[example]], sequence_length=size, im_patch_id=IM_PATCH)
            model(PackInputs.from_batch(batch)).loss.backward()
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


@pytest.mark.parametrize("rule", ["image_tokens", "within_image"])
def test_the_plan_of_a_ring_is_linear(rule):
    """Two chunks of 18,432 tokens and what each sees of the other, planned on the host for every kernel that merges."""
    size = 36864
    mask = token_mask([long_video_pack(size, 384)], size, rule)
    tracemalloc.start()
    chunks = list(visible_chunks(mask, 2))
    for region, *_ in chunks:
        flash.calls(region, torch.device("cpu"))
    host = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(chunks) == 4 and host < 512 * size, f"{host} bytes of numpy arrays and Python objects"


def visible_chunks(mask, chunks: int):
    """The regions that a ring walks through, with their queries and keys: chunk by chunk, a chunk's own keys first."""
    visible = visible_keys(mask, chunks)
    for i in range(chunks):
        for j in ((i + n) % chunks for n in range(chunks)):
            if visible.runs[i][j]:
                (queries,), (keys,) = visible.chunks[i], visible.runs[i][j]
                yield region_of(mask, queries, keys), slice(*queries), slice(*keys)


def test_a_ring_of_two_makes_nothing_quadratic():
    """Forward and backward as its two ranks do them, one after the other."""
    torch.set_num_threads(1)
    kernel = choose("auto", "cpu", torch.float32, 16, merged=True)
    peaks, largest = [], []
    for size in (4608, 9216):
        mask = token_mask([long_video_pack(size, size // 96)], size)
        q, k, v, grad = (torch.randn(size, 1, 1, 16) for _ in range(4))
        with Allocations() as allocations:
            out, lse = torch.zeros_like(q), torch.full((size, 1, 1), -torch.inf)
            regions = list(visible_chunks(mask, 2))
            for region, rows, keys in regions:
                out[rows], lse[rows] = merge(
                    out[rows], lse[rows], *kernel.forward(q[rows], k[keys], v[keys], region, 0.25)
                )
            for region, rows, keys in regions:
                kernel.backward(grad[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], region, 0.25)
        assert len(regions) == 4 and lse.isfinite().all()
        peaks.append(allocations.peak)
        largest.append(allocations.largest[0])
    assert peaks[1] <= 2.1 * peaks[0]
    assert largest[1] <= 2 * q.numel()
