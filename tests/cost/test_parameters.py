"""Parameters and activations of the planner against the real model: built without memory, and traced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from molmo2_nemo.cost.layout import Layout
from molmo2_nemo.cost.parameters import adapter_parameters, held, parameters
from molmo2_nemo.model.config import LoraConfig, MemoryConfig, Molmo2Config, TextConfig, preset
from molmo2_nemo.plan.memory import (
    Activations,
    decoder_activations,
    fullest,
    head_bytes,
    tied_bytes,
    vision_activations,
)
from molmo2_nemo.settings.run import StageConfig
from tests.support.pool import start_megatron

torch.set_num_threads(1)


def count_job() -> dict[str, dict[str, int]]:
    """Parameters of every preset by component, built on the meta device."""
    from tests.model.oracle import build

    start_megatron()
    found: dict[str, dict[str, int]] = {}
    for name in ("tiny", "4b", "o7b", "8b"):
        model = build(with_layers(preset(name), 2), init_model_with_meta_device=True)
        sums: dict[str, int] = {}
        for key, parameter in model.named_parameters():
            part = ".".join(key.split(".")[:2]) if key.startswith(("embedding", "decoder")) else key.split(".")[0]
            sums[part] = sums.get(part, 0) + parameter.numel()
        found[name] = sums
    return found


def with_layers(model: Molmo2Config, layers: int) -> Molmo2Config:
    text = model.text
    yarn = replace(text.yarn, layers=(1,)) if text.yarn else None
    return replace(model, text=replace(text, num_layers=layers, yarn=yarn))


def test_parameters_are_those_of_the_model(workers):
    for name, sums in workers.run(count_job)[0].items():
        ours = parameters(preset(name))
        assert ours.layer * 2 == sums["decoder.layers"]
        assert (ours.vision, ours.connector) == (sums["vision"], sums["connector"])
        assert (ours.extra, ours.final_norm) == (sums["embedding.extra"], sums["decoder.final_layernorm"])
        assert (ours.embedding, ours.head) == (sums["embedding.base"], sums.get("output_layer", 0))
    assert parameters(preset("8b")).total == pytest.approx(8.66e9, rel=0.002)  # the published sum


def test_shares_of_ranks_add_up():
    model, stage = preset("8b"), StageConfig()
    whole = held(model, stage, 1, 1)
    p = parameters(model)
    assert whole.all == p.total
    assert whole.trained == p.total - p.embedding  # the base rows are frozen
    frozen = held(model, replace(stage, train_vit=False), 1, 1)
    assert whole.trained - frozen.trained == p.vision
    lora = held(model, replace(stage, lora=LoraConfig(rank=8)), 1, 1)
    assert (
        lora.all - p.total == adapter_parameters(model, LoraConfig(rank=8)) == 8 * 36 * (10240 + 8192 + 28672 + 16384)
    )
    assert lora.trained == lora.all - p.total + p.vision + p.connector + p.extra
    # beside adapters, by hand: 36 layers of two norms of 4,096 and two of 128, the last norm, 151,936 rows of 4,096
    norms, rows = 36 * (2 * 4096 + 2 * 128) + 4096, 151936 * 4096
    assert preset("8b").text.vocab_size == 151936
    for beside, more in (({"norms": True}, norms), ({"embeddings": True}, rows)):
        chosen = held(model, replace(stage, lora=LoraConfig(rank=8, **beside)), 1, 1)
        assert (chosen.all, chosen.trained) == (lora.all, lora.trained + more)
    cut = held(model, replace(stage, lora=LoraConfig(rank=8, norms=True)), 4, 1)
    assert cut.trained - held(model, replace(stage, lora=LoraConfig(rank=8)), 4, 1).trained == norms  # on every rank
    half = held(model, stage, 2, 1)
    assert half.all == pytest.approx((p.layer * p.layers + p.embedding + p.head) / 2 + p.vision + p.connector, rel=0.01)
    assert held(model, stage, 1, 2).all > p.total / 2


def test_a_head_that_does_not_learn_has_no_gradient():
    """An untied one under LoRA or a frozen language model, a tied one unless the base embedding learns."""
    stage, lora = StageConfig(), LoraConfig(rank=8)
    for name, kind, learns in (
        ("8b", stage, True),
        ("8b", replace(stage, lora=lora), False),
        ("8b", replace(stage, train_llm=False), False),
        ("4b", stage, False),
        ("4b", replace(stage, train_base_embedding=True), True),
        ("4b", replace(stage, train_base_embedding=True, lora=lora), False),
    ):
        model = preset(name)
        assert kind.trainable(model).head is learns
        logits, head = 1024 * model.text.vocab_size, model.text.vocab_size * model.text.hidden_size * learns
        assert head_bytes(model, kind, Layout(), 1024, 16384) == max(12 * logits, 2 * logits + 6 * head)
        fused = head_bytes(model, kind, Layout(), 1024, 16384, frozenset({"loss"}))
        assert fused == (6 * head if learns else 4 * logits)
    own, without = (held(preset("8b"), k, 1, 1).trained for k in (stage, replace(stage, lora=lora)))
    assert own - without > preset("8b").text.vocab_size * preset("8b").text.hidden_size


def test_the_fullest_phase():
    decoder, vision = Activations(10, 5), Activations(20, 12)
    assert fullest(decoder, vision, 7) == ("loss", 10, 20, 7)
    assert fullest(decoder, vision, 3) == ("decoder", 15, 20, 0)
    assert fullest(decoder, replace(vision, working=30), 3) == ("vision", 0, 50, 0)
    assert fullest(decoder, vision, 3, in_flight=3) == ("decoder", 35, 60, 0)
    assert fullest(decoder, vision, 7, tied=4) == ("decoder", 15, 20, 4)


def test_a_tied_heads_gradient_waits_for_the_embeddings():
    trains = StageConfig(train_base_embedding=True)
    rows = preset("4b").text.vocab_size * preset("4b").text.hidden_size
    assert tied_bytes(preset("4b"), trains, Layout(tensor=2)) == rows
    assert tied_bytes(preset("4b"), StageConfig(), Layout()) == tied_bytes(preset("8b"), trains, Layout()) == 0
    assert tied_bytes(preset("4b"), trains, Layout(pipeline=2)) == 0

    weight, waiting = torch.ones(5, 3, requires_grad=True), []  # in autograd itself

    def head_is_done(_: torch.Tensor) -> None:
        waiting.append(weight.grad is None)

    hidden = torch.nn.functional.embedding(torch.tensor([1, 2]), weight) * 2
    hidden.register_hook(head_is_done)
    (hidden @ weight.T).sum().backward()
    assert waiting == [True] and weight.grad is not None


def decoder_job(family: str, recompute: str, dtype: str) -> list[float]:
    """Bytes alive after the forward pass of two and of four decoder layers, per token."""
    from molmo2_nemo.attention.core import PackDescription
    from molmo2_nemo.model.rotary import rotary_tables
    from tests.model.oracle import build
    from tests.support.allocations import Allocations
    from tests.support.trees import Tree, token_mask

    start_megatron()
    size, found = 512, []
    memory = MemoryConfig(recompute=recompute.split()[0], recompute_attention=" " in recompute)
    for layers in (2, 4):
        config = small(family, layers)
        kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        model = build(config, memory=memory, params_dtype=kind).train()
        mask = token_mask([[Tree((size,))]], size)
        pack = PackDescription(mask=mask, rotary=rotary_tables(config.text, torch.arange(size)[None]))
        hidden = torch.randn(size, 1, config.text.hidden_size, dtype=kind, requires_grad=True)
        with Allocations() as counted:
            out = model.decode(hidden, pack)
            found.append(counted.alive / size)
        del out
    return found


def small(family: str, layers: int) -> Any:
    text = TextConfig(family, 256, layers, 4, 2 if family == "qwen3" else 4, 64, 512, 256, max_position=4096)
    return replace(preset("tiny"), text=text)


@pytest.mark.parametrize("family", ["qwen3", "olmo3"])
@pytest.mark.parametrize(
    ("recompute", "dtype"),
    [("none", "bf16"), ("none", "fp32"), ("selective", "bf16"), ("full", "bf16"), ("full with attention", "bf16")],
)
def test_decoder_activations_are_those_of_the_model(workers, family, recompute, dtype):
    two, four = workers.run(decoder_job, family, recompute, dtype)[0]
    element = 2 if dtype == "bf16" else 4
    layout = Layout(recompute=recompute.split()[0], recompute_attention=" " in recompute)
    low, high = (
        decoder_activations(small(family, n), layout, 1, dropout=False, bytes_per_element=element) for n in (2, 4)
    )
    assert four - two == pytest.approx(high.waiting - low.waiting, rel=0.10)


def vision_job(recompute: bool) -> float:
    """Bytes alive after encoding and pooling, per crop."""
    from tests.model.oracle import build
    from tests.support.allocations import Allocations

    start_megatron()
    config = preset("tiny")
    model = build(config).train()
    model.vision.recompute = recompute
    crops = torch.zeros(8, config.vision.num_patches, config.vision.patch_dim, dtype=torch.uint8)
    windows = torch.arange(8 * config.vision.num_patches).view(-1, 9)
    with Allocations() as counted:
        features = model.vision(crops)
        out = model.connector(features, windows)
        alive = counted.alive / 8
    del out
    return alive


@pytest.mark.parametrize("recompute", [False, True])
def test_vision_activations_are_about_those_of_the_model(workers, recompute):
    alive = workers.run(vision_job, recompute)[0]
    config = preset("tiny")
    expected = vision_activations(config, 1, recompute, bytes_per_element=4).waiting
    assert alive == pytest.approx(expected, rel=0.10)


def peak_job(options: MemoryConfig, tokens: int) -> tuple[float, int]:
    """Most bytes alive during a step, and its crops."""
    from molmo2_nemo.model.inputs import PackInputs
    from tests.support.batches import Shapes, batch
    from tests.support.memory import Subject, build, counting, narrow

    start_megatron()
    subject = Subject(narrow(4), "cpu", torch.float32)
    model = build(subject, options)
    if model.offload is not None:
        model.offload.min_bytes = 1  # all tensors of so narrow a model are small
    inputs = PackInputs.from_batch(batch([Shapes(subject.model).videos(tokens, tokens)], tokens, subject.model), "cpu")
    with counting("cpu") as peak:
        model(inputs).loss.backward()
    return peak[0], len(inputs.crops)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recompute": "full"},
        {"recompute": "full", "recompute_attention": True},
        {"recompute": "full", "mlp_tiles": 8, "vision_chunk": 16},
        {"recompute": "full", "sequence_chunk": 96},
        {"recompute": "full", "recompute_attention": True, "sequence_chunk": 64, "offload": True, "vision_chunk": 8},
        {"recompute": "full", "offload": True},
        {"recompute": "full", "recompute_attention": True, "offload": True},
    ],
    ids=lambda options: " ".join(options) or "nothing",
)
def test_peak_of_a_step_is_that_of_the_model(workers, options):
    """The measured table of docs/memory.md in small: what does not exist at the same time is not added up."""
    from tests.support.memory import Subject, narrow, predicted

    tokens, chosen = 1152, MemoryConfig(**options, loss_chunk=64)
    peak, crops = workers.run(peak_job, chosen, tokens)[0]
    expected = predicted(Subject(narrow(4), "cpu", torch.float32), chosen, tokens, crops)
    assert peak == pytest.approx(expected, rel=0.12)


def frozen_job() -> tuple[int, int]:
    """Most bytes alive while a frozen encoder works, and those it returns."""
    from tests.model.oracle import build
    from tests.support.allocations import Allocations

    start_megatron()
    model = build(wide()).train().requires_grad_(False)
    crops = torch.zeros(4, wide().vision.num_patches, wide().vision.patch_dim, dtype=torch.uint8)
    with Allocations() as counted:
        features = model.vision(crops)
    return counted.peak, features.numel() * 4


def wide() -> Molmo2Config:
    """An encoder of the real proportions, wide enough that blocks, not pixels, fill the memory."""
    return replace(preset("tiny"), vision=replace(preset("tiny").vision, hidden_size=384, num_heads=4, ffn_size=1434))


def test_a_frozen_encoder_needs_no_more_than_a_block(workers):
    peak, features = workers.run(frozen_job)[0]
    working = vision_activations(wide(), 4, False, train_vit=False, bytes_per_element=4).working
    assert 0.5 * working < peak - features < working
