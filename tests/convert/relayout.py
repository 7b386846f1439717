"""Run under torchrun by test_layouts.py: load a checkpoint into the real model under one layout, save it again.

Arguments: source checkpoint, target folder, tensor-parallel size, pipeline-parallel size.
"""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path

from molmo2_nemo.parallel import platform

platform.enable(1)

import torch  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402

platform.enable_megatron()

from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402

from molmo2_nemo.convert.checkpoints import read_model_file  # noqa: E402
from molmo2_nemo.model.decoder import transformer_config  # noqa: E402
from molmo2_nemo.model.molmo2 import Molmo2Model  # noqa: E402


def main(source: Path, target: Path, tensor: int, pipeline: int) -> None:
    """Load, spoil nothing, save."""
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor, pipeline)
    model_parallel_cuda_manual_seed(1)
    molmo2 = read_model_file(source)
    assert molmo2 is not None
    config = transformer_config(
        molmo2,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
    )
    model = Molmo2Model(
        molmo2,
        config,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    state = dist_checkpointing.load(model.sharded_state_dict(prefix="module."), str(source / "weights"))
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    if torch.distributed.get_rank() == 0:
        target.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(model.sharded_state_dict(prefix="module."), str(target))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":  # the checkpoint writer starts processes that import this file again
    faulthandler.dump_traceback_later(120, exit=True)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
