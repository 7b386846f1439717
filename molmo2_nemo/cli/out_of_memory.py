"""What to change when memory runs out: the settings that are not in use yet, cheapest first. No torch here."""

from __future__ import annotations

import re

from molmo2_nemo.config import RunConfig

# Besides torch.OutOfMemoryError and MemoryError: how PyTorch's host allocator, CUDA, cuBLAS and NCCL put it.
HOST = "can't allocate memory"
DEVICE = re.compile(r"CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|Cuda failure 2 'out of memory'")


def explain(error: BaseException, cfg: RunConfig, rank: int = 0) -> str | None:
    """One line for the user; None where the error is about something else."""
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
    return (
        f"process {rank} ran out of {where} memory ({said}). What is left to try, cheapest first: {'; '.join(found)}. "
        "`molmo2 plan` with the same settings says what each layout needs; docs/memory.md says what each setting costs"
    )


def remedies(cfg: RunConfig, *, offload: bool = True) -> list[str]:
    """Overrides that save memory and are not set, those that cost least first, with what they cost."""
    memory, parallel = cfg.memory, cfg.parallel
    ranks = 2 * parallel.context
    known = (
        (cfg.stage.micro_batch_size > 1, "stage.micro_batch_size=1"),
        (not parallel.distributed_optimizer, "parallel.distributed_optimizer=true"),
        (memory.loss_chunk > 256, "memory.loss_chunk=256"),
        (memory.vision_chunk is None, "memory.vision_chunk=16 (crops are encoded twice)"),
        (memory.mlp_tiles == 1, "memory.mlp_tiles=8 (MLPs run twice)"),
        (
            memory.recompute != "full" or memory.recompute_layers is not None,
            "memory.recompute=full memory.recompute_layers=null (every layer runs twice)",
        ),
        (offload and not memory.offload, "memory.offload=true (copies to and from the host)"),
        (True, f"parallel.context={ranks} ({ranks} ranks share a pack)"),
        (True, "smaller data.packing.sequence_length and data.packing.max_crops (other packs are trained on)"),
    )
    return [text for open_, text in known if open_]
