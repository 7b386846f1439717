"""Dynamic context parallelism of a run: its settings, and the hardware and kernel that packs are weighed for."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from molmo2_nemo.attention.kernels import choose
from molmo2_nemo.cost.context import ContextCost
from molmo2_nemo.cost.efficiency import EFFICIENCIES, SAME_EFFICIENCY, Efficiency
from molmo2_nemo.cost.hardware import Device, device_called
from molmo2_nemo.cost.layout import Layout
from molmo2_nemo.cost.step import DEFAULT_DEVICE, StepCost
from molmo2_nemo.fused import choice
from molmo2_nemo.model.config import KernelConfig, MemoryConfig, Molmo2Config
from molmo2_nemo.parallel.dynamic import DynamicContext
from molmo2_nemo.settings.layout import crop_limit
from molmo2_nemo.settings.precision import element_bytes, token_multiple
from molmo2_nemo.settings.run import ParallelConfig, Precision, StageConfig

GPUS_PER_NODE = 8  # where the launcher does not say


@dataclass
class DynamicSettings:
    """The settings of a run that decide how packs are assigned."""

    parallel: ParallelConfig
    memory: MemoryConfig
    stage: StageConfig
    max_crops: int  # of a pack
    precision: Precision = "fp32"
    kernels: KernelConfig = field(default_factory=KernelConfig)


def dynamic_context(settings: DynamicSettings, model_config: Molmo2Config) -> DynamicContext:
    """This rank's part in the assignment of packs, once the process groups exist. Rank 0 prints what had to be
    guessed."""
    parallel = settings.parallel
    assert parallel.context_tokens is not None, "settings/checks.py asks for it"
    cost, guesses = context_cost(settings, model_config)
    if dist.get_rank() == 0:
        for guess in guesses:
            print(f"dynamic context: {guess}", flush=True)
    return DynamicContext(
        cost,
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_context_parallel_rank(),
        parallel.context_tokens,
        crop_limit(parallel, settings.max_crops, settings.memory.vision_chunk),
        (parallel.tensor if parallel.sequence else 1) * token_multiple(settings.precision),
    )


def context_cost(settings: DynamicSettings, model_config: Molmo2Config) -> tuple[ContextCost, list[str]]:
    """What packs are weighed by on this machine, and one sentence for everything about it that had to be guessed."""
    parallel, memory = settings.parallel, settings.memory
    guesses: list[str] = []
    device = this_device(guesses)
    step = StepCost(
        model_config,
        settings.stage.trainable(model_config),
        device,
        int(os.environ.get("LOCAL_WORLD_SIZE", GPUS_PER_NODE)) if torch.cuda.is_available() else GPUS_PER_NODE,
        this_efficiency(settings, model_config, guesses),
        memory,
        element_bytes(settings.precision),
        fp8=settings.precision == "fp8",
    )
    selective = memory.recompute == "selective" and "mlp" not in memory.recompute_modules
    layout = Layout(
        tensor=parallel.tensor,
        recompute="none" if selective else memory.recompute,
        cp_comm_type=parallel.cp_comm_type,
        recompute_attention=memory.recompute_attention,
        ring_balance=parallel.ring_balance,
    )
    return ContextCost(step, layout, parallel.context_ulysses), guesses


def this_device(guesses: list[str]) -> Device:
    """This process's GPU, or the default's figures."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    device = device_called(name)
    if device is None:
        guesses.append(
            f"nothing is known of the speed of {name}; packs are assigned to ranks as an "
            f"{DEFAULT_DEVICE.name.upper()} would take for them"
        )
    return device or DEFAULT_DEVICE


def this_efficiency(settings: DynamicSettings, model_config: Molmo2Config, guesses: list[str]) -> Efficiency:
    """The efficiency of the attention kernel that runs here, or of the nearest one with public figures."""
    parallel = settings.parallel
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if settings.precision == "fp32" else torch.bfloat16
    kernel = choose(
        model_config.attention,
        device,
        dtype,
        model_config.text.head_dim,
        merged=parallel.context_ulysses not in (None, parallel.context),
        library=choice.choose("flash", settings.kernels.flash, device, dtype).function,
    )
    if kernel.implementation in EFFICIENCIES:
        return EFFICIENCIES[kernel.implementation]
    known = SAME_EFFICIENCY[kernel.implementation]
    if torch.cuda.is_available():  # otherwise the sentence about the device covers it
        guesses.append(f"nothing is known of the speed of {kernel.title}; attention counts as {known}")
    return EFFICIENCIES[known]
