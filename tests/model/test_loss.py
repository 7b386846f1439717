"""The chunked, vocabulary-parallel loss against torch's cross entropy and z-loss in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2_nemo.fused.choice import PIECES
from tests.support.thorough import thorough

torch.set_num_threads(1)
LOSSES = PIECES["loss"]


def problem(seed: int, n: int, width: int, vocab: int, scale: float) -> tuple[torch.Tensor, ...]:
    """hidden [n, D], head [V, D], labels [n], weights [n]; scale stretches the logits."""
    g = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(n, width, generator=g) * scale, torch.randn(vocab, width, generator=g)
    labels = torch.randint(0, vocab, (n,), generator=g)
    return hidden, head, labels, torch.rand(n, generator=g) * 4 + 0.01


def oracle(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradients with respect to hidden and head, float64, over all logits at once."""
    hidden, head = hidden.double().requires_grad_(), head.double().requires_grad_()
    logits = hidden @ head.T
    cross_entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    loss = (weights.double() * (cross_entropy + z_loss * logits.logsumexp(-1) ** 2)).sum()
    return loss.detach(), *torch.autograd.grad(loss * 0.5, (hidden, head))


def check(got: tuple[torch.Tensor, ...], parts: tuple[torch.Tensor, ...], z_loss: float) -> None:
    """fp32 logits of size L make probabilities good to about eps * (1 + L), whatever is left of their differences."""
    hidden, head, _, weights = parts
    if not len(hidden):
        assert not any(t.any() for t in got)
        return
    unit = 1e-6 * (1 + float((hidden @ head.T).abs().max())) * float(weights.max())
    n = len(hidden)
    bounds = (unit * n, unit * float(head.abs().max()), unit * n * float(hidden.abs().max()))
    for ours, theirs, bound in zip(got, oracle(*parts, z_loss), bounds, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=bound)


def run(way: str, parts: tuple[torch.Tensor, ...], z_loss: float, vocab: int, chunk: int) -> tuple[torch.Tensor, ...]:
    """This rank's loss and gradients; parts hold its rows of the padded head."""
    from megatron.core import parallel_state

    hidden, head, labels, weights = parts
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    group = parallel_state.get_tensor_model_parallel_group()
    loss = LOSSES[way].function(hidden, head, labels, weights, z_loss, vocab, group, chunk)
    return loss.detach(), *torch.autograd.grad(loss * 0.5, (hidden, head))


def parallel_job(way: str, cases: list[tuple]) -> list[tuple]:
    """Every case over the tensor-parallel group; the head padded with rows that would win if they took part."""
    from tests.support.pool import start_megatron

    size = torch.distributed.get_world_size()
    start_megatron(tensor=size)
    results = []
    for (seed, n, width, vocab, scale), z_loss, chunk in cases:
        hidden, head, labels, weights = problem(seed, n, width, vocab, scale)
        padding = -vocab % size
        padded = torch.cat((head, 100 * torch.ones(padding, width)))
        mine = padded.chunk(size)[torch.distributed.get_rank()]
        results.append(run(way, (hidden, mine, labels, weights), z_loss, vocab, chunk))
    return results


def cases() -> list[tuple]:
    rng = np.random.default_rng(0)
    found = []
    for seed in range(25):
        n, width, vocab = int(rng.integers(0, 40)), int(rng.integers(1, 20)), int(rng.integers(2, 50))
        shape = (seed, n, width, vocab, float(rng.choice([0.1, 1.0, 10.0])))
        found.append((shape, float(rng.choice([0.0, 1e-4, 0.1])), int(rng.choice([1, 3, 7, 1024]))))
    return found


@pytest.mark.parametrize(
    ("way", "ranks"),
    [
        ("plain", 1),
        ("plain", 2),
        ("plain", 4),
        ("fused", 1),
        ("fused", 2),
        ("fused", 4),
        ("compiled", 1),
        thorough("compiled", 2),
    ],
)
def test_equals_cross_entropy_and_z_loss(workers, way, ranks):
    chosen = cases()[: 3 if way == "compiled" else None]  # each of its shapes is compiled
    parts = workers.run(parallel_job, way, chosen, ranks=ranks)
    for i, (shape, z_loss, _) in enumerate(chosen):
        vocab = shape[3]
        ours = [rank[i] for rank in parts]
        assert all(torch.equal(o[0], ours[0][0]) for o in ours)  # every rank holds the whole loss
        grad_head = torch.cat([o[2] for o in ours])
        assert not grad_head[vocab:].any()  # padding learns nothing
        check((ours[0][0], sum(o[1] for o in ours), grad_head[:vocab]), problem(*shape), z_loss)


@pytest.mark.parametrize("way", ["plain", "fused"])
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(1, 30), st.integers(2, 40), st.integers(1, 35), st.sampled_from([0.0, 1e-4, 1])
)
def test_chunks_do_not_matter(group, way, seed, n, vocab, chunk, z_loss):
    hidden, head, labels, weights = problem(seed, n, 6, vocab, 1.0)
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    loss = LOSSES[way].function(hidden, head, labels, weights, z_loss, vocab, group, chunk)
    grads = torch.autograd.grad(loss * 0.5, (hidden, head))
    check((loss.detach(), *grads), (hidden.detach(), head.detach(), labels, weights), z_loss)


@pytest.mark.parametrize("bad", [-1, 10, 137])
def test_labels_that_cannot_be_predicted(bad):
    from molmo2_nemo.model.loss import check_labels

    labels = problem(0, 5, 4, 10, 1.0)[2].numpy()
    check_labels(labels, 10)
    labels[3] = bad
    with pytest.raises(AssertionError, match=rf"label {bad}, but only ids 0\.\.9 can be predicted"):
        check_labels(labels, 10)


def test_logits_exist_for_one_chunk_at_a_time(group, monkeypatch):
    from molmo2_nemo.fused import cross_entropy as module

    seen = []
    logits = module._logits

    def watched(hidden, *args):
        seen.append(len(hidden))
        return logits(hidden, *args)

    monkeypatch.setattr(module, "_logits", watched)
    hidden, head, labels, weights = problem(0, 20, 4, 10, 1.0)
    module.plain(hidden.requires_grad_(), head, labels, weights, 1e-4, 10, group, 6).backward()
    assert seen == [6, 6, 6, 2] * 2


SCORED = 300  # positions with a loss, however long the pack


def memory_job(sizes: list[int]) -> dict[int, tuple[int, int, int]]:
    """Per pack size, of the model's loss alone: peak bytes of forward and of both passes, elements of the largest."""
    from molmo2_nemo.model.config import MemoryConfig, preset
    from molmo2_nemo.model.inputs import PackInputs
    from tests.model.oracle import build
    from tests.support.allocations import Allocations
    from tests.support.pool import start_megatron

    start_megatron()
    model = build(preset("tiny"), memory=MemoryConfig(loss_chunk=64))
    found = {}
    for size in sizes:
        ids = torch.arange(size)[None] % 1000
        weights = torch.zeros(1, size)
        weights[0, torch.linspace(0, size - 1, SCORED).long()] = 0.5
        nothing = torch.zeros(0, dtype=torch.long)
        rest = dict.fromkeys(("crops", "pooling", "pooled_positions", "unit_crops", "unit_pooled_tokens"), nothing)
        same = dict.fromkeys(("input_ids", "position_ids", "example_ids", "branch_ids"), ids)
        inputs = PackInputs(**same, visual=ids < 0, **rest, labels=ids, loss_weights=weights)
        hidden = torch.randn(size, 1, model.config.hidden_size, requires_grad=True)
        model.zero_grad()
        with Allocations() as counted:
            loss = model.loss(hidden, inputs).loss
            forward = counted.peak
            loss.backward()
        assert int((hidden.grad.abs().sum(-1) > 0).sum()) == SCORED
        found[size] = (forward, counted.peak, counted.largest[0])
    return found


def test_memory_does_not_grow_with_the_pack(workers):
    """At a fixed number of answers only arrays of a few numbers per token grow, and the gradient that is handed on
    (twice: selecting the answers' rows is undone into one tensor, which autograd copies)."""
    short, long = 2048, 32768
    found = workers.run(memory_job, [short, long])[0]
    width, more = 192, long - short
    assert found[long][0] - found[short][0] <= 32 * more
    assert found[long][1] - found[short][1] <= (2 * 4 * width + 32) * more
    assert found[short][0] > 64 * 1024 * 4  # the logits of a chunk were seen
    assert found[long][2] <= long * width  # nothing larger than the gradient of the hidden states
