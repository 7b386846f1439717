"""Our Megatron model against transformers' native Molmo2: logits and every gradient, under every layout.

The weights go through the converter's name maps into the model, the fixtures' inputs through the collator: alone,
packed, padded, in two micro-batches. Gradients are those that Megatron's DDP and finalize_model_grads hand the
optimizer.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from molmo2_nemo.convert.names import rules, to_external
from tests.model.oracle import (
    CASES,
    FIXTURES,
    LAYOUT,
    LENGTH,
    SMALL,
    build,
    example,
    fixture_case,
    fixture_config,
    fixture_grads,
    fixture_weights,
    micro_batches,
    run_schedule,
)
from tests.support.pool import start_megatron

torch.set_num_threads(1)
LOGITS = 2e-5  # max abs difference, fp32
GRADS = 1e-4  # relative to the tensor's largest gradient


def single_logits_job(names: tuple[str, ...]) -> dict[str, float]:
    """Every case of every fixture as a sequence of its own on one process; largest differences of the logits."""
    from molmo2_nemo.data.collate import collate
    from molmo2_nemo.model.inputs import PackInputs

    start_megatron()
    found = {}
    for name in names:
        config = fixture_config(name)
        model = build(config, fixture_weights(name, config)).eval()
        for kind in CASES:
            case, one = fixture_case(name, kind), example(name, kind)
            batch = collate([[one]], sequence_length=one.num_tokens, im_patch_id=config.text.vocab_size + 2)
            batch.labels = batch.loss_weights = None
            with torch.no_grad():
                logits = model(PackInputs.from_batch(batch))[0].numpy()
            assert logits.shape == (one.num_tokens, config.text.vocab_size)  # no column for an extra id
            found[f"{name} {kind}"] = float(np.abs(logits[case["logit_positions"]] - case["logits"]).max())
    return found


def test_logits_of_every_case(workers):
    found = workers.run(single_logits_job, (*SMALL, "tiny"))[0]
    assert len(found) == 24
    assert max(found.values()) <= LOGITS, found


def layout_job(names: tuple[str, ...], layout: dict[str, int], sequence: bool) -> dict[str, dict[str, float]]:
    """Largest differences of this rank's logits, token losses and gradients, per fixture."""
    start_megatron(**layout)
    found = {}
    for name in names:
        config = fixture_config(name)
        model = build(config, fixture_weights(name, config), sequence_parallel=sequence)
        batches = micro_batches(name, config)
        total = float(sum(b.loss_weights.sum() for b in batches))
        losses = run_schedule(model, batches, backward=True)
        grads = gradient_errors(model, fixture_grads(name, config), total)
        for batch in batches:
            batch.labels = None
        logits = run_schedule(model.eval(), batches, backward=False)
        worst = {
            "grads": max(grads.values()),
            "at": max(grads, key=grads.__getitem__),
            "logits": logit_error(name, logits),
            "compared": len(grads),
        }
        worst["loss"] = sum(float(x) for x in losses) / total
        found[name] = worst
    return found


def gradient_errors(model: Any, expected: dict[str, torch.Tensor], total: float) -> dict[str, float]:
    """Per parameter of this rank: largest difference, relative to the largest value of the whole tensor's gradient.

    Gradients of key biases are 0 in exact arithmetic (softmax does not see a shift), rounding noise on both sides: they
    are held to a hundredth of the model's largest gradient.
    """
    from molmo2_nemo.model.init import canonical_name, shard

    largest = max(float(g.abs().max()) for g in expected.values())
    errors = {}
    for name, parameter in model.named_parameters():
        whole = expected[canonical_name(model, name)]
        difference = parameter.main_grad / total - shard(model, name, parameter, whole)
        scale = largest / 100 if name.endswith("k_proj.bias") else float(whole.abs().max())
        errors[name] = float(difference.abs().max()) / scale
    return errors


def logit_error(name: str, outputs: list[torch.Tensor]) -> float:
    """Largest difference of this rank's [B, T, V / TP] logits from the fixture's."""
    from megatron.core import parallel_state

    rank, size = parallel_state.get_context_parallel_rank(), LENGTH // parallel_state.get_context_parallel_world_size()
    tensor, tensors = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    worst = 0.0
    for batch, logits in zip(LAYOUT, outputs, strict=False):  # only the last stage has outputs
        for b, row in enumerate(batch):
            expected = np.concatenate([fixture_case(name, kind)["logits"] for kind in row] or [np.zeros((0, 1))])
            columns = -(-expected.shape[1] // tensors)
            mine = expected[rank * size : (rank + 1) * size, tensor * columns : (tensor + 1) * columns]
            if mine.size:
                assert logits.shape[2] == mine.shape[1]
                worst = max(worst, float(np.abs(logits[b, : len(mine)].numpy() - mine).max()))
    return worst


LAYOUTS = {
    "one": (1, {}, False),
    "TP2": (2, {"tensor": 2}, False),
    "TP2+SP": (2, {"tensor": 2}, True),
    "CP2": (2, {"context": 2}, False),
    "PP2": (2, {"pipeline": 2}, False),
    "TP2 x CP2": (4, {"tensor": 2, "context": 2}, False),
    "TP2+SP x CP2": (4, {"tensor": 2, "context": 2}, True),
    "TP2+SP x PP2": (4, {"tensor": 2, "pipeline": 2}, True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients(workers, layout):
    ranks, sizes, sequence = LAYOUTS[layout]
    # three query heads per rank of qwen3_tied_odd cannot be sharded over two context ranks
    names = tuple(n for n in SMALL if not (n == "qwen3_tied_odd" and "x CP2" in layout))
    results = workers.run(layout_job, names, sizes, sequence, ranks=ranks)
    for name in names:
        found = [r[name] for r in results]
        assert max(f["logits"] for f in found) <= LOGITS, (name, found)
        assert max(f["grads"] for f in found) <= GRADS, (name, found)
        # context ranks hold parts of the loss; tensor ranks hold it all; only the last stage has one
        parts = sum(f["loss"] for f in found) / sizes.get("tensor", 1)
        expected = json.loads((FIXTURES / name / "fixture.json").read_text())["loss"]
        assert parts == pytest.approx(expected, rel=1e-5), name
    if ranks == 1:
        shapes = {n: len(fixture_weights(n, fixture_config(n))) for n in names}
        assert {n: results[0][n]["compared"] for n in names} == shapes


def tiny_gradients_job() -> dict[str, torch.Tensor]:
    """Native gradients of the larger fixture on one process; untied, because natively a tied table has two."""
    start_megatron()
    config = fixture_config("tiny")
    tied = fixture_weights("tiny", config)
    config = replace(config, text=replace(config.text, tie_embeddings=False))
    model = build(config, tied | {"output_layer.weight": tied["embedding.base.weight"]})
    batches = micro_batches("tiny", config)
    run_schedule(model, batches, backward=True)
    total = float(sum(b.loss_weights.sum() for b in batches))
    ours = {name: parameter.main_grad / total for name, parameter in model.named_parameters()}
    native: dict[str, torch.Tensor] = {}
    for rule in rules(config, "native"):
        native |= to_external(rule, [ours[n] for n in rule.canonical], config)
    return native


def test_gradients_of_tiny(workers):
    """Stored as norms and samples; every native parameter is compared."""
    ours = workers.run(tiny_gradients_job)[0]
    stored = safetensors.torch.load_file(FIXTURES / "tiny" / "grads.safetensors")
    assert {n.rsplit(".", 1)[0] for n in stored} == set(ours)
    scale = max(float(t) for n, t in stored.items() if n.endswith(".norm"))
    for name, grad in ours.items():
        norm, sample = float(stored[f"{name}.norm"]), stored[f"{name}.sample"].numpy()
        picked = grad.flatten().numpy()[np.random.RandomState(0).randint(0, grad.numel(), 256)]
        if norm > 1e-5 * scale:  # key biases have none
            assert float(grad.double().norm()) == pytest.approx(norm, rel=GRADS), name
        np.testing.assert_allclose(picked, sample, rtol=0, atol=GRADS * max(np.abs(sample).max(), 1e-5 * scale))
