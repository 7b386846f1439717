"""Prints, as JSON, the bytes that one decoder layer and one vision block of every model keep for backward, and those
that its head needs, counted by PyTorch's allocator. For a process with a GPU, virtual or real."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.memory import start
from benchmarks.train_step import with_layers
from molmo2_nemo.fused.choice import choose
from molmo2_nemo.model.config import KernelConfig, MemoryConfig, Molmo2Config, TrainingOptions, preset
from molmo2_nemo.nemo.start import start_nemo
from molmo2_nemo.processes import quiet
from tests.support.batches import Shapes, batch

TOKENS, CROPS, CHUNK = 8192, 16, 1024
MODELS = ("4b", "8b", "o7b")
DROPOUT = TrainingOptions(z_loss=1e-4, residual_dropout=0.1, response_residual_dropout=0.0)


def kept_by(modules: nn.ModuleList, run: Callable[[], object]) -> int:
    """Bytes asked of the allocator, less those given back, from the second module's call to the third's."""
    at: list[int] = []

    def look(*_: object) -> None:
        at.append(torch.cuda.memory_stats()["requested_bytes.all.current"])

    handles = [module.register_forward_pre_hook(look) for module in modules[1:3]]
    gc.collect()  # now, and not while it is counted: the models before this one are in cycles
    gc.disable()
    result = run()  # kept alive, and with it what backward needs
    gc.enable()
    for handle in handles:
        handle.remove()
    del result
    return at[1] - at[0]


def head(model_config: Molmo2Config, way: str) -> int:
    """Most bytes beside the gradient of hidden while a trained head's loss and gradients are computed, in chunks."""
    text = model_config.text
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda", "requires_grad": True}
    hidden, weight = (
        torch.empty(TOKENS, text.hidden_size, **options),
        torch.empty(text.vocab_size, text.hidden_size, **options),
    )
    labels, weights = torch.zeros(TOKENS, dtype=torch.int64, device="cuda"), torch.ones(TOKENS, device="cuda")
    loss = choose("loss", way, "cuda", torch.bfloat16).function
    group = torch.distributed.group.WORLD
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = loss(hidden, weight, labels, weights, 1e-4, text.vocab_size, group, CHUNK)
    torch.autograd.grad(result, (hidden, weight))
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before - 2 * hidden.numel()


def count(model_config: Molmo2Config, kernels: KernelConfig) -> dict[str, float]:
    """Bytes per token of a layer (of a pack of many examples, of one whole video), per patch of a block; of a head."""
    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.model.inputs import PackInputs
    from molmo2_nemo.model.molmo2 import Molmo2Model

    memory = MemoryConfig(recompute="none")
    config = transformer_config(model_config, memory, params_dtype=torch.bfloat16, bf16=True)
    model = Molmo2Model(model_config, config, memory=memory, training=DROPOUT, kernels=kernels, seed=None)
    model = model.cuda().train()
    shapes = Shapes(model_config)
    packs = [shapes.mixed(np.random.default_rng(0), TOKENS, CROPS)]
    inputs = PackInputs.from_batch(batch(packs, TOKENS, model_config), torch.device("cuda", 0))
    crops = inputs.crops[:CROPS]
    patches = len(crops) * model_config.vision.num_patches
    video = PackInputs.from_batch(batch([shapes.videos(TOKENS, TOKENS)], TOKENS, model_config), inputs.crops.device)
    return {
        "layer": kept_by(model.decoder.layers, lambda: model(inputs).loss) / TOKENS,
        "layer of a video": kept_by(model.decoder.layers, lambda: model(video).loss) / TOKENS,
        "head": head(model_config, kernels.loss),
        "block": kept_by(model.vision.blocks, lambda: model.vision(crops)) / patches,
    }


def main() -> None:
    quiet()
    start_nemo()
    start()
    found = {
        f"{name} {kind}": count(with_layers(preset(name), 3), kernels)
        for name in MODELS
        for kind, kernels in (
            ("fused", KernelConfig()),
            ("plain", KernelConfig(**dict.fromkeys(vars(KernelConfig()), "plain"))),
        )
    }
    print(f"\ncounted {json.dumps(found)}")


if __name__ == "__main__":
    main()
