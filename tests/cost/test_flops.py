"""FLOPs against the published sizes' arithmetic and the engine's own count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from molmo2_nemo.cost.flops import Flops, forward_flops, training_flops
from molmo2_nemo.data.counts import PackCounts
from molmo2_nemo.data.example import PAD_EXAMPLE, ROOT_BRANCH, Batch
from molmo2_nemo.model.config import preset
from molmo2_nemo.model.connector import Connector
from molmo2_nemo.model.flops import crop_flops
from tests.support.batches import batch_flops

# Per packed sequence, forward: name, tokens, crops (frames of 81 tokens), linear, attention full, ViT, connector,
# sum with full and sum with causal attention.
PUBLISHED = [
    ("4b", 16384, 128, 1.191e14, 1.583e14, 7.90e13, 2.1e12, 3.584e14, 2.793e14),
    ("o7b", 16384, 128, 2.122e14, 1.407e14, 7.90e13, 2.5e12, 4.345e14, 3.641e14),
    ("8b", 16384, 128, 2.276e14, 1.583e14, 7.90e13, 2.7e12, 4.676e14, 3.885e14),
    ("4b", 36864, 384, 2.679e14, 8.015e14, 2.370e14, 6.2e12, 1.313e15, 9.118e14),
    ("o7b", 36864, 384, 4.775e14, 7.125e14, 2.370e14, 7.6e12, 1.435e15, 1.078e15),
    ("8b", 36864, 384, 5.121e14, 8.015e14, 2.370e14, 8.1e12, 1.559e15, 1.158e15),
]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row[0]}-{row[1]}")
def test_published_table(row: tuple[str, int, int, float, float, float, float, float, float]) -> None:
    name, tokens, crops, linear, attention, vit, connector, full, causal = row
    sizes = {"tokens": tokens, "crops": crops, "pooled_tokens": 81 * crops, "window_positions": 729 * crops}
    flops = forward_flops(preset(name), pairs=tokens**2, **sizes)
    assert flops.linear == pytest.approx(linear, rel=5e-4)
    assert flops.attention == pytest.approx(attention, rel=5e-4)
    assert flops.vit == pytest.approx(vit, rel=5e-4)
    assert flops.connector == pytest.approx(connector, rel=0.03)  # the table has two digits
    assert flops.total == pytest.approx(full, rel=5e-4)
    assert forward_flops(preset(name), pairs=tokens**2 / 2, **sizes).total == pytest.approx(causal, rel=6e-4)


def test_one_crop_and_one_frame() -> None:
    assert crop_flops(preset("8b")) == pytest.approx(617.2e9, rel=1e-4)
    by_hand = 25 * (2 * 729 * 15_224_832 + 4 * 729**2 * 1152) + 2 * 729 * 588 * 1152
    assert crop_flops(preset("4b")) == by_hand
    for name, expected in (("4b", 16.0e9), ("o7b", 19.8e9), ("8b", 21.1e9)):
        flops = forward_flops(preset(name), tokens=0, pairs=0, pooled_tokens=81, window_positions=729)
        assert flops.connector == pytest.approx(expected, rel=0.005)


def test_head_and_training() -> None:
    config = preset("8b")
    forward = forward_flops(
        config, tokens=100, pairs=5050, crops=2, pooled_tokens=8, window_positions=72, scored_tokens=10
    )
    assert forward.head == 2 * 151936 * 4096 * 10
    assert training_flops(forward).total == pytest.approx(3 * forward.total)
    adapted = training_flops(forward, train_llm=False)
    assert (adapted.linear, adapted.head) == (2 * forward.linear, 2 * forward.head)
    assert (adapted.attention, adapted.vit) == (3 * forward.attention, 3 * forward.vit)
    frozen = training_flops(forward, train_vit=False)
    assert frozen.vit == pytest.approx(forward.vit)
    assert frozen.linear == pytest.approx(3 * forward.linear)
    assert frozen.connector == pytest.approx(3 * forward.connector)
    assert training_flops(forward, train_head=False) == training_flops(forward) + Flops(head=-forward.head)
    behind = training_flops(forward, train_connector=False)
    assert (behind.vit, behind.connector) == (3 * forward.vit, 2 * forward.connector)
    both = training_flops(forward, train_vit=False, train_connector=False)
    assert (both.vit, both.connector) == (forward.vit, forward.connector)
    assert (Flops(linear=1) + Flops(head=2)).total == 3


@pytest.mark.parametrize(("train_vit", "train_connector"), [(True, True), (True, False), (False, False)])
def test_connector_against_the_engines_count(train_vit: bool, train_connector: bool) -> None:
    """Backward of the real connector, product by product."""
    from torch.utils.flop_counter import FlopCounterMode

    config = preset("tiny")
    connector = Connector(config).requires_grad_(train_connector)
    features = torch.randn(2, config.vision.num_patches, config.vision.feature_size, requires_grad=train_vit)
    windows = torch.arange(2 * config.vision.num_patches).view(-1, 9)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        out = connector(features, windows)
    with FlopCounterMode(display=False) as backward, sdpa_kernel(SDPBackend.MATH):
        if out.requires_grad:
            out.sum().backward()
    ours = forward_flops(config, tokens=0, pairs=0, pooled_tokens=len(windows), window_positions=windows.numel())
    assert forward.get_total_flops() == pytest.approx(ours.connector, rel=1e-6)
    trained = training_flops(ours, train_vit=train_vit, train_connector=train_connector).connector
    # attention's products have two gradients however much is frozen
    attention = 4 * windows.numel() * config.connector.hidden_size * train_vit * (not train_connector)
    assert forward.get_total_flops() + backward.get_total_flops() == pytest.approx(trained + attention, rel=1e-6)


def test_batch() -> None:
    config = preset("tiny")
    visual = np.array([[False, True, True, False, False, False]])
    batch = Batch(
        input_ids=np.array([[1, 1026, 1026, 2, 3, -1]]),
        labels=np.zeros((1, 6), dtype=np.int64),
        loss_weights=np.array([[0, 0, 0, 0.5, 1.0, 0]], dtype=np.float32),
        position_ids=np.arange(6)[None],
        example_ids=np.array([[0, 0, 0, 0, 0, PAD_EXAMPLE]]),
        branch_ids=np.full((1, 6), ROOT_BRANCH),
        visual=visual,
        crops=np.zeros((1, 81, 588), dtype=np.uint8),
        pooling=np.array([[0, 1, 2, 3], [4, 5, -1, -1]]),
        pooled_positions=np.array([1, 2]),
        unit_crops=np.array([1]),
        unit_pooled_tokens=np.array([2]),
    )
    expected = forward_flops(config, tokens=5, pairs=16, crops=1, pooled_tokens=2, window_positions=6, scored_tokens=2)
    assert batch_flops(config, batch) == expected
    within = preset("tiny", visual_attention="within_image")
    with pytest.raises(AssertionError, match="needs vocab_size"):
        PackCounts.of(batch, "within_image")
    assert batch_flops(within, batch) == expected  # the two are one image's
    two_images = replace(batch, input_ids=np.array([[1, 1024, 1024, 2, 3, -1]]))
    assert batch_flops(config, two_images) == expected
    assert batch_flops(within, two_images).attention < expected.attention
