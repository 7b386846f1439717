"""Parameters that Megatron's layers do not know, as sharded tensors for its distributed checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


def sharded_tensors(
    tensors: Mapping[str, Tensor],
    cut: dict[str, int],
    prefix: str,
    sharded_offsets: tuple,
    metadata: dict | None,
) -> ShardedStateDict:
    """What a module's `sharded_state_dict` adds for parameters of its own.

    Args:
        tensors: by name within the module.
        cut: the dimension that tensor parallelism cuts, of those that it cuts.
        prefix, sharded_offsets, metadata: the arguments of `sharded_state_dict`, passed on.
    """
    return make_sharded_tensors_for_checkpoint(
        dict(tensors),
        prefix,
        cut,
        sharded_offsets,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_cp_group=(metadata or {}).get("dp_cp_group")
        or parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
