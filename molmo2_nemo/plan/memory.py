"""Memory of one GPU, component by component, in bytes.

Activations are what our code keeps for backward, counted tensor by tensor; tests compare them with a trace of the real
model. Everything else is arithmetic, but for two allowances: `RUNTIME` and `SLACK`.
"""

from __future__ import annotations

from dataclasses import dataclass

from molmo2_nemo.cost.flops import layer_weights
from molmo2_nemo.cost.layout import Layout
from molmo2_nemo.cost.parameters import adapter_parameters, held, parameters
from molmo2_nemo.cost.workload import Workload
from molmo2_nemo.model.config import KernelConfig, MemoryConfig, Molmo2Config
from molmo2_nemo.model.families import family_of
from molmo2_nemo.settings.run import StageConfig

GIB = 2.0**30
RUNTIME = 2.5 * GIB  # CUDA context, libraries' workspaces, NCCL's buffers
SLACK = 0.05  # of all else: fragmentation
HOST_OPTIMIZER = 16.0  # of a parameter updated on the host: master weight, two moments, and its gradient, in fp32
USABLE = 0.97  # of a device's memory
# Layers' inputs that offload brings back ahead of use, and layers with all that they keep where that is attention's
# results as well (model/memory.py)
OFFLOAD_AHEAD, OFFLOAD_AHEAD_WITH_RESULTS = 2, 1
HOST_PART = 1 << 20  # bytes that a buffer on the host is made of; what is smaller is not moved (model/host_memory.py)
NONE_FUSED: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU that needs most, in the phase of a step in which it needs most."""

    weights: float
    gradients: float
    optimizer: float
    decoder: float  # activations of decoder layers
    vision: float  # activations of encoder and connector
    head: float  # logits of a chunk, gradient of the head
    exchange: float  # what context and tensor parallelism send and receive
    runtime: float
    phase: str  # of PHASES
    host: float = 0.0  # pinned memory of the host where saved tensors wait; not on the GPU, not part of the total
    host_optimizer: float = 0.0  # the same of what the optimizer keeps there; its gradients are pinned

    def parts(self) -> dict[str, float]:
        elsewhere = ("phase", "host", "host_optimizer")
        return {name: value for name, value in vars(self).items() if name not in elsewhere}

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    @property
    def counted(self) -> float:
        """Without the allowances for what is not counted."""
        return self.total - self.runtime


@dataclass(frozen=True)
class Activations:
    """Bytes of activations of one micro-batch."""

    waiting: float  # from its forward until its backward
    working: float = 0.0  # in addition while single layers, blocks or chunks are recomputed or run without autograd


PHASES = ("loss", "decoder", "vision")  # parts of a step during which memory may be fullest


def fused_pieces(kernels: KernelConfig) -> frozenset[str]:
    """The pieces of the model that a GPU computes in one kernel (fused/choice.py), keeping less for backward. `auto` is
    one: Triton comes with PyTorch there."""
    return frozenset(piece for piece, way in vars(kernels).items() if way != "plain")


def memory(
    model_config: Molmo2Config,
    stage: StageConfig,
    work: Workload,
    layout: Layout,
    options: MemoryConfig | None = None,
    kernels: KernelConfig | None = None,
    *,
    fp8: bool = False,
    bf16_gradients: bool = False,
) -> Memory:
    """Peak of one rank in bf16 with fp32 masters and moments, and gradients of all micro-batches in fp32.

    Args:
        kernels: how pieces of the model are computed on a GPU; None: all of them plainly.
        fp8: the decoder multiplies in FP8. Its weights are then held in FP8 as well, and once more transposed, for the
            micro-batches of a step; activations are counted as in bf16, though some are kept in FP8.
        bf16_gradients: gradients in bf16; the optimizer has its share of them in fp32 as well.
    """
    options, fused = options or MemoryConfig(), NONE_FUSED if kernels is None else fused_pieces(kernels)
    mine = held(model_config, stage, layout.tensor, layout.pipeline)
    sharded = layout.data * layout.context  # the distributed optimizer's group
    tokens = work.length / layout.context * layout.micro_batch
    crops = work.max_crops / (layout.context * layout.tensor) * layout.micro_batch
    in_flight = min(layout.pipeline, max(1, work.packs // (layout.data * layout.micro_batch)))
    phase, decoder, vision, head = fullest(
        decoder_activations(
            model_config,
            layout,
            tokens,
            dropout=dropout(stage),
            tiles=options.mlp_tiles,
            chunk=chunk_of(options, layout),
            fused=fused,
        ),
        vision_activations(
            model_config,
            crops,
            options.vision_recomputed_with(layout.recompute),
            stage.train_vit,
            chunk=options.vision_chunk,
        ),
        head_bytes(model_config, stage, layout, options.loss_chunk, tokens, fused),
        in_flight,
        tied_bytes(model_config, stage, layout),
    )
    qkv = (
        (2 * model_config.text.num_heads + 2 * model_config.text.num_kv_heads)
        * model_config.text.head_dim
        * tokens
        / layout.tensor
    )
    at_once = min(1.0, (chunk_of(options, layout) or tokens) / tokens)  # of the tokens, those a layer works on
    copies = 2.0 * layer_weights(model_config) * model_config.text.num_layers / layout.pipeline / layout.tensor
    weights, gradients = 2.0 * mine.all + (copies if fp8 else 0.0), (2.0 + 4.0 / sharded if bf16_gradients else 4.0)
    gradients *= mine.trained
    if layout.fsdp:
        weights, gradients = sharded_bytes(model_config, stage, sharded, bf16_gradients=bf16_gradients)
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": 0.0 if layout.optimizer_offload else 12.0 * mine.trained / sharded,
        "decoder": decoder,
        "vision": vision,
        "head": head,
        "exchange": (2 * 2.0 * qkv * at_once if layout.context > 1 else 0.0)
        + (2 * 2.0 * tokens * at_once * model_config.text.hidden_size if layout.tensor > 1 else 0.0),
    }
    slack = SLACK * sum(parts.values())
    host = in_flight * host_bytes(model_config, layout, tokens, fused) if layout.offload else 0.0
    updated = HOST_OPTIMIZER * mine.trained / sharded if layout.optimizer_offload else 0.0
    return Memory(**parts, runtime=RUNTIME + slack, phase=phase, host=host, host_optimizer=updated)


def sharded_bytes(
    model_config: Molmo2Config, stage: StageConfig, ranks: int, *, bf16_gradients: bool
) -> tuple[float, float]:
    """Weights and gradients of a rank whose parameters are sharded: its rows of all, and what is whole for a while.

    Whole are what is outside the decoder's layers, a layer at work and the next one; of gradients, those outside the
    layers in bf16 until a backward pass is over, and either three layers' on their way or the largest matrix outside.
    """
    mine, rows = held(model_config, stage, 1, 1), parameters(model_config)
    trains = stage.trainable(model_config)
    in_layers = rows.layer * rows.layers + adapter_parameters(model_config, stage.lora)
    layer = in_layers / rows.layers
    trained_layers = (
        rows.layer * rows.layers * trains.llm + adapter_parameters(model_config, stage.lora) * trains.adapters
    )
    outside = max(0.0, mine.trained - trained_layers)
    largest = rows.embedding * trains.base_embedding or rows.head * trains.head
    element = 2.0 if bf16_gradients else 4.0
    weights = 2.0 * (mine.all / ranks + mine.all - in_layers + 2 * layer)
    on_their_way = element * max(3 * trained_layers / rows.layers, float(largest)) + 2.0 * outside
    return weights, (6.0 if bf16_gradients else 4.0) * mine.trained / ranks + on_their_way


def fullest(
    decoder: Activations, vision: Activations, head: float, in_flight: int = 1, tied: float = 0.0
) -> tuple[str, float, float, float]:
    """The fullest phase, and what decoder, vision and head have then.

    A micro-batch is encoded, decoded, scored, and goes back the same way: at the loss everything waits; then the head
    is done and layers are recomputed; when the encoder's turn comes, the decoder has nothing left. (A frozen
    encoder works before the decoder has anything.)

    Args:
        in_flight: micro-batches of a pipeline stage; all but the last only wait.
        tied: of the head, what waits for the embedding's gradient.
    """
    phases = {
        "loss": (decoder.waiting, vision.waiting, head),
        "decoder": (decoder.waiting + decoder.working, vision.waiting, tied),
        "vision": (0.0, vision.waiting + vision.working, tied),
    }
    phase = max(PHASES, key=lambda name: sum(phases[name]))
    of_decoder, of_vision, of_head = phases[phase]
    earlier = in_flight - 1
    return phase, of_decoder + earlier * decoder.waiting, of_vision + earlier * vision.waiting, of_head


def chunk_of(options: MemoryConfig, layout: Layout) -> float | None:
    """Tokens of a micro-batch that a decoder layer works on at a time on one context rank; None: all."""
    return None if options.sequence_chunk is None else float(options.sequence_chunk * layout.micro_batch)


def dropout(stage: StageConfig) -> bool:
    """Whether the stage drops any residuals."""
    return stage.residual_dropout > 0 or stage.response_residual_dropout > 0


def decoder_activations(
    model_config: Molmo2Config,
    layout: Layout,
    tokens: float,
    *,
    dropout: bool,
    bytes_per_element: int = 2,
    tiles: int = 1,
    chunk: float | None = None,
    fused: frozenset[str] = NONE_FUSED,
) -> Activations:
    """Activations of one pipeline stage's decoder layers for a micro-batch. Selective recomputation is taken to be the
    default's, of the MLPs.

    Args:
        tokens: of the micro-batch on one context rank.
        bytes_per_element: of an activation: 2 (bf16) or 4 (fp32).
        tiles: slices that an MLP runs on; with more than one, only the slice at work keeps anything.
        chunk: tokens that a layer works on at a time, with full recomputation; None: all.
        fused: from `fused_pieces`.
    """
    text, mine = model_config.text, tokens / layout.tensor
    layers = text.num_layers / layout.pipeline
    inputs = bytes_per_element * text.hidden_size * mine
    one = layer_bytes(model_config, bytes_per_element=bytes_per_element, dropout=dropout, fused=fused) * mine
    ends, working = 3 * inputs, 0.0  # embedding's output, and around the final norm
    if tiles > 1:
        mlp = mlp_bytes(model_config, bytes_per_element, fused) * mine
        one, working = one - mlp, mlp / tiles
    elif layout.recompute == "selective":  # MLPs keep their inputs only, but for the one at work
        mlp = mlp_bytes(model_config, bytes_per_element, fused) * mine
        if family_of(text).post_norm:  # the norm behind the MLP belongs to it
            mlp += post_norm_bytes(text.hidden_size, bytes_per_element, fused) * mine
        one, working = one - mlp, mlp
    if layout.recompute == "full":  # the layer at work whole, gradients of its output and input
        kept, ahead = 0.0, OFFLOAD_AHEAD
        if layout.keeps_attention(model_config.attention):
            kept, ahead = result_bytes(model_config, bytes_per_element) * mine, OFFLOAD_AHEAD_WITH_RESULTS
        if chunk is not None:  # of all tokens only what layers in chunks carry
            at_once = min(1.0, chunk / tokens)
            one, working = (
                at_once * one + carried_bytes(model_config, layout, mine, bytes_per_element),
                at_once * working,
            )
            one += at_once * kept  # the copy that backward is given
        working += one + 2 * inputs
        if layout.offload:  # and its own input, besides what is on its way back
            return Activations(ends, working + inputs + ahead * (inputs + kept))
        working -= kept if chunk is None else 0.0  # the layer at work has its own
        one = inputs + kept
    return Activations(layers * one + ends, working)


def carried_bytes(model_config: Molmo2Config, layout: Layout, tokens: float, element: int) -> float:
    """Bytes that a layer in chunks has of all tokens while it is differentiated: keys and values, of all ring ranks
    where they are shown, and in fp32 their summed gradients, with what a chunk adds; and, once in fp32 and once as they
    come, the gradients of its weights."""
    text = model_config.text
    keys = 2 * text.num_kv_heads * text.head_dim * tokens * layout.context / layout.ulysses
    return (element + 8.0) * keys + (4.0 + element) * layer_weights(model_config) / layout.tensor


def layer_bytes(
    model_config: Molmo2Config,
    *,
    bytes_per_element: int = 2,
    dropout: bool = True,
    fused: frozenset[str] = NONE_FUSED,
) -> float:
    """Bytes per token that one decoder layer keeps, without tensor parallelism."""
    text, element = model_config.text, bytes_per_element
    width, queries, keys = text.hidden_size, text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    norms = 2 * (norm_bytes(width, element, fused) + element * width)  # the output is the next linear layer's input
    residuals = (2 * element if element == 4 else 0) * width + (2 * width if dropout else 0)
    qkv = element * (queries + 2 * keys)
    attention = attention_bytes(model_config, element) + element * queries
    qk_norm = qk_norm_bytes(model_config, element, fused)
    return norms + residuals + qk_norm + qkv + attention + mlp_bytes(model_config, element, fused)


def norm_bytes(width: int, element: int, fused: frozenset[str]) -> float:
    """Bytes per token that an RMSNorm keeps: one number and, fused, its input; plain, the normalised value and the fp32
    copy of the input (in fp32 the input itself)."""
    return 4.0 + (element if "norm" in fused else _normed(element)) * width


def _normed(element: int) -> int:
    """Bytes per value that a plain RMSNorm keeps besides what is kept anyway."""
    return element if element == 4 else element + 4


def qk_norm_bytes(model_config: Molmo2Config, element: int, fused: frozenset[str]) -> float:
    """Bytes per token that the norms of queries and keys keep. Fused, they need what the linear layer made, which the
    values keep as well; of norms per head Megatron copies the queries."""
    text, kind = model_config.text, family_of(model_config.text).qk_norm
    heads = text.num_heads + text.num_kv_heads
    numbers = {"none": 0.0, "head": 4.0 * heads, "full": 8.0}[kind]
    if kind == "full" and "norm" in fused or kind == "none":
        return numbers
    if kind == "head" and fused & {"norm", "rotary"}:
        return element * text.num_heads * text.head_dim + numbers
    return numbers + _normed(element) * heads * text.head_dim


def post_norm_bytes(width: int, element: int, fused: frozenset[str]) -> float:
    """Bytes per token that the norm behind an MLP keeps, of a family that has one."""
    if "norm" in fused:
        return norm_bytes(width, element, fused)
    return (6 if element == 2 else 8) * width


def mlp_bytes(model_config: Molmo2Config, bytes_per_element: int = 2, fused: frozenset[str] = NONE_FUSED) -> float:
    """Bytes per token that one decoder layer's MLP keeps: gate and up together, the product; plain, also silu(gate) and
    Megatron's copy of up."""
    return (3.0 if "swiglu" in fused else 5.0) * bytes_per_element * model_config.text.ffn_size


def attention_bytes(model_config: Molmo2Config, bytes_per_element: int = 2) -> float:
    """Bytes per token that one layer's attention keeps besides values and output: queries and keys after rotary, and
    the log-sum-exp."""
    text = model_config.text
    return bytes_per_element * (text.num_heads + text.num_kv_heads) * text.head_dim + 4.0 * text.num_heads


def result_bytes(model_config: Molmo2Config, bytes_per_element: int = 2) -> float:
    """Bytes per token of what one layer's attention keeps outside recomputation: its output and log-sum-exp."""
    text = model_config.text
    return (bytes_per_element * text.head_dim + 4.0) * text.num_heads


def host_bytes(model_config: Molmo2Config, layout: Layout, tokens: float, fused: frozenset[str] = NONE_FUSED) -> float:
    """Bytes in bf16 that offload keeps on the host for a micro-batch of one pipeline stage: of every layer its input,
    and attention's results where they are kept; and what the final norm keeps. Without full recomputation it is more
    than this: all that the layers keep.

    Args:
        tokens: of the micro-batch on one context rank.
    """
    text, mine = model_config.text, tokens / layout.tensor
    inputs = 2.0 * text.hidden_size * mine
    layer = [inputs]
    if layout.recompute != "full" or layout.keeps_attention(model_config.attention):
        layer += [2.0 * text.num_heads * text.head_dim * mine, 4.0 * text.num_heads * mine]
    last = [inputs] if "norm" in fused else [inputs, 2 * inputs]  # plain: the fp32 copy, and its input's normal form
    layers = text.num_layers / layout.pipeline
    return layers * sum(map(_buffer, layer)) + sum(map(_buffer, last))


def _buffer(size: float) -> float:
    """Bytes of the host's buffer for a tensor; 0 for one that is not moved."""
    return -(-size // HOST_PART) * HOST_PART if size >= HOST_PART else 0.0


def vision_activations(
    model_config: Molmo2Config,
    crops: float,
    recompute: bool,
    train_vit: bool = True,
    bytes_per_element: int = 2,
    chunk: int | None = None,
) -> Activations:
    """Activations of encoder and connector for `crops` crops. Where they are encoded `chunk` at a time, only their
    visual tokens wait for backward."""
    if chunk is not None and chunk < crops:
        one = vision_activations(model_config, chunk, recompute, train_vit, bytes_per_element)
        tokens = bytes_per_element * model_config.text.hidden_size * model_config.vision.num_patches / 9 * crops
        return Activations(tokens, one.waiting + one.working)
    vision, width = model_config.vision, model_config.vision.hidden_size
    patches = vision.num_patches * crops
    block = block_bytes(model_config, bytes_per_element) * patches
    features = bytes_per_element * vision.feature_size * patches
    pooling = (
        features + 2 * bytes_per_element * model_config.connector.hidden_size * patches
    )  # windows, their keys and values
    projector = (
        4 * bytes_per_element * model_config.connector.ffn_size * patches / 9
    )  # a visual token has 4 or 9 patches
    connector = features + pooling + projector
    if not train_vit:  # nothing of the encoder waits, and no more lives at once than a block would keep
        return Activations(connector, block)
    encoder = bytes_per_element * vision.patch_dim * patches  # normalised pixels
    encoder += vision.num_built_layers * (bytes_per_element * width * patches if recompute else block)
    return Activations(encoder + connector, block if recompute else 0.0)


def block_bytes(model_config: Molmo2Config, bytes_per_element: int) -> float:
    """Bytes per patch that one encoder block keeps: q, k, v, two norms, two residuals, attention, two of the MLP."""
    return bytes_per_element * (8 * model_config.vision.hidden_size + 2 * model_config.vision.ffn_size)


def head_bytes(
    model_config: Molmo2Config,
    stage: StageConfig,
    layout: Layout,
    chunk: int,
    tokens: float,
    fused: frozenset[str] = NONE_FUSED,
) -> float:
    """Bytes of a chunk's logits (bf16 and their gradient; plain, three in fp32) and of the head's gradient, in fp32
    while chunks are added and then once more in bf16. Plain, forward takes most of logits, without a gradient."""
    columns = model_config.text.vocab_size / layout.tensor
    logits = min(chunk, tokens) * columns
    elements = columns * model_config.text.hidden_size if stage.trainable(model_config).head else 0.0
    if "loss" in fused:
        return max(4 * logits + 4.0 * elements, 6.0 * elements)
    return max(12 * logits, 6 * logits + 4.0 * elements, 2 * logits + 6.0 * elements)


def tied_bytes(model_config: Molmo2Config, stage: StageConfig, layout: Layout) -> float:
    """Bytes of a tied head's gradient, in bf16: autograd keeps it until the embedding's, the last of all, is added. On
    stages of a pipeline the two are tensors of their own."""
    text = model_config.text
    waits = text.tie_embeddings and layout.pipeline == 1 and stage.trainable(model_config).head
    return 2.0 * text.vocab_size / layout.tensor * text.hidden_size if waits else 0.0
