"""What of a run's settings will not come to bear, although the run works. No torch here."""

from __future__ import annotations

from collections.abc import Iterator

from molmo2_nemo.model.config import MemoryConfig
from molmo2_nemo.settings.run import RunConfig


def remarks(cfg: RunConfig) -> Iterator[str]:
    """What is said as a run starts, one line for each; of settings that checks.py passes."""
    parallel, packing = cfg.parallel, cfg.data.packing
    yield from phases_not_reached(cfg)
    yield from memory_without_effect(
        cfg.memory,
        length=packing.sequence_length,
        crops=packing.max_crops,
        context=1 if parallel.dynamic_context else parallel.context,  # of dynamic groups the smallest is one rank
        micro_batch=cfg.stage.micro_batch_size,
    )


def phases_not_reached(cfg: RunConfig) -> Iterator[str]:
    """Phases of `data.progression`, and the full packs behind them, that begin when the stage has ended."""
    data, last = cfg.data, cfg.stage.max_steps
    starts = [0, *(phase.until_step for phase in data.progression)]
    names = [*(f"data.progression[{i}]" for i in range(len(data.progression))), "data.packing"]
    lengths = [*(phase.sequence_length for phase in data.progression), data.packing.sequence_length]
    late = [
        f"{name} (packs of {length:,} tokens, after step {start:,})"
        for name, length, start in zip(names, lengths, starts, strict=True)
        if start >= last > 0
    ]
    if late:
        reached = lengths[len(lengths) - len(late) - 1]
        yield (
            f"{' and '.join(late)} {'is' if len(late) == 1 else 'are'} never reached: the stage ends with step "
            f"{last:,} (stage.max_steps), on packs of {reached:,}; raise stage.max_steps, or lower until_step"
        )


def memory_without_effect(
    memory: MemoryConfig, *, length: int, crops: int, context: int, micro_batch: int
) -> Iterator[str]:
    """Sizes of parts that no pack is larger than.

    Args:
        length: tokens of a pack.
        crops: that a pack may have.
        context: ranks that share a pack.
        micro_batch: packs.
    """
    crops, tokens, mine = crops * micro_batch, length * micro_batch, length // context
    if memory.vision_chunk is not None and memory.vision_chunk >= crops:
        yield f"memory.vision_chunk={memory.vision_chunk} has no effect: a micro-batch has at most {crops:,} crops"
    if memory.sequence_chunk is not None and memory.sequence_chunk >= mine:
        yield (
            f"memory.sequence_chunk={memory.sequence_chunk} saves nothing in this layout: a context rank has {mine:,} "
            "tokens of a pack"
        )
    if memory.loss_chunk != MemoryConfig().loss_chunk and memory.loss_chunk >= tokens:
        yield f"memory.loss_chunk={memory.loss_chunk} has no effect: a micro-batch has {tokens:,} tokens"
