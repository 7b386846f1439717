"""What a Molmo2 is made of: typed sizes, and the presets: `tiny`, and the sizes of every family (`4b`, `8b`, `o7b`).

No torch here: configs are read by the command line, the planner and the converters before any model exists.
Language models are described in families/. Sizes follow the published checkpoints
(https://huggingface.co/allenai/Molmo2-8B and its siblings).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from molmo2_nemo.errors import UserError
from molmo2_nemo.model.families import FAMILIES
from molmo2_nemo.model.families.base import TextConfig, YarnConfig

EXTRA_VOCAB_SIZE = 128  # rows after the base vocabulary; the visual special tokens live in the first of them


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP2-style vision transformer over flattened patches; no class token, no final norm."""

    image_size: int = 378  # crop side, pixels
    patch_size: int = 14
    hidden_size: int = 1152
    num_heads: int = 16
    ffn_size: int = 4304
    num_layers: int = 27  # depth of the source checkpoint; blocks after the deepest feature layer are not built
    feature_layers: tuple[int, ...] = (-3, -9)  # block outputs to concatenate, counted on num_layers, in this order
    layernorm_eps: float = 1e-6
    initializer_range: float = 0.02
    # Compute attention in fp32 whatever the parameter dtype. An option of vision and connector only: the published code
    # has the same flag for the language model, but nothing there reads it.
    float32_attention: bool = False

    @property
    def grid(self) -> int:
        """Patches per side of a crop."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def patch_dim(self) -> int:
        return self.patch_size**2 * 3

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def feature_indices(self) -> tuple[int, ...]:
        """0-based blocks whose outputs are the features, in concatenation order (published: 24, 18)."""
        return tuple(i if i >= 0 else self.num_layers + i for i in self.feature_layers)

    @property
    def num_built_layers(self) -> int:
        """Blocks that are really built (published: 25 of 27)."""
        return max(self.feature_indices) + 1

    @property
    def feature_size(self) -> int:
        return self.hidden_size * len(self.feature_layers)


@dataclass(frozen=True)
class ConnectorConfig:
    """Masked-mean-query attention pooling, then a SwiGLU projector into the language model's width."""

    hidden_size: int = 1152
    num_heads: int = 16
    ffn_size: int = 12288
    initializer_range: float = 0.02  # as published
    float32_attention: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen linear layers of the language model. Rank 0: none."""

    rank: int = 0
    alpha: float = 32.0  # what an adapter adds is multiplied by alpha / rank
    targets: tuple[str, ...] = LORA_TARGETS  # some of LORA_TARGETS, Megatron's names
    # Trained whole beside the adapters, which adapters need to reach longer contexts (LongLoRA, arXiv 2309.12307)
    norms: bool = False  # the language model's norms, those of queries and keys included
    embeddings: bool = False  # the base rows of the embedding, and the head where it is tied to them

    @property
    def beside(self) -> tuple[str, ...]:
        """What is trained beside the adapters: names of fields."""
        return tuple(name for name in ("norms", "embeddings") if getattr(self, name))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


VisualAttention = Literal["image_tokens", "within_image", "none"]
AttentionKernel = Literal["auto", "flash", "flex", "blocks"]  # auto, and the names of attention/kernels.py
CANNOT_MERGE = frozenset({"flex"})  # kernels that cannot merge attention over keys of several ranks


@dataclass(frozen=True)
class Molmo2Config:
    """Sizes and options of a whole Molmo2. `visual_attention` widens the causal mask among the visual tokens of one
    example; `attention` is the kernel (attention/kernels.py), which changes no number."""

    name: str
    vision: VisionConfig = field(default_factory=VisionConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    text: TextConfig = field(default_factory=TextConfig)
    extra_vocab_size: int = EXTRA_VOCAB_SIZE
    visual_attention: VisualAttention = "image_tokens"
    attention: AttentionKernel = "auto"
    lora: LoraConfig | None = None


def _tiny() -> Molmo2Config:
    # Trained from scratch: at these widths weights of 0.02 make the visual features vanish; 0.1 is 1 / sqrt(96)
    return Molmo2Config(
        name="tiny",
        vision=VisionConfig(
            image_size=126,
            hidden_size=96,
            num_heads=4,
            ffn_size=256,
            num_layers=5,
            feature_layers=(-2, -4),
            initializer_range=0.1,
        ),
        connector=ConnectorConfig(hidden_size=96, num_heads=4, ffn_size=512, initializer_range=0.1),
        text=TextConfig(
            hidden_size=192,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            ffn_size=512,
            vocab_size=1024,
            tie_embeddings=True,
            rotary_base=10_000.0,
            max_position=4096,
        ),
    )


def _published(name: str, text: TextConfig) -> Molmo2Config:
    # the projector is as wide as the language model's MLPs
    return Molmo2Config(name=name, connector=ConnectorConfig(ffn_size=text.ffn_size), text=text)


_SIZES = {name: text for family in FAMILIES.values() for name, text in family.sizes.items()}
PRESETS: dict[str, Callable[[], Molmo2Config]] = {"tiny": _tiny}
PRESETS |= {name: partial(_published, name, _SIZES[name]) for name in sorted(_SIZES)}


def preset(name: str, **overrides: object) -> Molmo2Config:
    """The named preset, top-level fields replaced by `overrides`.

    Raises:
        UserError: no such preset; the message lists the known ones.
    """
    if name not in PRESETS:
        raise UserError(f"unknown model preset {name!r}; known presets: {', '.join(PRESETS)}")
    return replace(PRESETS[name](), **overrides)  # type: ignore[arg-type]


def with_options(
    model_config: Molmo2Config,
    *,
    visual_attention: str | None = None,
    float32_attention: bool = False,
    rope_scaling: str = "none",
    rope_factor: float = 1.0,
    rope_base: float | None = None,
    attention: str = "auto",
    lora: LoraConfig | None = None,
) -> Molmo2Config:
    """`model_config` with a run's options: the fields of `ModelSelection`, and `StageConfig.lora`.

    Raises:
        UserError: rotary scaling or adapters that make no sense; see `with_rope_scaling`.
    """
    if visual_attention is not None:
        model_config = replace(model_config, visual_attention=visual_attention)  # type: ignore[arg-type]
    if float32_attention:
        model_config = replace(
            model_config,
            vision=replace(model_config.vision, float32_attention=True),
            connector=replace(model_config.connector, float32_attention=True),
        )
    text = with_rope_scaling(model_config.text, rope_scaling, rope_factor, rope_base)
    if lora is not None and lora.rank:
        unknown = set(lora.targets) - set(LORA_TARGETS)
        if lora.rank < 0 or unknown or not lora.targets:
            raise UserError(
                f"stage.lora.rank={lora.rank} stage.lora.targets={list(lora.targets)}: expected a rank of at least 1 "
                f"and some of {', '.join(LORA_TARGETS)}"
            )
        if not 0 < lora.alpha < math.inf:
            raise UserError(
                f"stage.lora.alpha={lora.alpha:g}: expected a number above 0; adapters are multiplied by it"
            )
        model_config = replace(model_config, lora=lora)
    return replace(model_config, text=text, attention=attention)  # type: ignore[arg-type]


def with_rope_scaling(text: TextConfig, kind: str, factor: float, base: float | None = None) -> TextConfig:
    """`text` for positions up to `factor` times its native range.

    Args:
        kind: "none"; "linear" (positions divided by the factor, arXiv 2306.15595); "yarn" (arXiv 2309.00071), on all
            layers, or where the model has YaRN already on the same ones, with this factor in place of its own; "base"
            (a higher base, arXiv 2309.16039).
        base: of "base"; None: the model's, times factor^(H / (H - 2)) for heads of size H, so that the slowest
            frequency turns as far over the longer range as it did over the native one ("NTK-aware").

    Raises:
        UserError: a factor that is no number above 1, or not above that of the model's own YaRN; a factor without a
            kind; linear scaling or another base on top of YaRN; or a base that is not above the model's.
    """
    if base is not None and kind != "base":
        raise UserError(f"model.rope_base={base:g} needs model.rope_scaling=base; {kind} keeps the model's base")
    if kind == "none":
        if factor != 1:
            raise UserError(f"model.rope_factor={factor:g} needs model.rope_scaling=linear, yarn or base")
        return text
    if not 1 < factor < math.inf:
        raise UserError(f"model.rope_scaling={kind} needs model.rope_factor > 1, not {factor:g}")
    if text.rotary_scale_layers is not None:
        raise UserError(
            f"model.rope_scaling={kind}: this model's rotary is interpolated on some layers already; use none"
        )
    if kind in ("linear", "base") and text.yarn is not None:
        raise UserError(f"model.rope_scaling={kind}: this model's rotary is YaRN already; use yarn")
    if kind == "base":
        if base is not None and not text.rotary_base < base < math.inf:
            raise UserError(f"model.rope_base={base:g}: must be a number above the model's own, {text.rotary_base:g}")
        base = ntk_base(text, factor) if base is None else base
        return replace(text, rotary_base=base, max_position=round(text.max_position * factor))
    if kind == "linear":
        return replace(text, rotary_scale=factor, max_position=round(text.max_position * factor))
    native = native_positions(text)
    if text.yarn is not None and factor <= text.yarn.factor:
        raise UserError(
            f"model.rope_factor={factor:g}: this model has YaRN of factor {text.yarn.factor:g} over {native} positions "
            f"already, so {text.max_position} need none; the factor replaces the model's and must be above it"
        )
    yarn = YarnConfig(
        layers=text.yarn.layers if text.yarn else tuple(range(text.num_layers)),
        factor=factor,
        attention_factor=0.1 * math.log(factor) + 1,
        original_max_position=native,
    )
    return replace(text, yarn=yarn, max_position=round(native * factor))


def ntk_base(text: TextConfig, factor: float) -> float:
    """The rotary base that reaches `factor` times the range of the base of `text`."""
    return text.rotary_base * factor ** (text.head_dim / (text.head_dim - 2))


def own_factor(text: TextConfig) -> float:
    """The rotary factor that a model has without being told one: 1, or that of its own YaRN."""
    return text.yarn.factor if text.yarn else 1.0


def with_rope_factor(text: TextConfig, native: TextConfig, kind: str, factor: float) -> TextConfig:
    """`text`, made by `with_rope_scaling` of that kind, with a factor that may be lower, down to none.

    The tables keep their names, so that a model that was built with `text` takes it.

    Args:
        native: before its scaling.
    """
    if kind == "linear":
        return replace(text, rotary_scale=factor)
    if kind == "base":
        return replace(text, rotary_base=ntk_base(native, factor))
    assert kind == "yarn" and text.yarn is not None
    if factor == own_factor(native) and native.yarn is not None:
        return replace(text, yarn=native.yarn)
    return replace(text, yarn=replace(text.yarn, factor=factor, attention_factor=0.1 * math.log(factor) + 1))


def native_positions(text: TextConfig) -> int:
    """What a rotary factor multiplies: the range of plain rotary, also where the model has YaRN of its own."""
    return text.yarn.original_max_position if text.yarn else text.max_position


@dataclass
class MemoryConfig:
    """What is traded for memory. None of it changes a loss or gradient (but `sequence_chunk` what dropout draws);
    docs/memory.md has what each saves and costs.

    `at_least` in a field's metadata is the smallest value that works; settings/ranges.py says so where a run is below.
    """

    recompute: Literal["none", "selective", "full"] = "none"  # full: whole layers
    recompute_modules: list[Literal["core_attn", "mlp"]] = field(default_factory=lambda: ["mlp"])  # selective
    recompute_layers: int | None = None  # full: only the first so many layers of a pipeline stage; default all
    recompute_attention: bool = False  # full: attention too, rather than keep its output and log-sum-exp
    recompute_vision: bool | None = None  # the vision encoder's blocks; default: with `full` only
    # decoder MLPs run on so many slices of the tokens, one after another
    mlp_tiles: int = field(default=1, metadata={"at_least": 1})
    # full: decoder layers run on so many tokens of a rank at a time, forward and backward; default: all
    sequence_chunk: int | None = field(default=None, metadata={"at_least": 1})
    offload: bool = False  # what decoder layers save for backward waits in host memory
    optimizer_offload: bool = False  # master weights and moments in host memory, updated there
    loss_chunk: int = field(default=1024, metadata={"at_least": 1})  # scored positions whose logits exist at once
    # crops encoded at once, and recomputed in backward; default: all, kept
    vision_chunk: int | None = field(default=None, metadata={"at_least": 1})

    @property
    def recomputes_vision(self) -> bool:
        """Whether the vision encoder's blocks are recomputed."""
        return self.vision_recomputed_with(self.recompute)

    def vision_recomputed_with(self, recompute: str) -> bool:
        """The same with another mode of `recompute`."""
        return recompute == "full" if self.recompute_vision is None else self.recompute_vision

    @property
    def keeps_attention(self) -> bool:
        """Whether recomputed layers are given attention's results (attention/kept.py)."""
        return self.recompute == "full" and not self.recompute_attention

    def check(self) -> None:
        """Refuses settings of recomputation that do not go together.

        Raises:
            UserError: an unknown mode, an unknown module or none, fewer than one layer; or layers, attention or chunks
                without mode full; or chunks in some layers only.
        """
        mode, modules, layers = self.recompute, self.recompute_modules, self.recompute_layers
        if mode not in ("none", "selective", "full"):
            raise UserError(f"memory.recompute={mode}: expected none, selective or full")
        if mode == "selective" and (not modules or set(modules) - {"core_attn", "mlp"}):
            raise UserError(
                f"memory.recompute_modules={list(modules)}: expected some of core_attn, mlp, or memory.recompute=none"
            )
        if self.recompute_attention and mode != "full":
            raise UserError(
                f"memory.recompute_attention=true has no effect with memory.recompute={mode}; set "
                "memory.recompute=full, or memory.recompute_attention=false"
            )
        if self.sequence_chunk is not None and mode != "full":
            raise UserError(
                f"memory.sequence_chunk={self.sequence_chunk} with memory.recompute={mode}: layers that work in chunks "
                "are recomputed in backward; set memory.recompute=full, or memory.sequence_chunk=null"
            )
        if layers is None:
            return
        if self.sequence_chunk is not None:
            raise UserError(
                f"memory.recompute_layers={layers} with memory.sequence_chunk={self.sequence_chunk}: all layers work "
                "in chunks, and are recomputed; set memory.recompute_layers=null, or memory.sequence_chunk=null"
            )
        if mode != "full":
            raise UserError(
                f"memory.recompute_layers={layers} has no effect with memory.recompute={mode}; set "
                "memory.recompute=full, or memory.recompute_layers=null"
            )
        if layers < 1:
            raise UserError(f"memory.recompute_layers={layers}: expected at least 1, or null for all")


@dataclass
class KernelConfig:
    """How pieces of the model are computed. No choice changes a result beyond rounding, or what checkpoints hold;
    docs/kernels.md. `auto` is the fastest way that the machine can run, on a CPU the plain one (fused/choice.py)."""

    norm: Literal["auto", "plain", "torch", "compiled"] = "auto"  # RMSNorm of the language model
    rotary: Literal["auto", "plain", "compiled"] = "auto"  # QK-norm per head, and rotary
    swiglu: Literal["auto", "plain", "compiled"] = "auto"  # activation of the language model's MLPs
    residual: Literal["auto", "plain", "compiled"] = "auto"  # dropout of a branch, and the residual added
    vision: Literal["auto", "plain", "compiled"] = "auto"  # the vision encoder's blocks
    pooling: Literal["auto", "plain", "direct", "compiled"] = "auto"  # the connector's attention over windows
    loss: Literal["auto", "plain", "fused", "compiled"] = "auto"  # the head and cross entropy
    adamw: Literal["auto", "plain", "fused"] = "auto"  # the optimizer's step, with the gradients' norms
    # The library under model.attention=flash on CUDA (fused/varlen.py); plain: PyTorch's own
    flash: Literal["auto", "plain", "fa2", "fa3", "fa4", "cudnn"] = "auto"
    merge: Literal["auto", "plain", "compiled"] = "auto"  # pieces of attention, and their gradients
    inputs: Literal["auto", "plain", "ahead"] = "auto"  # when micro-batches are planned and brought to the device


@dataclass(frozen=True)
class TrainingOptions:
    """The part of a training stage that the model itself must know: dropout, and the z-loss."""

    z_loss: float  # weight of logsumexp^2 in the loss
    residual_dropout: float  # on all tokens
    response_residual_dropout: float  # on response tokens only; takes the place of the other there


PLAIN = TrainingOptions(z_loss=0.0, residual_dropout=0.0, response_residual_dropout=0.0)  # inference; plain CE


NOTHING_TRAINS = (
    "nothing is trainable: every part is frozen; set stage.train_vit, stage.train_connector or stage.train_llm to true "
    "(with stage.lora, train_llm makes the adapters trainable, and train_base_embedding has no effect)"
)


@dataclass(frozen=True)
class Trainable:
    """Which parts of a model are trainable; all others are frozen. A parameter's name says which part it belongs to
    (`freeze` in training/model.py)."""

    vit: bool
    connector: bool  # and the extra rows of the embedding
    llm: bool  # the language model's own weights, but for its norms
    norms: bool  # of the language model
    adapters: bool
    base_embedding: bool
    head: bool

    def any(self) -> bool:
        return True in vars(self).values()


def trainable(model_config: Molmo2Config, *, vit: bool, connector: bool, llm: bool, base_embedding: bool) -> Trainable:
    """Which parts of a model are trainable; the arguments are the `train_*` of StageConfig.

    With adapters the language model's own weights and the base rows stay frozen, whatever the arguments say, but for
    what LoraConfig trains beside them. A tied head is trainable if the base rows are.
    """
    lora = model_config.lora
    own = llm and lora is None
    rows = base_embedding if lora is None else llm and lora.embeddings
    return Trainable(
        vit=vit,
        connector=connector,
        llm=own,
        norms=llm and (lora is None or lora.norms),
        adapters=llm and lora is not None,
        base_embedding=rows,
        head=rows if model_config.text.tie_embeddings else own,
    )
