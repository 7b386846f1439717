"""What to change when memory runs out: the settings not in use yet, cheapest first. No torch here."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from molmo2_nemo.model.config import CANNOT_MERGE
from molmo2_nemo.settings.checks import find_problems
from molmo2_nemo.settings.layout import crop_limit
from molmo2_nemo.settings.run import RunConfig
from molmo2_nemo.settings.sizes import wanted_processes

Overrides = dict[str, Any]
CHUNK = 4096  # tokens: enough for matrix products to be efficient

# Besides torch.OutOfMemoryError and MemoryError: how PyTorch's host allocator, CUDA, cuBLAS and NCCL put it.
HOST = "can't allocate memory"
DEVICE = re.compile(r"CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|Cuda failure 2 'out of memory'")


def advice(error: BaseException, cfg: RunConfig, rank: int = 0, snapshot: Path | None = None) -> str | None:
    """One line for the user about an error, with what is left to try; None if the error is not about memory.

    Args:
        snapshot: where the process wrote what the GPU's memory held (training/memory_history.py).
    """
    on_host = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and HOST in str(error))
    on_device = type(error).__name__ == "OutOfMemoryError" or DEVICE.search(str(error)) is not None
    if not on_host and not on_device:
        return None
    where = "host" if on_host and not on_device else "GPU"
    found = remedies(cfg, offload=where == "GPU")
    if where == "host" and cfg.data.num_workers > 0:
        found.insert(0, f"data.num_workers={cfg.data.num_workers // 2} (copies of the loader)")
    seen = re.split(r"(?<=[A-Za-z])\. |\n", str(error).strip())
    said = ". ".join(part for part in seen[:2] if part) or type(error).__name__
    held = ""
    if snapshot and where == "GPU":
        held = f". What the memory held: {snapshot}, which molmo2 report draws"
        held += "" if cfg.log.record_memory_history else "; with log.record_memory_history=true also by whom"
    return (
        f"process {rank} ran out of {where} memory ({said}). What is left to try, cheapest first: {'; '.join(found)}. "
        "`molmo2 plan` with the same settings shows what each layout needs; docs/memory.md, what each setting costs"
        f"{held}"
    )


def remedies(cfg: RunConfig, *, offload: bool = True) -> list[str]:
    """Overrides that save memory and are not set, those that cost least first, with what they cost.

    Each has passed the checks before a run: what they refuse is not suggested.
    """
    memory, parallel = cfg.memory, cfg.parallel
    known: tuple[tuple[bool, Overrides, str], ...] = (
        (cfg.stage.micro_batch_size > 1, {"stage.micro_batch_size": 1}, ""),
        (not parallel.distributed_optimizer, {"parallel.distributed_optimizer": True}, ""),
        (memory.loss_chunk > 256, {"memory.loss_chunk": 256}, ""),
        (
            memory.vision_chunk is None,
            {"memory.vision_chunk": 16},
            "the encoder is recomputed in the backward pass",
        ),
        (
            memory.recompute_vision is False,
            {"memory.recompute_vision": True},
            "the encoder's blocks are recomputed",
        ),
        (memory.mlp_tiles == 1, {"memory.mlp_tiles": 8}, "MLPs are recomputed"),
        (
            memory.recompute != "full" or memory.recompute_layers is not None,
            {"memory.recompute": "full", "memory.recompute_layers": None},
            "every layer is recomputed",
        ),
        (
            memory.keeps_attention and cfg.model.attention not in CANNOT_MERGE,
            {"memory.recompute_attention": True},
            "attention is recomputed",
        ),
        (
            memory.sequence_chunk is None,
            {"memory.recompute": "full", "memory.recompute_layers": None, "memory.sequence_chunk": CHUNK},
            "every layer works on so many tokens at a time",
        ),
        (parallel.fsdp == "none", {"parallel.fsdp": "megatron"}, "parameters are gathered layer by layer"),
        (offload and not memory.offload, {"memory.offload": True}, "copies to and from the host"),
        (offload and not memory.optimizer_offload, {"memory.optimizer_offload": True}, "AdamW on the host"),
    )
    found = [_text(values, note) for open_, values, note in known if open_ and not _refused(cfg, values)]
    found += _less_of_a_pack(cfg)
    where = "this changes the packs; once there is a checkpoint it needs another output_dir"
    return [*found, f"smaller data.packing.sequence_length and data.packing.max_crops ({where})"]


def _less_of_a_pack(cfg: RunConfig) -> list[str]:
    """Settings that give a rank a smaller part of a pack: under dynamic context parallelism lower limits, where they
    are above a static share; else more ranks for each pack."""
    parallel, packing = cfg.parallel, cfg.data.packing
    if parallel.dynamic_context:
        limits = (
            ("tokens", parallel.context_tokens, packing.sequence_length, parallel.context),
            (
                "crops",
                crop_limit(parallel, packing.max_crops, cfg.memory.vision_chunk),
                packing.max_crops,
                parallel.context * parallel.tensor,
            ),
        )
        lower = [
            ({f"parallel.context_{what}": max(limit // 2, -(-full // ranks))}, f"packs of more {what} get more ranks")
            for what, limit, full, ranks in limits
            if limit is not None and limit > -(-full // ranks)
        ]
        if found := [_text(values, note) for values, note in lower if not _refused(cfg, values)]:
            return found
    for values, processes in _wider(cfg):
        if not _refused(cfg, values, processes):
            more = f"; takes {processes} processes" if processes != wanted_processes(cfg) else ""
            return [_text(values, f"{2 * parallel.context} ranks share a pack{more}")]
    return []


def _wider(cfg: RunConfig) -> Iterator[tuple[Overrides, int]]:
    """Settings with twice the ranks for each pack, and how many processes they take: as many as before, if replicas can
    be halved. Where heads cannot be sharded over so many, the new ranks form a ring instead."""
    parallel, packing = cfg.parallel, cfg.data.packing
    values: Overrides = {"parallel.context": 2 * parallel.context}
    if parallel.dynamic_context:
        values["parallel.context_tokens"] = -(-packing.sequence_length // (2 * parallel.context))
        if parallel.context_crops is not None:
            shards = 2 * parallel.context * parallel.tensor
            values["parallel.context_crops"] = -(-packing.max_crops // shards)
    processes = wanted_processes(cfg)
    options = [(values, processes), (values, 2 * processes)]
    if cfg.cluster.devices is None:  # parallel.data says how many there are
        halved = {**values, "parallel.data": parallel.data // 2}
        options = [(halved, processes)] if parallel.data % 2 == 0 else [(values, 2 * processes)]
    for values, count in options:
        yield values, count
        yield {**values, "parallel.context_ulysses": parallel.context_ulysses or parallel.context}, count


def _refused(cfg: RunConfig, values: Overrides, processes: int | None = None) -> bool:
    """Whether the run's checks find something wrong with the settings that was not wrong before."""
    changed = copy.deepcopy(cfg)
    for name, value in values.items():
        group, key = name.split(".")
        setattr(getattr(changed, group), key, value)
    processes = wanted_processes(cfg) if processes is None else processes
    before = set(find_problems(cfg, files=False))
    return bool(set(find_problems(changed, processes, files=False)) - before)


def _text(values: Overrides, note: str) -> str:
    """Settings as on the command line, with a note in brackets."""
    settings = " ".join(f"{name}={json.dumps(value).strip(chr(34))}" for name, value in values.items())
    return f"{settings} ({note})" if note else settings
