"""Layers that work in chunks (memory.sequence_chunk): losses and gradients of trees with pictures and videos against
whole layers under every layout, gradients against transformers', and dropout's draws in both passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from molmo2_nemo.model.config import MemoryConfig, TrainingOptions, preset
from tests.model.oracle import build, fixture_config, fixture_grads, fixture_weights, micro_batches, run_schedule
from tests.model.test_oracle import GRADS, gradient_errors
from tests.support.light import run_light
from tests.support.pool import start_megatron

torch.set_num_threads(1)
OPTIONS: dict[str, MemoryConfig] = {
    "chunks": MemoryConfig(recompute="full", sequence_chunk=48),
    "with attention": MemoryConfig(recompute="full", recompute_attention=True, sequence_chunk=100),
    "everything": MemoryConfig(recompute="full", sequence_chunk=64, mlp_tiles=3, offload=True, vision_chunk=2),
    "one": MemoryConfig(recompute="full", sequence_chunk=10**6),
}
# name: ranks, Megatron's sizes, context settings, options
LAYOUTS: dict[str, tuple[int, dict[str, int], dict[str, Any], tuple[str, ...]]] = {
    "alone": (1, {}, {}, tuple(OPTIONS)),
    "tensor": (2, {"tensor": 2}, {}, ("chunks", "everything")),
    "pipeline": (2, {"pipeline": 2}, {}, ("everything",)),
    "ulysses": (2, {"context": 2}, {}, ("chunks", "everything")),
    "ring": (2, {"context": 2}, {"ulysses": 1, "cp_comm_type": "ring"}, ("chunks", "with attention")),
    "all_gather": (2, {"context": 2}, {"ulysses": 1, "cp_comm_type": "all_gather"}, ("chunks", "with attention")),
    "ulysses, ring": (4, {"context": 4}, {"ulysses": 2, "cp_comm_type": "ring"}, ("chunks",)),
    "tensor, ring": (4, {"tensor": 2, "context": 2}, {"ulysses": 1, "cp_comm_type": "ring"}, ("chunks",)),
}
Z_LOSS = 1e-4


def small(**text: Any) -> Any:
    tiny = preset("tiny")
    vision = replace(tiny.vision, hidden_size=32, num_heads=2, ffn_size=64, num_layers=3, feature_layers=(-1, -2))
    text = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8} | text
    return replace(tiny, vision=vision, text=replace(tiny.text, **text))


def layout_job(name: str, packs: list[Any]) -> dict[str, dict[str, Any]]:
    """Per option and "plain": what the last stage returns for every pack, and this rank's sums of gradients."""
    from molmo2_nemo import cpu

    cpu.enable(threads=1)
    cpu.enable_megatron()

    from molmo2_nemo.model.inputs import PackInputs

    _, sizes, context, options = LAYOUTS[name]
    start_megatron(**sizes)
    config, found = small(), {}
    for option in ("plain", *options):
        memory = OPTIONS.get(option, MemoryConfig())
        model = build(config, memory=memory, context=context, sequence_parallel="tensor" in sizes, z_loss=Z_LOSS)
        if model.offload is not None:
            model.offload.min_bytes = 1
        inputs = [PackInputs.from_batch(pack) for pack in packs]
        if option == "chunks":  # as training does, ahead
            for pack in inputs:
                pack.plan = model.plan(pack)
        losses = run_schedule(model.train(), inputs, backward=True)
        grads = {n: p.main_grad.clone() for n, p in model.named_parameters()}
        found[option] = {"losses": losses, "grads": grads}
        with torch.no_grad():
            found[option]["evaluated"] = run_schedule(model.eval(), inputs, backward=False)
    return found


@pytest.fixture(scope="module")
def trees() -> list[Any]:
    """A pack with many pictures and one with a video; both have branches."""
    import molmo2_nemo.model.molmo2  # noqa: F401  (forked processes then have it)
    from tests.support.packs import demo_packs

    packs = [batch for batch in demo_packs(20) if (batch.branch_ids >= 0).any()]
    picked = [max(packs, key=lambda b: len(b.unit_crops)), max(packs, key=lambda b: b.visual.sum())]
    assert all(batch.visual.any() and batch.input_ids.shape[1] > 300 for batch in picked)
    return picked


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], note: str, bound: float = 1e-5) -> None:
    """Gradients within `bound` of a parameter's largest, or of a hundredth of the model's largest."""
    assert got.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for key, grad in expected.items():
        atol = bound * max(float(grad.abs().max()), 0.01 * largest)
        torch.testing.assert_close(got[key], grad, rtol=0, atol=atol, msg=lambda m, key=key: f"{note}, {key}: {m}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_chunks_change_no_number(trees, name):
    ranks, _, _, options = LAYOUTS[name]
    results = run_light(layout_job, name, trees, ranks=ranks)
    assert len(results[-1]["plain"]["losses"]) == len(trees)
    for found in results:
        plain = found["plain"]
        assert any(bool(grad.any()) for key, grad in plain["grads"].items() if "linear" in key)
        for option in options:
            for kind in ("losses", "evaluated"):
                for got, expected in zip(found[option][kind], plain[kind], strict=True):
                    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
            same(found[option]["grads"], plain["grads"], f"{name}, {option}")


def transformers_job(name: str) -> dict[str, float]:
    """Per parameter: the largest difference from transformers' gradient, as a share."""
    from molmo2_nemo import cpu

    cpu.enable(threads=1)
    cpu.enable_megatron()
    start_megatron()
    config = fixture_config(name)
    model = build(config, fixture_weights(name, config), MemoryConfig(recompute="full", sequence_chunk=7)).train()
    batches = micro_batches(name, config)
    run_schedule(model, batches, backward=True)
    return gradient_errors(model, fixture_grads(name, config), float(sum(b.loss_weights.sum() for b in batches)))


@pytest.mark.parametrize("name", ["qwen3_untied", "olmo3_gqa"])
def test_gradients_are_transformers(name):
    import molmo2_nemo.model.molmo2  # noqa: F401

    worst = run_light(transformers_job, name, ranks=1)[0]
    assert len(worst) > 20
    assert max(worst.values()) < GRADS, max(worst, key=worst.__getitem__)


def dropout_job(packs: list[Any], rates: TrainingOptions) -> dict[str, Any]:
    """Losses and gradients in chunks, with the factors that dropout drew there; and of whole layers given these."""
    from molmo2_nemo import cpu
    from molmo2_nemo.fused import residual

    cpu.enable(threads=1)
    cpu.enable_megatron()
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from molmo2_nemo.model.inputs import PackInputs

    start_megatron()
    drawn: dict[int, list[torch.Tensor]] = {}

    def drawing(layer: int) -> Any:
        def dropped_and_added(x: torch.Tensor, added: torch.Tensor, *rest: Any) -> torch.Tensor:
            before = torch.get_rng_state()
            out = residual.plain(x, added, *rest)
            after = torch.get_rng_state()
            if not x.requires_grad:  # forward (Megatron switches autograd on around this, in every pass)
                torch.set_rng_state(before)
                factors = residual.plain(torch.ones_like(x), torch.zeros_like(x), *rest)
                drawn.setdefault(layer, []).append(factors)
                torch.set_rng_state(after)
            return out

        return dropped_and_added

    def given(layer: int) -> Any:
        chunks = drawn[layer]  # of attention, of the MLP, of attention, ...
        factors = iter([torch.cat(chunks[0::2]), torch.cat(chunks[1::2])])
        return lambda x, added, *rest: added + x * next(factors)

    config, found = small(), {}
    for option, memory in (("chunks", OPTIONS["chunks"]), ("plain", None)):
        model = build(config, None, memory, **vars(rates)).train()
        for number, layer in enumerate(model.decoder.layers):
            layer.dropped_and_added = drawing(number) if option == "chunks" else given(number)
        torch.manual_seed(5)
        model_parallel_cuda_manual_seed(5)
        losses = run_schedule(model, [PackInputs.from_batch(packs[0])], backward=True)
        found[option] = losses[0], {n: p.main_grad.clone() for n, p in model.named_parameters()}
    shares = [float((torch.cat(factors) == 0).float().mean()) for factors in drawn.values()]
    return found | {"dropped": min(shares)}


@pytest.mark.parametrize(
    "rates",
    [TrainingOptions(z_loss=0.0, residual_dropout=0.1, response_residual_dropout=rate) for rate in (0.0, 0.3)],
    ids=["everywhere", "responses"],
)
def test_dropout_draws_the_same_again_in_backward(trees, rates):
    found = run_light(dropout_job, trees, rates, ranks=1)[0]
    assert found["dropped"] > 0.08
    torch.testing.assert_close(found["chunks"][0], found["plain"][0], rtol=1e-5, atol=0)
    same(found["chunks"][1], found["plain"][1], "dropout")
