"""The schema of a run: what `conf/` composes and the trainer reads. No torch here.

A stage is a config, not code: stages differ only in the values below. A recipe lists those that it goes through.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from molmo2_nemo.data.config import DataConfig, SourceConfig
from molmo2_nemo.model.config import (
    AttentionKernel,
    KernelConfig,
    LoraConfig,
    MemoryConfig,
    Molmo2Config,
    Trainable,
    TrainingOptions,
    VisualAttention,
    preset,
    trainable,
    with_options,
)
from molmo2_nemo.settings.slurm import SlurmConfig

Precision = Literal["fp32", "bf16", "fp8"]
PUBLISHED_STAGES = ("pretrain", "sft", "long")  # in their order


@dataclass
class ModelSelection:
    """Which Molmo2 a run trains, and the options of the model that it may choose."""

    preset: str = "tiny"
    visual_attention: VisualAttention = "image_tokens"
    attention: AttentionKernel = "auto"  # kernel; docs/attention.md
    float32_attention: bool = False
    rope_scaling: Literal["none", "linear", "yarn", "base"] = "none"  # for packs longer than the native range
    rope_factor: float = 1.0  # longest position over the native one; data.progression may have lower ones
    rope_base: float | None = None  # of rope_scaling=base; null: what the factor asks for

    def options(self) -> dict[str, Any]:
        """All but the preset: arguments of `with_options`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "preset"}

    def model_config(self, lora: LoraConfig | None = None) -> Molmo2Config:
        """The model, with the adapters that a stage gives it.

        Raises:
            UserError: no such preset, or options that make no sense.
        """
        return with_options(preset(self.preset), lora=lora, **self.options())


@dataclass
class GroupConfig:
    """One optimizer group: peak learning rate and linear warm-up."""

    lr: float = 1e-5
    warmup_steps: int = 200


def group(lr: float, warmup_steps: int, *parameters: str) -> Any:
    """A field of OptimConfig that is an optimizer group.

    Args:
        parameters: how the names of its parameters begin.
    """
    return field(default_factory=lambda: GroupConfig(lr, warmup_steps), metadata={"parameters": parameters})


@dataclass
class OptimConfig:
    """AdamW with a few groups of parameters, each warmed up and clipped on its own.

    A parameter belongs to the first group that names it.
    """

    vit: GroupConfig = group(5e-6, 200, "vision.")
    connector: GroupConfig = group(5e-6, 200, "connector.", "embedding.extra.")
    llm: GroupConfig = group(1e-5, 200, "")  # all others
    # Of `llm`, what stage.lora.norms and embeddings train whole; the adapters stay in `llm`. LongLoRA's rate for 7B
    beside_adapters: GroupConfig = field(default_factory=lambda: GroupConfig(2e-5, 200))
    final_lr_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-6
    weight_decay: float = 0.0
    clip_grad: float = 1.0  # L2 norm of each group separately


# The fields of OptimConfig that are groups, in the order in which they are logged -> how their parameters' names begin
OPTIMIZER_GROUPS: dict[str, tuple[str, ...]] = {
    f.name: f.metadata["parameters"] for f in fields(OptimConfig) if "parameters" in f.metadata
}
BESIDE_ADAPTERS = "beside_adapters"  # the group that only runs with stage.lora.norms or embeddings have


@dataclass
class StageConfig:
    """One stage of training."""

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
    lora: LoraConfig = field(default_factory=LoraConfig)  # rank > 0: adapters are trained, the language model is frozen

    def training_options(self) -> TrainingOptions:
        """The part of the stage's settings that the model must know: dropout and loss."""
        return TrainingOptions(self.z_loss, self.residual_dropout, self.response_residual_dropout)

    def trainable(self, model_config: Molmo2Config) -> Trainable:
        """Which parts of a model are trainable in this stage, adapters included."""
        return trainable(
            replace(model_config, lora=self.lora if self.lora.rank else None),
            vit=self.train_vit,
            connector=self.train_connector,
            llm=self.train_llm,
            base_embedding=self.train_base_embedding,
        )


@dataclass
class ParallelConfig:
    """Sizes of the process groups. Data parallel size is what is left of the processes."""

    tensor: int = 1
    sequence: bool = False  # Megatron sequence parallelism, needs tensor > 1
    context: int = 1  # ranks that share a pack
    context_ulysses: int | None = None  # of them, consecutive ones that split heads (Ulysses); default: all
    cp_comm_type: Literal["ring", "all_gather"] = "ring"  # how keys travel between Ulysses groups
    ring_balance: Literal["none", "cost"] = "none"  # tokens of a Ulysses group: a consecutive run, or as its pairs cost
    dynamic_context: bool = False  # each pack gets 1, 2, 4, ... `context` ranks, as its cost asks for
    cut_padding: bool = False  # nothing is computed for the padding behind packs; lengths then differ step by step
    context_tokens: int | None = None  # dynamic_context: most tokens of a pack that one rank has memory for
    context_crops: int | None = None  # dynamic_context: most crops; null: a static share, or any with vision_chunk
    pipeline: int = 1
    data: int = 1  # only read by the local launcher: processes = tensor * context * pipeline * data
    distributed_optimizer: bool = True
    fsdp: Literal["none", "megatron"] = "none"  # parameters and gradients sharded, too, over data and context ranks
    # Data-parallel communication beside computation; null: on GPUs, where there is any. docs/parallelism.md
    overlap_grad_reduce: bool | None = None
    overlap_param_gather: bool | None = None  # needs distributed_optimizer
    grad_reduce: Literal["fp32", "bf16"] = "fp32"  # gradients of micro-batches and ranks are added up in it

    @property
    def model_size(self) -> int:
        """Processes that one replica of the model takes."""
        return self.tensor * self.context * self.pipeline


@dataclass
class ClusterConfig:
    """Where the processes run."""

    kind: Literal["local", "slurm"] = "local"
    nodes: int = 1
    devices: int | None = None  # processes per node; default: what the layout needs
    threads: int = 1  # torch threads of a process on CPU
    precision: Precision = "fp32"  # settings/precision.py says what each means
    check_memory: bool = True  # refuse a run that does not fit here by the planner (launch/capacity.py)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)  # kind=slurm: what a stage's job asks for


@dataclass
class CheckpointConfig:
    """Which checkpoints are kept, how they are written and verified; `save_every` says how often. See
    docs/running.md."""

    keep_last: int = 2  # how many of the newest stay; two, so that there is one to fall back to
    keep_every: int | None = None  # steps; checkpoints at multiples of it are never removed
    async_save: bool = False  # train on while files are written; costs a copy of the state in host memory
    verify: bool = True  # compare files with the checksums written beside them before loading


@dataclass
class FaultConfig:
    """Steps that would spoil the model are skipped: no update, the next step takes the next packs. A run that hangs is
    ended."""

    max_in_a_row: int = 5  # skipped steps after which the run stops; 0 stops at the first
    max_total: int = 100
    spike_sigma: float | None = None  # also skip a loss or gradient norm this many standard deviations above the mean
    spike_window: int = 128  # taken steps that mean and deviation are over; nothing is a spike before half of them
    hang_seconds: float = 1200.0  # without progress on any rank after which the run ends; 0: never. docs/running.md


@dataclass
class LogConfig:
    """Where figures go besides metrics.jsonl."""

    tensorboard: bool = True
    wandb: str | None = None  # project at Weights & Biases; the package wandb must be installed
    mlflow: str | None = None  # experiment at MLflow (MLFLOW_TRACKING_URI); mlflow or mlflow-skinny must be installed
    prometheus: str | None = None  # FILE.prom for the node exporter's textfile collector, replaced after every step
    peak_tflops: float | None = None  # of one device, dense, in the run's precision; default: known GPUs, none on CPU
    profile: list[int] | None = None  # first and last step to run under PyTorch's profiler; docs/running.md
    profile_ranks: list[int] = field(default_factory=lambda: [0])  # that write a trace of them
    record_memory_history: bool = False  # who asked for GPU memory: of profiled steps, and where it runs out


@dataclass
class ValidationConfig:
    """Loss on data sets that are not trained on, without any effect on training."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)  # path matters, and weight and p_high_res if set
    every: int = 1000  # steps
    examples: int = 256  # of each data set, the same each time and under every layout


@dataclass
class EvaluationConfig:
    """Answers to tasks' questions during training, scored, without any effect on training. docs/evaluation.md"""

    tasks: list[str] = field(default_factory=list)  # names; auto: `data`, scored by its styles
    every: int = 2000  # steps; and after the last one
    limit: int | None = 100  # items (records) of each task, the same each time and under every layout; null: all
    root: str | None = None  # folder of the tasks' data sets; null: data.root
    data: str | None = None  # shards of your own, for the task auto
    frames: int | None = None  # most frames of a video; null: those of training
    depths: int = 10  # needles: places in the haystack
    max_new_tokens: int | None = None  # longest answer; null: each task's
    batch_tokens: int = 16384  # tokens of prompts that are answered together


@dataclass
class RunConfig:
    """One run of one stage."""

    output_dir: str = "runs/tiny"
    # what molmo2 pipeline goes through, each from the weights of the one before; names of files in conf/stage
    stages: list[str] = field(default_factory=lambda: list(PUBLISHED_STAGES))
    seed: int = 6198
    model: ModelSelection = field(default_factory=ModelSelection)
    data: DataConfig = field(default_factory=DataConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    init_from: str | None = None  # checkpoint of the stage before: weights only
    save_every: int = 2000  # steps
    log_every: int = 1
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    log: LogConfig = field(default_factory=LogConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def data_config(cfg: RunConfig) -> DataConfig:
    """The data settings as training uses them: visual ids begin behind the model's base rows."""
    return replace(cfg.data, vocab_size=preset(cfg.model.preset).text.vocab_size)
