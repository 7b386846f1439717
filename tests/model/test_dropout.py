"""Residual dropout: which tokens, how many values, whose masks differ, and that all of it follows from the seed.

Masks are read off a running model.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch

from molmo2_nemo.model.config import MemoryConfig
from tests.model.oracle import build, fixture_config, fixture_weights, micro_batches, run_schedule
from tests.support.packs import demo_packs, tiny_run, train_on_packs
from tests.support.pool import start_megatron
from tests.support.thorough import mostly, thorough

torch.set_num_threads(1)
RATE = 0.1
NAME = "qwen3_tied"  # 2 layers, width 32
STAGES = {"everywhere": {"residual_dropout": RATE}, "responses": {"response_residual_dropout": RATE}}


def watch(model: Any) -> list[torch.Tensor]:
    """Every factor that dropout puts on a branch's output, [T', B, D] per branch and layer, as the model runs."""
    masks: list[torch.Tensor] = []

    def watched(bias_dropout_add: Any) -> Any:
        def build_function(training: bool, fused: bool) -> Any:
            function = bias_dropout_add(training, fused)

            def run(x_with_bias: tuple[torch.Tensor, Any], residual: torch.Tensor, rate: float) -> torch.Tensor:
                before = torch.get_rng_state()
                out = function(x_with_bias, residual, rate)
                after = torch.get_rng_state()
                torch.set_rng_state(before)  # the same draw once more, on ones, so that the factors can be read exactly
                ones = torch.ones_like(x_with_bias[0])
                masks.append(function((ones, None), torch.zeros_like(ones), rate).detach())
                assert torch.equal(torch.get_rng_state(), after)
                return out

            return run

        return build_function

    for layer in model.decoder.layers:
        layer.self_attn_bda, layer.mlp_bda = watched(layer.self_attn_bda), watched(layer.mlp_bda)
    return masks


def masks_job(
    stage: str, layout: dict[str, int], sequence: bool = False, steps: tuple[int, ...] = (3,), recompute: bool = False
) -> dict[str, Any]:
    """Masks of this rank over two micro-batches a step, its places, and which of its tokens answer, [T', B]."""
    from megatron.core import parallel_state

    from molmo2_nemo.training.seeds import seed_step

    start_megatron(**layout)
    memory = MemoryConfig(recompute="full" if recompute else "none")
    config = fixture_config(NAME)
    model = build(config, fixture_weights(NAME, config), memory, sequence_parallel=sequence, **STAGES[stage])
    masks = watch(model)
    for step in steps:
        seed_step(6198, step)
        run_schedule(model, micro_batches(NAME, config), backward=True)
    grads = hashlib.sha256(b"".join(p.main_grad.numpy().tobytes() for p in model.parameters())).hexdigest()
    responses = []
    for batch in micro_batches(NAME, config):
        response = batch.loss_weights.T > 0  # [S, B]: positions whose next token has loss
        response = response.chunk(parallel_state.get_context_parallel_world_size())[
            parallel_state.get_context_parallel_rank()
        ]
        if sequence:
            response = response.chunk(parallel_state.get_tensor_model_parallel_world_size())[
                parallel_state.get_tensor_model_parallel_rank()
            ]
        responses.append(response)
    return {"masks": [m.numpy() for m in masks], "responses": [r.numpy() for r in responses], "grads": grads}


LAYOUTS = {
    "one": (1, {}, False),
    "TP2": (2, {"tensor": 2}, False),
    "TP2+SP": (2, {"tensor": 2}, True),
    "CP2": (2, {"context": 2}, False),
    "PP2": (2, {"pipeline": 2}, False),
    "DP2": (2, {}, False),
    "TP2+SP x CP2": (4, {"tensor": 2, "context": 2}, True),
}
KEEP = np.float32(1) / np.float32(1 - RATE)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", mostly(LAYOUTS, "one", "PP2", "TP2+SP x CP2"))
def test_rate_scale_and_place(workers, stage, layout):
    """Under every layout: a tenth of the right values is 0, the others are scaled by 1 / 0.9, the rest is untouched."""
    ranks, sizes, sequence = LAYOUTS[layout]
    steps = tuple(range(4))
    found = workers.run(masks_job, stage, sizes, sequence, steps, ranks=ranks)
    dropped = total = 0
    for rank in found:
        per_batch = len(rank["masks"]) // (2 * len(steps))  # branches of this stage's layers
        assert per_batch == 4 // sizes.get("pipeline", 1)
        assert all(m.shape[:2] == rank["responses"][0].shape for m in rank["masks"])
        for number, mask in enumerate(rank["masks"]):  # micro-batches go forward in order on every stage
            response = rank["responses"][number // per_batch % 2]
            affected = mask if stage == "everywhere" else mask[response]
            assert np.isclose(affected[affected != 0], KEEP, rtol=1e-6).all()
            if stage == "responses":
                assert (mask[~response] == 1).all()
            dropped, total = dropped + int((affected == 0).sum()), total + affected.size
    # five standard deviations of a binomial; ranks of TP without SP repeat each other's draws
    draws = total / (ranks if layout == "TP2" else 1)
    assert abs(dropped / total - RATE) < 5 * (RATE * (1 - RATE) / draws) ** 0.5, (dropped / total, draws)


def test_whose_masks_differ(workers):
    """Sequence, context, data and pipeline ranks draw their own masks; tensor ranks without SP must draw the same."""

    def same(layout: str) -> bool:
        ranks, sizes, sequence = LAYOUTS[layout]
        found = workers.run(masks_job, "everywhere", sizes, sequence, ranks=ranks)
        pairs = [
            (a, b)
            for i in range(ranks)
            for j in range(i)
            for a, b in zip(found[i]["masks"], found[j]["masks"], strict=True)
        ]
        equal = [a.shape == b.shape and np.array_equal(a, b) for a, b in pairs]
        assert all(equal) or not any(equal)
        if not all(equal):  # independent: 0.1 * 0.1 of the values dropped in both
            both = np.mean([np.mean((a == 0) & (b == 0)) for a, b in pairs])
            assert both == pytest.approx(RATE**2, rel=0.25)
        return all(equal)

    assert same("TP2")
    for layout in ("TP2+SP", "CP2", "DP2", "PP2", "TP2+SP x CP2"):
        assert not same(layout), layout


def test_masks_within_a_rank_differ(workers):
    """Between layers, branches, micro-batches and steps."""
    masks = workers.run(masks_job, "everywhere", {}, False, (3, 4))[0]["masks"]
    assert len(masks) == 2 * 2 * 4
    assert not any(np.array_equal(masks[i], masks[j]) for i in range(len(masks)) for j in range(i))


def repeat_job(layout: dict[str, int], sequence: bool) -> dict[str, list[dict[str, Any]]]:
    """Per stage: a step, the same step again, the same with recompute, and another step."""
    from megatron.core import parallel_state

    variants = [((5,), False), ((5,), False), ((5,), True), ((6,), False)]
    found = {}
    for stage in STAGES:
        found[stage] = []
        for steps, recompute in variants:
            found[stage].append(masks_job(stage, layout, sequence, steps, recompute))
            parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize("layout", ["one", thorough("TP2"), "TP2+SP", "CP2", thorough("PP2")])
def test_bits_follow_from_the_seed_and_survive_recompute(workers, layout):
    """The same step again gives the same gradients, bit by bit; so does the recompute of all activations."""
    ranks, sizes, sequence = LAYOUTS[layout]
    for found in workers.run(repeat_job, sizes, sequence, ranks=ranks):
        for first, again, recomputed, other in found.values():
            assert first["grads"] == again["grads"] == recomputed["grads"] != other["grads"]
            assert len(recomputed["masks"]) == 2 * len(first["masks"])  # forward, and forward again in backward


@pytest.fixture(scope="module")
def packs():
    return demo_packs(8)


def curve(workers: Any, packs: Any, folder: Any, stage: str, ranks: int = 1, **layout: Any) -> list[tuple[float, ...]]:
    cfg = tiny_run(folder, 2, **layout)
    cfg.stage.global_batch_size = 2
    cfg.stage.residual_dropout, cfg.stage.response_residual_dropout = (RATE, 0) if stage == "everywhere" else (0, RATE)
    metrics = workers.run(train_on_packs, cfg, packs, ranks=ranks, fit=True)[0]
    return [(m["loss"], m["grad_norm_vit"], m["grad_norm_connector"], m["grad_norm_llm"]) for m in metrics]


@pytest.mark.parametrize("stage", STAGES)
def test_training_with_dropout(workers, packs, tmp_path, stage):
    """The real trainer: tensor ranks draw as one process does, so TP2 follows its curve, and recompute changes nothing
    but rounding."""
    one = curve(workers, packs, tmp_path / "one", stage)
    two = curve(workers, packs, tmp_path / "two", stage, 2, tensor=2, memory={"recompute": "full"})
    np.testing.assert_allclose(two, one, rtol=1e-5)


def test_training_repeats_bit_by_bit(workers, packs, tmp_path):
    """With sequence shards that draw masks of their own."""
    layout = {"tensor": 2, "sequence": True}
    first, again = (curve(workers, packs, tmp_path / name, "everywhere", 2, **layout) for name in ("first", "again"))
    assert first == again
