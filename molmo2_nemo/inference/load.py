"""A checkpoint -> a model that answers, on this process alone or on the ranks of a layout."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo2_nemo import cpu
from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.errors import UserError
from molmo2_nemo.inference.prompt import Shown
from molmo2_nemo.settings.run import ParallelConfig

if TYPE_CHECKING:
    from molmo2_nemo.convert.megatron_io import MegatronCheckpoint
    from molmo2_nemo.model.config import Molmo2Config


VISION_CHUNK = 128  # crops encoded together at most


@dataclass(frozen=True)
class Opened:
    """What a checkpoint says of itself, before its weights are read."""

    model_config: Molmo2Config
    tensors: MegatronCheckpoint
    data: DataConfig
    tokenizer: Molmo2Tokenizer


def opened(checkpoint: Path, shown: Shown | None = None) -> Opened:
    """A checkpoint's model, data settings (with what `shown` replaces) and tokenizer.

    Args:
        checkpoint: written under any layout.

    Raises:
        UserError: not a Molmo2 checkpoint, or no tokenizer.
    """
    from molmo2_nemo.convert.checkpoints import find_tokenizer, model_of, run_settings
    from molmo2_nemo.convert.megatron_io import MegatronCheckpoint

    tensors = MegatronCheckpoint(checkpoint)
    run = run_settings(checkpoint)
    model_config = model_of(checkpoint, tensors, run)
    tensors.check(model_config)
    tokenizer = find_tokenizer(checkpoint, model_config, run, None)
    if tokenizer is None:
        raise UserError(f"{checkpoint}: no tokenizer found; put tokenizer.json into {checkpoint / 'tokenizer'}")
    data = (shown or Shown()).settings(trained_data(checkpoint, model_config, run))
    return Opened(model_config, tensors, data, tokenizer)


def load(
    checkpoint: Path, shown: Shown | None = None, layout: ParallelConfig | None = None
) -> tuple[Any, ExampleBuilder, Molmo2Tokenizer]:
    """Model in evaluation mode, example builder and tokenizer of a checkpoint.

    Args:
        checkpoint, shown: see `opened`.
        layout: that the model gets here; default: this process alone.

    Raises:
        UserError: see `opened`; or a layout that the model does not have.
    """
    found = opened(checkpoint, shown)
    model = build_model(found.model_config, found.tensors, layout)
    return model, ExampleBuilder(found.data, found.tokenizer, training=False), found.tokenizer


def trained_data(checkpoint: Path, model_config: Any, run: dict[str, Any]) -> DataConfig:
    """How a checkpoint's run read its data, with the wordings that the run's folder has a copy of.

    Args:
        run: from `run_settings`.
    """
    from molmo2_nemo.convert.checkpoints import data_of
    from molmo2_nemo.rundir.config_file import run_of_checkpoint, use_kept_templates

    data = data_settings(run) or data_of(checkpoint, model_config, run)
    stage = run_of_checkpoint(checkpoint)
    if stage is not None:
        use_kept_templates(data.text, stage.resolve().parent)
    return data


def data_settings(run: dict[str, Any]) -> DataConfig | None:
    """The data settings of a run's config.yaml; None where there are none."""
    from molmo2_nemo.settings.schema import structure

    return structure(DataConfig, run["data"]) if run.get("data") else None


def build_model(model_config: Any, tensors: Any, layout: ParallelConfig | None = None) -> Any:
    """This rank's part of a Molmo2Model, filled from a checkpoint."""
    layout = layout or ParallelConfig()
    start_processes(layout)
    import torch

    from molmo2_nemo.model.config import MemoryConfig
    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.model.init import load_canonical
    from molmo2_nemo.model.molmo2 import Molmo2Model
    from molmo2_nemo.parallel.context import ContextSettings

    config = transformer_config(
        model_config,
        params_dtype=torch.float32 if cpu.is_cpu_only() else torch.bfloat16,
        use_cpu_initialization=cpu.is_cpu_only(),
        tensor_model_parallel_size=layout.tensor,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence,
    )
    context = ContextSettings(layout.context_ulysses, layout.cp_comm_type)
    memory = MemoryConfig(vision_chunk=VISION_CHUNK)
    model = Molmo2Model(model_config, config, memory=memory, context=context, seed=None)
    load_canonical(model, tensors.read)
    return model.eval() if cpu.is_cpu_only() else model.cuda().eval()


def start_processes(layout: ParallelConfig) -> None:
    """Process groups of a layout, unless there are groups: of the processes that a launcher has started, or of this one
    alone."""
    cpu.enable()
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    cpu.enable_megatron()
    if not dist.is_initialized():
        backend = "gloo" if cpu.is_cpu_only() else "nccl"
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            if not cpu.is_cpu_only():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(layout.tensor, context_parallel_size=layout.context)
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(0)


def start_single_process() -> None:
    """Process groups of size one, unless this process already has groups."""
    start_processes(ParallelConfig())
