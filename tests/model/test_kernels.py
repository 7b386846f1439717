"""The whole model with compiled pieces against the plain one: losses and every gradient, under parallel layouts and
memory options; and dropout, which draws other numbers but follows from the seed as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from molmo2_nemo.fused.choice import PIECES
from molmo2_nemo.model.config import KernelConfig, MemoryConfig
from tests.model.oracle import build, fixture_config, fixture_weights, micro_batches, run_schedule
from tests.support.pool import start_megatron
from tests.support.thorough import mostly

torch.set_num_threads(1)
PLAIN = KernelConfig(**dict.fromkeys(PIECES, "plain"))  # type: ignore[arg-type]
COMPILED = KernelConfig(**{p: "compiled" for p, ways in PIECES.items() if "compiled" in ways})  # type: ignore[arg-type]
RATE = 0.1


def model_job(name: str, layout: dict[str, int], memories: list[MemoryConfig]) -> list[tuple[dict, dict]]:
    """Per memory option, of the plain and of the compiled model: losses and gradients of this rank."""
    start_megatron(**layout)
    torch._dynamo.utils.counters["graph_break"].clear()  # of earlier tests in this process
    config = fixture_config(name)
    weights, found = fixture_weights(name, config), []
    for memory in memories:
        both = []
        for kernels in (PLAIN, COMPILED):
            model = build(config, weights, memory, kernels, sequence_parallel="tensor" in layout, z_loss=1e-4).train()
            if model.offload is not None:
                model.offload.min_bytes = 1
            losses = run_schedule(model, micro_batches(name, config), backward=True)
            both.append({"losses": losses} | {n: p.main_grad.clone() for n, p in model.named_parameters()})
        found.append((both[0], both[1]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch._dynamo.utils.counters["graph_break"] == {}
    return found


ALONE = [
    MemoryConfig(),
    MemoryConfig(recompute="full", mlp_tiles=2),
    MemoryConfig(recompute="selective", recompute_modules=["core_attn", "mlp"], offload=True),
]
CASES = {
    "alone": ("qwen3_tied", {}, ALONE),
    "post-norm": ("olmo3", {}, ALONE[:1]),
    "TP2+SP": ("qwen3_tied", {"tensor": 2}, ALONE[:1]),
    "CP2": ("qwen3_tied", {"context": 2}, ALONE[:1]),
    "PP2": ("qwen3_tied", {"pipeline": 2}, ALONE[:1]),
}


@pytest.mark.parametrize("case", mostly(CASES, "alone", "TP2+SP"))
def test_compiled_equals_plain(workers, case):
    name, layout, memories = CASES[case]
    ranks = 2 if layout else 1
    for rank in workers.run(model_job, name, layout, memories, ranks=ranks):
        for plain, got in rank:
            assert len(plain["losses"]) == len(got["losses"])
            for a, b in zip(got.pop("losses"), plain.pop("losses"), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
            largest = max(float(g.abs().max()) for g in plain.values())
            for key, grad in plain.items():
                bound = 1e-5 * max(float(grad.abs().max()), 0.01 * largest)
                torch.testing.assert_close(got[key], grad, rtol=0, atol=bound, msg=lambda m, key=key: f"{key}: {m}")


def dropout_job(layout: dict[str, int], rates: dict[str, float]) -> list[list[torch.Tensor]]:
    """Gradients of a step; of the same step again, and recomputed; of another step."""
    from molmo2_nemo.training.seeds import seed_step

    start_megatron(**layout)
    config = fixture_config("qwen3_tied")
    weights, found = fixture_weights("qwen3_tied", config), []
    for step, recompute in ((5, "none"), (5, "none"), (5, "full"), (6, "none")):
        memory = MemoryConfig(recompute=recompute)  # type: ignore[arg-type]
        sequence = "tensor" in layout
        model = build(config, weights, memory, COMPILED, sequence_parallel=sequence, **rates).train()
        seed_step(6198, step)
        run_schedule(model, micro_batches("qwen3_tied", config), backward=True)
        found.append([p.main_grad.clone() for p in model.parameters()])
    return found


@pytest.mark.parametrize(
    ("layout", "rates"),
    [({}, {"residual_dropout": RATE}), ({"tensor": 2}, {"response_residual_dropout": RATE})],
    ids=["everywhere", "answers, TP2+SP"],
)
def test_dropout_follows_from_the_seed(workers, layout: dict[str, Any], rates: dict[str, float]):
    for first, again, recomputed, other in workers.run(dropout_job, layout, rates, ranks=2 if layout else 1):
        assert all(map(torch.equal, first, again))
        for a, b in zip(first, recomputed, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(a.abs().max()))
        assert not all(map(torch.equal, first, other))


def head_job() -> tuple[int, ...]:
    """Shape of an untied head's weight where the decoder's linear layers add up weight gradients themselves."""
    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.model.embedding import Head

    start_megatron()
    config = fixture_config("qwen3_untied")
    fused = transformer_config(config, use_cpu_initialization=True, gradient_accumulation_fusion=True)
    assert Head(fused, config).config.gradient_accumulation_fusion is False and fused.gradient_accumulation_fusion
    return tuple(Head(fused, config).weight.shape)


def test_head_needs_no_fused_gradient_accumulation(workers):
    """Megatron's own column-parallel layer refuses it without Apex, also beside Transformer Engine."""
    vocabulary, width = workers.run(head_job)[0]
    assert (
        vocabulary >= fixture_config("qwen3_untied").text.vocab_size
        and width == fixture_config("qwen3_untied").text.hidden_size
    )
