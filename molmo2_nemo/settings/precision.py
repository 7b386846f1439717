"""What `cluster.precision` means, and what FP8 asks of a model's widths and of its packs. No torch here.

fp32: everything. bf16: parameters and activations, with fp32 gradients, master weights and moments. fp8: as bf16, but
the products of the decoder's linear layers are taken in FP8, scaled to each tensor's present range (Transformer
Engine's current scaling); parameters, checkpoints, vision encoder, connector and head are those of bf16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from molmo2_nemo.model.config import MemoryConfig, Molmo2Config
from molmo2_nemo.settings.run import ParallelConfig, Precision

# Transformer Engine refuses rows that are no multiple of 8 and columns that are none of 16; in the gradients of weights
# rows take the place of columns.
FP8_MULTIPLE = 16


def element_bytes(precision: Precision) -> int:
    """Bytes of a parameter and of an activation between layers."""
    return 4 if precision == "fp32" else 2


def token_multiple(precision: Precision) -> int:
    """What a rank's tokens of a pack must be a multiple of."""
    return FP8_MULTIPLE if precision == "fp8" else 1


def fp8_problems(
    model_config: Molmo2Config, parallel: ParallelConfig, memory: MemoryConfig, lengths: Mapping[str, int]
) -> Iterator[str]:
    """Why a model or its packs cannot be multiplied in FP8 under a layout, one line for each setting. Of recomputation,
    Megatron's is done in the FP8 context of forward, by Transformer Engine's own checkpoint; docs/kernels.md.

    Args:
        lengths: config key -> tokens of a pack, for every length that the run uses.
    """
    if memory.mlp_tiles > 1:
        yield (
            f"memory.mlp_tiles={memory.mlp_tiles} with cluster.precision=fp8: in backward PyTorch computes slices "
            "again outside Transformer Engine's FP8 context, in bf16 and so with other numbers than in forward; use "
            "memory.mlp_tiles=1 (memory.recompute stays inside it), or cluster.precision=bf16"
        )
    if memory.sequence_chunk is not None:
        yield (
            f"memory.sequence_chunk={memory.sequence_chunk} with cluster.precision=fp8: in backward chunks are "
            "computed again outside Transformer Engine's FP8 context, in bf16 and so with other numbers than in "
            "forward; use memory.sequence_chunk=null (memory.recompute stays inside it), or cluster.precision=bf16"
        )
    text, tensor = model_config.text, parallel.tensor
    for what, size in (
        ("width", text.hidden_size),
        ("feed-forward columns", text.ffn_size / tensor),
        ("query columns", text.num_heads * text.head_dim / tensor),
        ("query, key and value columns", (text.num_heads + 2 * text.num_kv_heads) * text.head_dim / tensor),
    ):
        if size % FP8_MULTIPLE:
            rank = f" on each of {tensor} tensor-parallel ranks" if tensor > 1 and what != "width" else ""
            yield (
                f"cluster.precision=fp8: the {size:g} {what} of the {model_config.name} model{rank} are not a multiple "
                f"of {FP8_MULTIPLE}, which FP8 products need; use cluster.precision=bf16"
                + (", or a lower parallel.tensor" if rank else "")
            )
    shards = parallel.context * (tensor if parallel.sequence else 1)
    multiple = shards * token_multiple("fp8")
    for key, length in lengths.items():
        if length % multiple:
            yield (
                f"{key}={length} with cluster.precision=fp8: must be a multiple of {FP8_MULTIPLE} for each of "
                f"{shards} ranks that share a pack's tokens, {multiple}; {-(-length // multiple) * multiple} is"
            )
