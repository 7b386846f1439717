"""Problems of `memory.*` with each other, the layout and the packs, found before anything starts. No torch here."""

from __future__ import annotations

from collections.abc import Iterator

from molmo2_nemo.data.phases import phases
from molmo2_nemo.errors import UserError
from molmo2_nemo.model.config import CANNOT_MERGE, Molmo2Config
from molmo2_nemo.settings.run import RunConfig


def memory_problems(cfg: RunConfig, model_config: Molmo2Config | None) -> Iterator[str]:
    """What cannot work of recomputation, of layers in chunks and of an optimizer on the host, one line for each."""
    yield from _recompute(cfg, model_config)
    yield from _sequence_chunk(cfg)
    yield from _optimizer_offload(cfg)


def _recompute(cfg: RunConfig, model_config: Molmo2Config | None) -> Iterator[str]:
    memory, stages = cfg.memory, cfg.parallel.pipeline
    try:
        memory.check()
    except UserError as error:
        yield str(error)
        return
    if memory.recompute_layers is None or model_config is None or stages < 1:
        return
    built = model_config.text.num_layers // stages
    if memory.recompute_layers > built:
        yield (
            f"memory.recompute_layers={memory.recompute_layers}: a pipeline stage of the {model_config.name} model has "
            f"only {built}; take fewer, or null for all"
        )


def _sequence_chunk(cfg: RunConfig) -> Iterator[str]:
    chunk, parallel = cfg.memory.sequence_chunk, cfg.parallel
    if chunk is None or chunk < 1:
        return
    if cfg.model.attention in CANNOT_MERGE:
        yield (
            f"model.attention={cfg.model.attention} has no backward pass of its own, which memory.sequence_chunk="
            f"{chunk} needs to add up gradients of keys over chunks; use model.attention=auto, or "
            "memory.sequence_chunk=null"
        )
    if parallel.sequence and parallel.tensor > 1 and chunk % parallel.tensor:
        multiple = -(-chunk // parallel.tensor) * parallel.tensor
        yield (
            f"memory.sequence_chunk={chunk}: {parallel.tensor} tensor-parallel ranks share a chunk "
            f"(parallel.sequence=true) and do not divide it; {multiple} they do"
        )
    longest = max(phase.packing.sequence_length for phase in phases(cfg.data))
    if chunk >= longest:
        yield (
            f"memory.sequence_chunk={chunk} has no effect: packs have {longest} tokens (data.packing.sequence_length); "
            "set a smaller chunk, or memory.sequence_chunk=null"
        )


def _optimizer_offload(cfg: RunConfig) -> Iterator[str]:
    """Megatron's optimizer on the host is part of its distributed one, and makes fp32 copies of bf16 parameters."""
    for key, value, needed in (
        ("cluster.precision", cfg.cluster.precision, "bf16"),
        ("parallel.distributed_optimizer", str(cfg.parallel.distributed_optimizer).lower(), "true"),
    ):
        if cfg.memory.optimizer_offload and value != needed:
            yield (
                f"memory.optimizer_offload=true with {key}={value}: Megatron keeps its distributed optimizer's fp32 "
                f"copies of bf16 parameters on the host; set {key}={needed}, or memory.optimizer_offload=false"
            )
