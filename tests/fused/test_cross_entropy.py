"""Ways of the loss against the plain one: frozen parts, losses for the log, chunks, bf16; what waits for backward."""

from __future__ import annotations

import pytest
import torch

from molmo2_nemo.fused.choice import PIECES
from tests.support.equal import BF16, FP32, error

WAYS = PIECES["loss"]
N, WIDTH, VOCAB, PADDED = 23, 32, 61, 64


def parts(n: int, dtype: torch.dtype, trains: str) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(n, WIDTH, generator=g), torch.randn(PADDED, WIDTH, generator=g) * 0.3
    labels, weights = torch.randint(0, VOCAB, (n,), generator=g), torch.rand(n, generator=g) + 0.1
    hidden, head = hidden.bfloat16().to(dtype), head.bfloat16().to(dtype)
    return hidden.requires_grad_("hidden" in trains), head.requires_grad_("head" in trains), labels, weights


def run(way, group, n, dtype, trains, chunk):
    hidden, head, labels, weights = parts(n, dtype, trains)
    each = torch.full((n,), float("nan"))
    loss = WAYS[way].function(hidden, head, labels, weights, 1e-2, VOCAB, group, chunk, each)
    leaves = [t for t in (hidden, head) if t.requires_grad]
    return loss.detach(), each, *(torch.autograd.grad(loss * 0.5, leaves) if leaves else ())


@pytest.mark.parametrize("trains", ["hidden and head", "hidden", "head", "nothing"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "plain"])
def test_equal(group, way, trains):
    for n, chunk in ((N, 64), (N, 8), (0, 8)) if trains == "hidden and head" else ((N, 8),):
        plain = run("plain", group, n, torch.float32, trains, chunk)
        got = run(way, group, n, torch.float32, trains, chunk)
        low = run(way, group, n, torch.bfloat16, trains, chunk)
        plain_low = run("plain", group, n, torch.bfloat16, trains, chunk)
        for exact, a, b, c in zip(plain, got, low, plain_low, strict=True):
            assert a.dtype == exact.dtype and b.dtype == c.dtype
            assert error(exact, a) <= FP32
            assert error(exact, b) <= max(2 * BF16, error(exact, c))  # the plain way rounds logits, too


def test_only_the_gradient_of_hidden_waits_for_backward(group):
    hidden, head, labels, weights = parts(N, torch.float32, "hidden")
    loss = WAYS["fused"].function(hidden, head, labels, weights, 1e-2, VOCAB, group, 8)
    waiting = [g for g in loss.grad_fn.gradients if g is not None]
    assert [tuple(g.shape) for g in waiting] == [(N, WIDTH)] and not loss.grad_fn.saved_tensors
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="can be differentiated once"):
        loss.backward()


def test_without_gradients_none_is_computed(group):
    hidden, head, labels, weights = parts(N, torch.float32, "hidden and head")
    with torch.no_grad():
        loss = WAYS["fused"].function(hidden, head, labels, weights, 1e-2, VOCAB, group, 8)
    assert not loss.requires_grad
    assert error(run("plain", group, N, torch.float32, "", 8)[0], loss) <= FP32
