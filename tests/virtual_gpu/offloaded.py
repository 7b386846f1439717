"""Prints, as JSON, what offload pins of the host's memory for two micro-batches of the 4B at full width. For a process
with a GPU, virtual or real."""

from __future__ import annotations

import json

import numpy as np
import torch

from benchmarks.memory import start
from benchmarks.train_step import with_layers
from molmo2_nemo.model.config import MemoryConfig, preset
from molmo2_nemo.nemo.start import start_nemo
from molmo2_nemo.processes import quiet
from tests.support.batches import Shapes, batch

TOKENS, CROPS, LAYERS = 36864, 9, 2


def pinned(kind: str = "current") -> int:
    """Bytes that PyTorch's allocator of pinned memory holds (peak: has held at most)."""
    return torch.cuda.host_memory_stats()[f"allocated_bytes.{kind}"]


def main() -> None:
    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.model.inputs import PackInputs
    from molmo2_nemo.model.molmo2 import Molmo2Model

    quiet()
    start_nemo()
    start()
    memory = MemoryConfig(recompute="full", offload=True)
    model_config = with_layers(preset("4b"), LAYERS)
    config = transformer_config(model_config, memory, params_dtype=torch.bfloat16, bf16=True)
    model = Molmo2Model(model_config, config, memory=memory, seed=None).cuda().train()
    packs = [Shapes(model_config).mixed(np.random.default_rng(0), TOKENS, CROPS)]
    inputs = PackInputs.from_batch(batch(packs, TOKENS, model_config), torch.device("cuda", 0))
    torch._C._host_emptyCache()
    before, found = pinned(), []
    for _ in range(2):
        loss = model(inputs).loss
        found.append({"used": model.offload.pages.used, "held": model.offload.pages.held})
        loss.backward()
        del loss
    counted = {"steps": found, "moved": model.offload.moved_bytes, "pinned": pinned("peak") - before}
    counted["left"] = model.offload.pages.used
    model.offload.pages.release()
    print(f"\ncounted {json.dumps(counted | {'after release': pinned() - before})}")


if __name__ == "__main__":
    main()
