"""Random states as a function of (seed, step, rank), so that resuming needs none of them in the checkpoint."""

from __future__ import annotations

import hashlib

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


def seed_step(seed: int, step: int) -> None:
    """Set this rank's random states for one step.

    Ranks of one tensor-parallel group share the default generator (replicated activations need equal dropout) and get
    different ones for their sequence shards, as Megatron has it; data, context and pipeline ranks all differ.

    Args:
        seed: of the run.
        step: optimizer steps done before this one.
    """
    rank = (
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    digest = hashlib.sha256(repr((seed, step, rank)).encode()).digest()
    own = int.from_bytes(digest[:4], "little") >> 1
    torch.default_generator.manual_seed(own)  # torch.manual_seed also queues a call for devices that are not there
    model_parallel_cuda_manual_seed(own)
