"""Adapters against the model whose weights have them added in: losses, and gradients by the chain rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from molmo2_nemo.convert.names import canonical_shapes
from molmo2_nemo.model.config import LoraConfig, with_options
from tests.model.oracle import build, fixture_config, fixture_weights, micro_batches, run_schedule
from tests.support.pool import start_megatron

torch.set_num_threads(1)
LORA = LoraConfig(rank=3, alpha=12.0)


def adapters(name: str, lora: LoraConfig) -> dict[str, torch.Tensor]:
    """Whole A and B, both different from zero."""
    config = with_options(fixture_config(name), lora=lora)
    generator = torch.Generator().manual_seed(4)
    shapes = {n: s for n, s in canonical_shapes(config).items() if "lora_" in n}
    assert len(shapes) == 2 * len(lora.targets) * config.text.num_layers
    return {n: torch.randn(s, generator=generator) * 0.1 for n, s in shapes.items()}


def adapted_job(name: str, lora: LoraConfig, layout: dict[str, int], sequence: bool) -> dict[str, Any]:
    """Losses, and gradients of this rank's adapters with what it holds of them, by canonical name."""
    from molmo2_nemo.model.init import canonical_name, shard

    start_megatron(**layout)
    config = with_options(fixture_config(name), lora=lora)
    extra = adapters(name, lora)
    model = build(config, fixture_weights(name, config) | extra, sequence_parallel=sequence).train()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in key)
    losses = run_schedule(model, micro_batches(name, config), backward=True)
    grads = {}
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            whole = canonical_name(model, key)
            # where each element of this rank's part lies in the whole tensor
            places = torch.arange(extra[whole].numel()).view(extra[whole].shape)
            grads[whole] = (shard(model, key, parameter, places), parameter.main_grad.clone())
    return {"losses": losses, "grads": grads}


def merged_job(name: str, lora: LoraConfig) -> dict[str, Any]:
    """Losses of the model with the adapters added to its weights, and the gradients of those weights."""
    start_megatron()
    config, weights, extra = fixture_config(name), fixture_weights(name, fixture_config(name)), adapters(name, lora)
    for key in [k for k in extra if k.endswith("lora_a")]:
        low, high = extra[key], extra[key.replace("lora_a", "lora_b")]
        weights[key.replace("lora_a", "weight")] += lora.alpha / lora.rank * high @ low
    model = build(config, weights).train()
    losses = run_schedule(model, micro_batches(name, config), backward=True)
    return {"losses": losses, "grads": {n: p.main_grad.clone() for n, p in model.named_parameters()}}


@pytest.mark.parametrize(
    ("name", "lora", "ranks", "layout", "sequence"),
    [
        ("qwen3_tied", LORA, 1, {}, False),
        ("qwen3_untied", LORA, 2, {"tensor": 2}, False),
        ("olmo3", LORA, 2, {"tensor": 2}, True),
        ("olmo3", replace(LORA, targets=("linear_proj", "linear_fc1")), 4, {"tensor": 2, "context": 2}, True),
    ],
    ids=["1 process", "TP2", "TP2+SP", "TP2+SP x CP2"],
)
def test_adapters_do_what_added_weights_do(workers, name, lora, ranks, layout, sequence):
    merged = workers.run(merged_job, name, lora)[0]
    extra, scale = adapters(name, lora), lora.alpha / lora.rank
    for found in workers.run(adapted_job, name, lora, layout, sequence, ranks=ranks):
        if layout.get("context", 1) == 1:
            torch.testing.assert_close(torch.stack(found["losses"]), torch.stack(merged["losses"]), rtol=2e-5, atol=0)
        for key, (places, grad) in found["grads"].items():
            weight = merged["grads"][key[: -len("lora_a")] + "weight"]  # of W + scale B A
            low, high = extra[key[:-1] + "a"], extra[key[:-1] + "b"]
            whole = scale * (high.T @ weight if key.endswith("lora_a") else weight @ low.T)
            expected = whole.flatten()[places.flatten()].view(places.shape)
            torch.testing.assert_close(grad, expected, rtol=0, atol=3e-5 * float(whole.abs().max()), msg=key)


def test_a_fresh_adapter_changes_nothing(workers):
    fresh = workers.run(fresh_job, LORA)[0]
    assert all(bool(t.any()) == n.endswith("lora_a") for n, t in fresh["adapters"].items()) and fresh["adapters"]
    assert torch.equal(fresh["with"], fresh["without"])


def fresh_job(lora: LoraConfig) -> dict[str, Any]:
    start_megatron()
    config = fixture_config("qwen3_tied")
    found = {}
    for key, chosen in (("without", config), ("with", with_options(config, lora=lora))):
        model = build(chosen, seed=5)
        with torch.no_grad():
            found[key] = torch.stack([model(b).loss for b in micro_batches("qwen3_tied", config)])
    return found | {"adapters": {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}}


@pytest.mark.parametrize("lora", [LoraConfig(rank=-1), LoraConfig(rank=4, targets=("head",)), LoraConfig(4, 8, ())])
def test_settings_that_make_no_sense(lora):
    with pytest.raises(ValueError, match=r"stage\.lora\.rank=.*expected a rank of at least 1"):
        with_options(fixture_config("qwen3_tied"), lora=lora)


def test_adapters_multiplied_by_nothing():
    for alpha in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"stage\.lora\.alpha="):
            with_options(fixture_config("qwen3_tied"), lora=LoraConfig(rank=4, alpha=alpha))
