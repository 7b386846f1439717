"""Presets: the published sizes, counted on the real model on the meta device."""

from __future__ import annotations

import math

import pytest
import torch

from molmo2_nemo.model.config import LoraConfig, Trainable, preset, trainable
from molmo2_nemo.model.rotary import table_of_layer, yarn_inverse_frequencies
from tests.support.pool import start_megatron

# (vision encoder and connector, language model without head, head), counted from the published checkpoints
PUBLISHED = {
    "4b": (439_117_264, 4_022_795_776, 0),
    "8b": (470_443_472, 7_568_929_792, 622_329_856),
    "o7b": (462_251_472, 6_887_796_736, 410_738_688),
}
TOTALS = {"4b": 4_461_913_040, "8b": 8_661_703_120, "o7b": 7_760_786_896}


def count_job(name: str) -> tuple[tuple[int, int, int], dict[str, int], float]:
    """Parameters by part and by canonical tensor, and how much memory the process took meanwhile, in MB."""
    import resource

    from tests.model.oracle import build

    start_megatron()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build(preset(name), init_model_with_meta_device=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert all(p.device.type == "meta" for p in model.parameters())
    sizes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    count = {n: math.prod(s) for n, s in sizes.items()}
    vision = sum(c for n, c in count.items() if n.startswith(("vision.", "connector.")))
    head = count.get("output_layer.weight", 0)
    return (vision, sum(count.values()) - vision - head, head), sizes, grown


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(workers, name):
    from molmo2_nemo.convert.names import canonical_shapes

    parts, sizes, grown = workers.run(count_job, name)[0]
    assert parts == PUBLISHED[name]
    assert sum(parts) == TOTALS[name]
    assert sizes == canonical_shapes(preset(name))  # what the converters produce is what the model wants
    assert grown < 200  # MB; the smallest of the models has 17,800


def test_tiny_is_tiny(workers):
    parts, _, _ = workers.run(count_job, "tiny")[0]
    assert 2_000_000 <= sum(parts) <= 5_000_000


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_structure(name):
    config = preset(name)
    assert config.vision.feature_indices == (24, 18)
    assert config.vision.num_built_layers == 25
    assert config.vision.num_patches == 729 and config.vision.patch_dim == 588
    assert config.extra_vocab_size == 128
    assert config.visual_attention == "image_tokens"
    assert config.text.tie_embeddings == (name == "4b")


def test_yarn_constants():
    text = preset("o7b").text
    assert table_of_layer(text) == dict.fromkeys((3, 7, 11, 15, 19, 23, 27, 31), "yarn")
    assert text.yarn.attention_factor == pytest.approx(0.1 * math.log(8) + 1, abs=1e-15)
    found = yarn_inverse_frequencies(text, text.yarn)
    assert found.shape == (64,)
    torch.testing.assert_close(found[:5], torch.tensor([1.0, 0.8146, 0.6636, 0.5406, 0.4404]), atol=5e-5, rtol=0)
    torch.testing.assert_close(found[-3:], torch.tensor([4.6247e-07, 3.7673e-07, 3.0689e-07]), atol=0, rtol=2e-5)
    ramp = [min(max((j - 18) / (35 - 18), 0.0), 1.0) for j in range(64)]
    for j in range(64):
        plain = 500_000 ** (-2 * j / 128)
        assert float(found[j]) == pytest.approx((1 - ramp[j]) * plain + ramp[j] * plain / 8, rel=1e-5)


def test_what_trains():
    parts = {"vit": False, "connector": True, "llm": True, "base_embedding": True}
    for name, tied in (("4b", True), ("8b", False)):
        full = trainable(preset(name), **parts)
        frozen_rows = trainable(preset(name), **parts | {"base_embedding": False})
        lora = trainable(preset(name, lora=LoraConfig(rank=2)), **parts)
        assert [part for part, trains in vars(full).items() if not trains] == ["vit", "adapters"]
        assert frozen_rows.head is not tied and frozen_rows.llm
        assert [part for part, trains in vars(lora).items() if trains] == ["connector", "adapters"]
        assert full.any() and not Trainable(*[False] * 7).any()
        for beside, more in ((["norms"], ["norms"]), (["embeddings"], ["base_embedding"] + ["head"] * tied)):
            chosen = trainable(preset(name, lora=LoraConfig(rank=2, **dict.fromkeys(beside, True))), **parts)
            assert {part for part, trains in vars(chosen).items() if trains} == {"connector", "adapters", *more}
            still = trainable(
                preset(name, lora=LoraConfig(rank=2, norms=True, embeddings=True)), **parts | {"llm": False}
            )
            assert [part for part, trains in vars(still).items() if trains] == ["connector"]


def test_unknown_preset():
    with pytest.raises(ValueError, match="'9b'.*tiny, 4b, 8b, nano, o7b"):
        preset("9b")
