"""Memory of one GPU, component by component, in bytes.

Activations are what our code keeps for backward, counted tensor by tensor; tests compare them with a trace of the real
model. Everything else is arithmetic, but for two allowances: `RUNTIME` and `SLACK`.
"""

from __future__ import annotations

from dataclasses import dataclass

from molmo2_nemo.config import MemoryConfig, StageConfig
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.plan.layout import Layout
from molmo2_nemo.plan.sizes import held
from molmo2_nemo.plan.workload import Workload

GIB = 2.0**30
RUNTIME = 2.5 * GIB  # CUDA context, libraries' workspaces, NCCL's buffers
SLACK = 0.05  # of all else: fragmentation
USABLE = 0.97  # of a device's memory


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU that needs most."""

    weights: float
    gradients: float
    optimizer: float
    decoder: float  # activations of decoder layers
    vision: float  # activations of encoder and connector
    head: float  # logits of a chunk, gradient of the head
    exchange: float  # what context and tensor parallelism send and receive
    runtime: float

    def parts(self) -> dict[str, float]:
        return dict(vars(self))

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def memory(
    model: Molmo2Config, stage: StageConfig, work: Workload, layout: Layout, options: MemoryConfig | None = None
) -> Memory:
    """Peak of one rank in bf16 with fp32 gradients, masters and moments."""
    options = options or MemoryConfig()
    mine = held(model, stage, layout.tensor, layout.pipeline)
    sharded = layout.data * layout.context  # the distributed optimizer's group
    tokens = work.length / layout.context * layout.micro_batch
    crops = work.max_crops / (layout.context * layout.tensor) * layout.micro_batch
    in_flight = min(layout.pipeline, max(1, work.packs // (layout.data * layout.micro_batch)))
    decoder = decoder_bytes(model, layout, tokens, dropout=dropout(stage), tiles=options.mlp_tiles) * in_flight
    vision = vision_bytes(model, crops, layout.recompute == "full", stage.train_vit, chunk=options.vision_chunk)
    vision *= in_flight
    qkv = (2 * model.text.num_heads + 2 * model.text.num_kv_heads) * model.text.head_dim * tokens / layout.tensor
    parts = {
        "weights": 2.0 * mine.all,
        "gradients": 4.0 * mine.trained,
        "optimizer": 12.0 * mine.trained / sharded,
        "decoder": decoder,
        "vision": vision,
        "head": head_bytes(model, stage, layout, options.loss_chunk, tokens),
        "exchange": (2 * 2.0 * qkv if layout.context > 1 else 0.0)
        + (2 * 2.0 * tokens * model.text.hidden_size if layout.tensor > 1 else 0.0),
    }
    slack = SLACK * sum(parts.values())
    return Memory(**parts, runtime=RUNTIME + slack)


def dropout(stage: StageConfig) -> bool:
    return stage.residual_dropout > 0 or stage.response_residual_dropout > 0


def decoder_bytes(
    model: Molmo2Config, layout: Layout, tokens: float, *, dropout: bool, element: int = 2, tiles: int = 1
) -> float:
    """What the decoder layers of one stage keep for one micro-batch of `tokens` tokens of a context rank.

    Args:
        element: bytes of an activation: 2 (bf16) or 4 (fp32).
        tiles: slices that an MLP runs on; with more than one, only the slice at work keeps anything.

    Selective recomputation is taken to be the default's, of the MLPs.
    """
    text = model.text
    layers = text.num_layers / layout.pipeline
    inputs = element * text.hidden_size * tokens / layout.tensor
    one = layer_bytes(model, element=element, dropout=dropout) * tokens / layout.tensor
    ends = 3 * inputs  # embedding's output, and around the final norm
    if tiles > 1:
        mlp = 5 * element * text.ffn_size * tokens / layout.tensor
        one, ends = one - mlp, ends + mlp / tiles
    if layout.recompute == "full":
        return (0.0 if layout.offload else layers * inputs) + one + 2 * inputs + ends
    if layout.recompute == "selective" and tiles == 1:  # MLPs keep their inputs only, but for the one at work
        mlp = 5.0 * element * text.ffn_size
        if text.family == "olmo3":  # the norm behind the MLP belongs to it
            mlp += (6 if element == 2 else 8) * text.hidden_size
        mlp *= tokens / layout.tensor
        one, ends = one - mlp, ends + mlp
    return layers * one + ends


def layer_bytes(model: Molmo2Config, *, element: int = 2, dropout: bool = True) -> float:
    """Bytes per token that one decoder layer keeps, without tensor parallelism."""
    text = model.text
    width, queries, keys = text.hidden_size, text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    norm = (4 if element == 2 else 0) + element  # fp32 copy of the input (in fp32 the input itself), normalised value
    norms = 2 * width * (norm + element)  # and the output, which is the next linear layer's input
    residuals = (2 * element if element == 4 else 0) * width + (2 * width if dropout else 0)
    qk_norm = (queries + keys) * norm
    qkv = element * (queries + 2 * keys)
    mlp = 5 * element * text.ffn_size  # gate and up together, silu(gate), Megatron's copy of up, the product
    return norms + residuals + qk_norm + qkv + attention_bytes(model, element) + element * queries + mlp


def attention_bytes(model: Molmo2Config, element: int = 2) -> float:
    """Of them, what attention keeps besides its values and output: queries and keys after rotary, logsumexp."""
    text = model.text
    return element * (text.num_heads + text.num_kv_heads) * text.head_dim + 4.0 * text.num_heads


def vision_bytes(
    model: Molmo2Config,
    crops: float,
    recompute: bool,
    train_vit: bool = True,
    element: int = 2,
    chunk: int | None = None,
) -> float:
    """What encoder and connector keep for `crops` crops; encoded `chunk` at a time, only their visual tokens wait."""
    if chunk is not None and chunk < crops:
        tokens = element * model.text.hidden_size * model.vision.num_patches / 9 * crops
        return tokens + vision_bytes(model, chunk, recompute, train_vit, element)
    vision, width = model.vision, model.vision.hidden_size
    patches = vision.num_patches * crops
    block = block_bytes(model, element) * patches
    encoder = element * vision.patch_dim * patches  # normalised pixels
    encoder += vision.num_built_layers * (element * width * patches if recompute else block)
    encoder += block if recompute else 0.0
    features = element * vision.feature_size * patches
    pooling = features + 2 * element * model.connector.hidden_size * patches  # windows, their keys and values
    projector = 4 * element * model.connector.ffn_size * patches / 9  # a row has 4 or 9 patches
    if not train_vit:
        encoder = 2 * block
    return encoder + features + pooling + projector


def block_bytes(model: Molmo2Config, element: int) -> float:
    """Bytes per patch that one encoder block keeps: q, k, v, two norms, two residuals, attention, two of the MLP."""
    return element * (8 * model.vision.hidden_size + 2 * model.vision.ffn_size)


def head_bytes(model: Molmo2Config, stage: StageConfig, layout: Layout, chunk: int, tokens: float) -> float:
    """Logits of one chunk (bf16, fp32, probabilities, their gradient), and the head's gradient in fp32."""
    columns = model.text.vocab_size / layout.tensor
    trained = stage.train_base_embedding if model.text.tie_embeddings else stage.train_llm
    logits = min(chunk, tokens) * columns * (2 + 4 + 4 + 2)
    return logits + (4.0 * columns * model.text.hidden_size if trained else 0.0)
