"""The schema of a run: what `conf/` composes and the trainer reads. No torch here.

A stage is a config, not code: the three stages of Molmo2 differ only in the values below.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from molmo2_nemo.data.config import DataConfig


@dataclass
class ModelSelection:
    """Which Molmo2, and what about it is a choice of the run."""

    preset: str = "tiny"
    visual_attention: Literal["image_tokens", "within_image", "none"] = "image_tokens"
    float32_attention: bool = False


@dataclass
class GroupConfig:
    """One optimizer group: peak learning rate and linear warm-up."""

    lr: float = 1e-5
    warmup_steps: int = 200


@dataclass
class OptimConfig:
    """AdamW with three groups, each warmed up and clipped on its own."""

    vit: GroupConfig = field(default_factory=lambda: GroupConfig(5e-6, 200))
    connector: GroupConfig = field(default_factory=lambda: GroupConfig(5e-6, 200))
    llm: GroupConfig = field(default_factory=lambda: GroupConfig(1e-5, 200))
    final_lr_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-6
    weight_decay: float = 0.0
    clip_grad: float = 1.0  # L2 norm of each group separately


@dataclass
class StageConfig:
    """One of the three training stages."""

    name: str = "sft"
    max_steps: int = 30000
    global_batch_size: int = 128  # packs per optimizer step
    micro_batch_size: int = 2  # packs per forward pass of one data-parallel rank
    optim: OptimConfig = field(default_factory=OptimConfig)
    z_loss: float = 1e-4
    residual_dropout: float = 0.1  # on all tokens
    response_residual_dropout: float = 0.0  # on response tokens only (stage 1: 0.1, with residual_dropout 0)
    train_vit: bool = True
    train_connector: bool = True
    train_llm: bool = True
    train_base_embedding: bool = False  # the published runs freeze the base rows (and so a tied head)


@dataclass
class ParallelConfig:
    """Sizes of the process groups. Data parallel size is what is left of the processes."""

    tensor: int = 1
    sequence: bool = False  # Megatron sequence parallelism, needs tensor > 1
    context: int = 1  # Ulysses
    pipeline: int = 1
    data: int = 1  # only read by the local launcher: processes = tensor * context * pipeline * data
    distributed_optimizer: bool = True
    recompute: Literal["none", "selective", "full"] = "none"


@dataclass
class ClusterConfig:
    """Where the processes run."""

    kind: Literal["local", "slurm"] = "local"
    nodes: int = 1
    devices: int | None = None  # processes per node; default: what the layout needs
    threads: int = 1  # torch threads of a process on CPU
    precision: Literal["fp32", "bf16"] = "fp32"


@dataclass
class RunConfig:
    """One run of one stage."""

    output_dir: str = "runs/tiny"
    seed: int = 6198
    model: ModelSelection = field(default_factory=ModelSelection)
    data: DataConfig = field(default_factory=DataConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    init_from: str | None = None  # checkpoint of the stage before: weights only
    save_every: int = 2000  # steps
    log_every: int = 1
