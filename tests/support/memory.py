"""Peak memory of a training step: a narrow model with the 8B's proportions, what its step takes, what is planned.

On CPU every tensor's storage is counted while the step runs (allocations.py), and what offload keeps in host memory is
left out, as if the rest were a device's. On CUDA it is torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from molmo2_nemo.cost.layout import Layout
from molmo2_nemo.model.config import MemoryConfig, Molmo2Config, preset
from molmo2_nemo.plan.memory import decoder_activations, fullest, head_bytes, vision_activations
from molmo2_nemo.settings.run import RunConfig, StageConfig
from tests.support.allocations import Allocations


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    model: Molmo2Config
    device: str
    dtype: torch.dtype

    @property
    def bytes_per_element(self) -> int:
        return self.dtype.itemsize


def narrow(layers: int) -> Molmo2Config:
    """The 8B's structure at a sixty-fourth of its width, with its proportions of heads and MLPs; crops of a ninth of
    the patches, and so a ninth of the visual tokens."""
    full = preset("8b")
    vision = replace(full.vision, hidden_size=16, num_heads=2, ffn_size=60, num_layers=5, feature_layers=(-2, -4))
    vision = replace(vision, image_size=126)
    return replace(
        full,
        vision=vision,
        connector=replace(full.connector, hidden_size=16, num_heads=2, ffn_size=192),
        text=replace(
            full.text,
            hidden_size=64,
            num_layers=layers,
            num_heads=4,
            num_kv_heads=1,
            head_dim=16,
            ffn_size=192,
            vocab_size=2048,
        ),
    )


def build(subject: Subject, options: MemoryConfig) -> Any:
    """The model with gradients in place, as after a first micro-batch."""
    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.model.molmo2 import Molmo2Model

    config = transformer_config(
        subject.model,
        options,
        params_dtype=subject.dtype,
        bf16=subject.dtype == torch.bfloat16,
        use_cpu_initialization=subject.device == "cpu",
    )
    model = Molmo2Model(subject.model, config, memory=options, seed=RunConfig.seed).to(subject.device).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


@contextlib.contextmanager
def counting(device: str) -> Iterator[list[int]]:
    """Yields a list that holds the peak in bytes afterwards, beyond what was there before."""
    peak: list[int] = []
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        torch.cuda.synchronize()
        peak.append(torch.cuda.max_memory_allocated() - before)
        return
    from molmo2_nemo.model import memory

    make = memory.host_buffer

    def made(size: int, pages: memory.Pages | None) -> list[torch.Tensor]:
        with counted.elsewhere():
            return make(size, pages)

    memory.host_buffer = made
    try:
        with Allocations() as counted:
            yield peak
        peak.append(counted.peak)
    finally:
        memory.host_buffer = make


def predicted(subject: Subject, options: MemoryConfig, tokens: int, crops: int) -> float | None:
    """The planner's figure for the activations of one micro-batch; None for what it does not plan with."""
    if options.offload and options.recompute != "full" or options.recompute_modules != ["mlp"]:
        return None
    layout = Layout(
        recompute=options.recompute, offload=options.offload, recompute_attention=options.recompute_attention
    )
    stage = StageConfig(residual_dropout=0.0, train_base_embedding=True)
    full, size = options.recompute == "full", subject.bytes_per_element
    _, *parts = fullest(
        decoder_activations(
            subject.model,
            layout,
            tokens,
            dropout=False,
            bytes_per_element=size,
            tiles=options.mlp_tiles,
            chunk=options.sequence_chunk,
        ),
        vision_activations(subject.model, crops, full, bytes_per_element=size, chunk=options.vision_chunk),
        head_bytes(subject.model, stage, layout, options.loss_chunk, tokens),
    )
    return sum(parts)
