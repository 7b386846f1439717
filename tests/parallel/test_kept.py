"""Attention's results kept outside recomputation (attention/kept.py) against attention computed again: the same bits
in losses and gradients under every layout and memory option, half the kernel calls, and nothing left over."""

from __future__ import annotations

import gc
import weakref
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from molmo2_nemo.model.config import MemoryConfig, TrainingOptions
from tests.model.oracle import build, fixture_config, fixture_weights, micro_batches, run_schedule
from tests.support.light import run_light
from tests.support.pool import start_megatron
from tests.support.traffic import Counter

torch.set_num_threads(1)
NAME = "qwen3_tied"
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "one layer": {"recompute_layers": 1},
    "tiles": {"mlp_tiles": 3},
    "offload": {"offload": True},
    "chunks": {"vision_chunk": 1},
}
DROPOUT = TrainingOptions(z_loss=1e-4, residual_dropout=0.1, response_residual_dropout=0.2)
# name: ranks, Megatron's sizes, context settings, options
LAYOUTS: dict[str, tuple[int, dict[str, int], dict[str, Any], tuple[str, ...]]] = {
    "alone": (1, {}, {}, tuple(OPTIONS)),
    "tensor": (2, {"tensor": 2}, {}, ("full", "tiles")),
    "pipeline": (2, {"pipeline": 2}, {}, ("full", "offload")),
    "ulysses": (2, {"context": 2}, {}, ("full", "offload")),
    "ring": (2, {"context": 2}, {"ulysses": 1, "cp_comm_type": "ring"}, ("full", "one layer")),
    "all_gather": (2, {"context": 2}, {"ulysses": 1, "cp_comm_type": "all_gather"}, ("full",)),
    "ulysses, ring": (4, {"context": 4}, {"ulysses": 2, "cp_comm_type": "ring"}, ("full",)),
}


def watch(name: str) -> list[int]:
    """Counts calls of the CPU flash kernel's forward from here on."""
    from molmo2_nemo.attention import flash

    calls, original = [0], getattr(flash, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return original(*args, **kwargs)

    setattr(flash, name, counted)
    return calls


def layout_job(name: str) -> dict[tuple[str, bool], dict[str, Any]]:
    """Per option, and whether attention is computed again: losses, gradients, kernel calls, messages and bytes sent."""
    from molmo2_nemo import cpu

    cpu.enable(threads=1)
    cpu.enable_megatron()
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    _, sizes, context, options = LAYOUTS[name]
    start_megatron(**sizes)
    config = fixture_config(NAME)
    weights = fixture_weights(NAME, config)
    calls, counter, found = watch("forward"), Counter(), {}
    for option in options:
        for again in (False, True):
            memory = MemoryConfig(recompute="full", recompute_attention=again, **OPTIONS[option])
            model = build(
                config,
                weights,
                memory,
                context=context,
                sequence_parallel="tensor" in sizes,
                seed=None,
                **asdict(DROPOUT),
            )
            if model.offload is not None:
                model.offload.min_bytes = 1
            torch.manual_seed(5)
            model_parallel_cuda_manual_seed(5)
            calls[0] = 0
            counter.take()
            losses = run_schedule(model.train(), 2 * micro_batches(NAME, config), backward=True)
            found[option, again] = {
                "losses": losses,
                "grads": {n: p.main_grad.clone() for n, p in model.named_parameters()},
                "calls": calls[0],
                "sent": counter.take(),
                "moved": model.offload.moved_bytes if model.offload is not None else 0,
                "layers": len(model.decoder.layers),
            }
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_bits_with_half_the_kernel_calls(name):
    import molmo2_nemo.model.molmo2  # noqa: F401  (forked processes then have it)

    ranks, _, context, options = LAYOUTS[name]
    batches, results = 4, run_light(layout_job, name, ranks=ranks)
    assert len(results[-1]["full", False]["losses"]) == batches  # of pipeline stages the last has them
    for found in results:
        for option in options:
            kept, again = found[option, False], found[option, True]
            assert kept["grads"]
            assert all(torch.equal(a, b) for a, b in zip(kept["losses"], again["losses"], strict=True))
            for key, grad in again["grads"].items():
                assert torch.equal(kept["grads"][key], grad), f"{option}: {key}"
            recomputed = 1 if option == "one layer" else kept["layers"]
            if "ulysses" not in context or context["cp_comm_type"] == "all_gather":  # a ring calls for each chunk
                assert kept["calls"] == batches * kept["layers"]
                assert again["calls"] == kept["calls"] + batches * recomputed
            assert 0 < kept["calls"] < again["calls"]
            if "ulysses" in context:  # keys travel once forward
                assert kept["sent"] < again["sent"]
            else:
                assert kept["sent"] == again["sent"]
            if option == "offload":  # and results wait on the host as well
                assert kept["moved"] > again["moved"] > 0


def leftover_job() -> dict[str, list[Any]]:
    """What is kept, and what of it is alive, after each way in which a forward pass can end."""
    from molmo2_nemo import cpu

    cpu.enable(threads=1)
    cpu.enable_megatron()
    from molmo2_nemo.attention.kept import KeptResults
    from molmo2_nemo.model import molmo2
    from tests.model.oracle import build

    made: list[weakref.ref] = []

    class Watched(KeptResults):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(weakref.ref(self))

    molmo2.KeptResults = Watched
    start_megatron()
    config = fixture_config(NAME)
    model = build(config, fixture_weights(NAME, config), MemoryConfig(recompute="full")).train()
    batch = micro_batches(NAME, config)[0]
    found: dict[str, list[Any]] = {}
    gc.collect()
    gc.disable()

    def note(name: str) -> None:
        found[name] = [len(ref() or ()) for ref in made] + [ref() is not None for ref in made]
        made.clear()

    with torch.no_grad():
        model(batch)
    note("no grad")
    loss = model(batch).loss
    note("forward")
    loss.backward()
    first = model.embedding.base.weight.grad.clone()
    del loss
    loss = model(batch).loss
    waiting = made[0]
    loss.backward()
    found["backward"] = [len(waiting())]
    del loss
    note("after backward")
    model(batch)
    note("forward alone")
    handle = model.decoder.layers[-1].register_forward_hook(lambda *args: 1 / 0)
    try:
        model(batch)
    except ZeroDivisionError:
        pass
    note("failed forward")
    handle.remove()
    model.zero_grad()
    model(batch).loss.backward()
    found["same after all that"] = [torch.equal(first, model.embedding.base.weight.grad)]
    return found


def test_nothing_is_left_over():
    import molmo2_nemo.model.molmo2  # noqa: F401

    layers = fixture_config(NAME).text.num_layers
    found = run_light(leftover_job, ranks=1)[0]
    assert found.pop("no grad") == []
    assert found.pop("forward") == [layers, True]
    assert found.pop("backward") == [0]
    assert found.pop("same after all that") == [True]
    assert found == dict.fromkeys(("after backward", "forward alone", "failed forward"), [0, False])


def test_a_kernel_without_a_backward_keeps_nothing():
    """As FlexAttention: autograd goes through its forward, which therefore has to run in the recomputation."""
    from molmo2_nemo.attention.dense import dense_attention
    from molmo2_nemo.attention.kept import KeptResults, slot_of
    from molmo2_nemo.attention.kernels import attend, choose
    from molmo2_nemo.attention.regions import region_of
    from tests.support.trees import Tree, token_mask

    mask = token_mask([[Tree((3, 5), (4,), (6, 2))]], 32)
    q, k, v = (torch.randn(32, 1, 2, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))

    def differentiable(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return dense_attention(*args[:3], mask, args[4]), torch.empty(0)

    flash = choose("flash", "cpu", q.dtype, 8)
    for kernel, count in ((flash, 1), (replace(flash, forward=differentiable, backward=None), 0)):
        kept = KeptResults()
        with torch.no_grad():
            attend(q, k, v, region_of(mask), 0.3, kernel, slot_of(kept, "layer"))
        assert len(kept) == count
        q.requires_grad_()
        attend(q, k, v, region_of(mask), 0.3, kernel, slot_of(kept, "layer")).sum().backward()
        assert len(kept) == 0 and q.grad is not None
        q.grad = None
        q.requires_grad_(False)
