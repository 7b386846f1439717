"""Memory options change no number: recomputation, tiled MLPs, host offload and loss chunks against the plain model."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from molmo2_nemo.model.config import LoraConfig, MemoryConfig, trainable, with_options
from tests.model.oracle import build, fixture_config, fixture_weights, micro_batches, run_schedule
from tests.model.test_lora import adapters
from tests.support.pool import start_megatron

torch.set_num_threads(1)

OPTIONS = {
    "plain": MemoryConfig(),
    "selective": MemoryConfig(recompute="selective"),
    "selective, attention": MemoryConfig(recompute="selective", recompute_modules=["core_attn"]),
    "selective, both modules": MemoryConfig(recompute="selective", recompute_modules=["core_attn", "mlp"]),
    "full": MemoryConfig(recompute="full"),
    "full with attention": MemoryConfig(recompute="full", recompute_attention=True),
    "full, not vision": MemoryConfig(recompute="full", recompute_vision=False),
    "vision only": MemoryConfig(recompute_vision=True),
    "full, one layer": MemoryConfig(recompute="full", recompute_layers=1),
    "chunks": MemoryConfig(recompute="full", sequence_chunk=20),
    "tiles": MemoryConfig(mlp_tiles=5),
    "tiles, full": MemoryConfig(recompute="full", mlp_tiles=3),
    "offload": MemoryConfig(offload=True),
    "offload, full, tiles": MemoryConfig(recompute="full", offload=True, mlp_tiles=2),
    "offload, full with attention": MemoryConfig(recompute="full", offload=True, recompute_attention=True),
    "loss chunks": MemoryConfig(loss_chunk=3),
    "vision chunks": MemoryConfig(vision_chunk=1),
}


def options_job(name: str, tensor: int) -> dict[str, dict[str, Any]]:
    """Per option: the losses, every gradient of this rank, and the bytes that went to the host."""
    start_megatron(tensor=tensor)
    config = fixture_config(name)
    weights = fixture_weights(name, config)
    found = {}
    for option, memory in OPTIONS.items():
        model = build(config, weights, memory, sequence_parallel=tensor > 1).train()
        if model.offload is not None:
            model.offload.min_bytes = 1
        losses = run_schedule(model, micro_batches(name, config), backward=True)
        found[option] = {
            "losses": torch.stack(losses),
            "grads": {n: p.main_grad.clone() for n, p in model.named_parameters()},
            "moved": model.offload.moved_bytes if model.offload is not None else 0,
            "tokens": sum(b.input_ids.numel() for b in micro_batches(name, config)),
        }
    return found


def bound_of(option: str, grad: torch.Tensor, largest: float) -> float:
    """What rounding may change of `grad`: nothing by copies. Seen were 1.4e-6, and 2.0e-6 to 4.4e-6, by processor, of
    chunks, which merge attention from parts."""
    share = {"offload": 0.0, "chunks": 1e-5}.get(option, 4e-6)
    return share * max(float(grad.abs().max()), 0.01 * largest)


def follows(got: torch.Tensor, grad: torch.Tensor, largest: float, option: str, key: str) -> None:
    bound = bound_of(option, grad, largest)
    torch.testing.assert_close(got, grad, rtol=0, atol=bound, msg=lambda words: f"{option}: {key}: {words}")


@pytest.mark.parametrize(("name", "tensor"), [("qwen3_tied", 2), ("olmo3", 1)])
def test_options_change_no_number(workers, name, tensor):
    for found in workers.run(options_job, name, tensor, ranks=tensor):
        plain = found["plain"]
        for option, got in found.items():
            # slices and recomputed parts add up the same numbers in another order
            torch.testing.assert_close(got["losses"], plain["losses"], rtol=1e-6, atol=0)
            largest = max(float(g.abs().max()) for g in plain["grads"].values())
            for key, grad in plain["grads"].items():  # key biases have gradient 0 but for rounding
                follows(got["grads"][key], grad, largest, option, key)
        text = fixture_config(name).text
        # with full recomputation one input per layer waits, [T, B, D] of this rank, and what the final norm saves;
        # and attention's results, an output [T, B, N, H] and a log-sum-exp; without, a lot more
        share = 4 * plain["tokens"] / tensor
        inputs = found["offload, full with attention"]["moved"] / (text.hidden_size * share)
        assert text.num_layers <= inputs < text.num_layers + 4
        more = found["offload, full, tiles"]["moved"] - found["offload, full with attention"]["moved"]
        assert more == text.num_layers * text.num_heads * (text.head_dim + 1) * share
        assert found["offload"]["moved"] > 2 * found["offload, full, tiles"]["moved"]


TRAINS = {  # adapters: only on the last linear layer of each MLP, so nothing in front of the first trains
    "decoder": {"llm": True},
    "adapters": {"llm": True},
    "connector": {"connector": True},
    "vit": {"vit": True},
}
OPTIONS_OF_FROZEN = (
    "plain",
    "selective",
    "tiles",
    "full",
    "full, one layer",
    "chunks",
    "offload, full, tiles",
    "vision chunks",
)


def frozen_job(trains: str, layout: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Per option: the losses, and the gradient of every parameter of this rank that trains."""
    from molmo2_nemo.training.model import freeze

    start_megatron(**layout)
    config = fixture_config("qwen3_tied")
    weights = fixture_weights("qwen3_tied", config)
    if trains == "adapters":
        lora = LoraConfig(rank=3, alpha=12.0, targets=("linear_fc2",))
        config, weights = with_options(config, lora=lora), weights | adapters("qwen3_tied", lora)
    parts = dict.fromkeys(("vit", "connector", "llm", "base_embedding"), False) | TRAINS[trains]
    found = {}
    for option in OPTIONS_OF_FROZEN:
        model = build(config, weights, OPTIONS[option], sequence_parallel="tensor" in layout).train()
        freeze(model, trainable(config, **parts))
        losses = run_schedule(model, micro_batches("qwen3_tied", config), backward=True)
        grads = {n: p.main_grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        found[option] = {"losses": losses, "grads": grads}
    return found


ALONE: dict[str, int] = {}
CASES = [(trains, ALONE) for trains in TRAINS]
CASES += [("adapters", {"tensor": 2}), ("vit", {"tensor": 2}), ("decoder", {"pipeline": 2})]


@pytest.mark.parametrize(("trains", "layout"), CASES)
def test_options_change_no_number_where_parts_are_frozen(workers, trains, layout):
    """Recomputation must reach what trains though nothing in front of it does."""
    learning = 0
    for found in workers.run(frozen_job, trains, layout, ranks=2 if layout else 1):
        plain = found["plain"]
        learning += len(plain["grads"])
        for option, got in found.items():
            for loss, expected in zip(got["losses"], plain["losses"], strict=True):
                torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
            assert got["grads"].keys() == plain["grads"].keys()
            largest = max((float(g.abs().max()) for g in plain["grads"].values()), default=0.0)
            for key, grad in plain["grads"].items():
                if not key.endswith("k_proj.bias"):  # softmax does not see a shift of the keys
                    assert bool(got["grads"][key].any()), f"{option}: {key} gets no gradient"
                follows(got["grads"][key], grad, largest, option, key)
    assert learning


def waiting_job(links: int, elements: int) -> list[int]:
    """Peak bytes of a chain of so many operations without and with offload, as the benchmark counts them."""
    from molmo2_nemo.model.memory import HostOffload
    from tests.support.memory import counting

    found = []
    for offload in (None, HostOffload(min_bytes=1)):
        start = torch.linspace(0, 1, elements, requires_grad=True)
        with counting("cpu") as peak:
            with offload.active(keep=[start]) if offload else contextlib.nullcontext():
                end = start
                for _ in range(links):
                    end = end.sin()
            end.backward(torch.ones_like(end))
        found.append(peak[0])
    return found


def test_what_waits_on_the_host_is_not_the_devices(workers):
    """A link saves its input; with offload only those on their way back are there, and the gradients at work."""
    elements = 1 << 16
    kept, offloaded = workers.run(waiting_job, 30, elements)[0]
    assert kept >= 30 * 4 * elements
    assert offloaded <= 8 * 4 * elements
