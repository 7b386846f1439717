"""The `core_attention` module that Molmo2's layer specs name: rotary, context parallelism, then a kernel.

Megatron hands over q, k and v of this rank's tokens after QK-norm. Rotary is applied here, in fp32 and by the position
ids that travel with the pack, so that a layer can have its own table (YaRN on some of OLMo 3's layers) and so that
packed and branched positions are right under any sharding.

Shape legend: S tokens of the pack, T tokens of this context rank, B packs, N query heads, G key heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from molmo2_nemo.attention.across import attend_across
from molmo2_nemo.attention.cache import KVCache
from molmo2_nemo.attention.carried import CarriedKeys, ChunkedPack, ChunkOfQueries
from molmo2_nemo.attention.kept import KeptResults
from molmo2_nemo.attention.kernels import Kernel, choose
from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.attention.ring import VisibleKeys
from molmo2_nemo.fused import rotary
from molmo2_nemo.fused.merge import PLAIN as PLAIN_MERGING
from molmo2_nemo.fused.merge import Merging
from molmo2_nemo.fused.varlen import Library
from molmo2_nemo.parallel.context import ContextGroups, group_size


@dataclass
class PackDescription(PackedSeqParams):
    """What attention must know about a micro-batch. It rides Megatron's `packed_seq_params` argument, which reaches
    every layer and survives activation recompute."""

    qkv_format: str = "sbhd"
    mask: TokenMask = None  # type: ignore[assignment]  # all S tokens, on every context rank
    rotary: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # table name -> cos, sin [T, B, 1, H] fp32
    groups: ContextGroups | None = None  # the ranks that share the pack; None: this one alone
    visible: VisibleKeys | None = None  # what its shards may see of each other, where they show each other keys
    kept: KeptResults | None = None  # attention's results, where layers are recomputed without attention
    cache: KVCache | None = None  # of generation: filled by a pass over prompts, then read token by token
    chunk: ChunkOfQueries | None = None  # of a layer that works in chunks (model/chunks.py): its queries at work
    response: Tensor | None = None  # bool [T', B, 1]: tokens that answer (this rank's, after sequence sharding)


class TreeAttention(torch.nn.Module):
    """Attention over packs of message trees. Signature of Megatron's `core_attention`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        rotary_by_layer: dict[int, str] | None = None,
        kernel: str = "auto",
        library: Library | None = None,
        merging: Merging = PLAIN_MERGING,
        rotate: Callable[..., tuple[Tensor, Tensor]] = rotary.plain,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.layer = layer_number
        self.table = (rotary_by_layer or {}).get(layer_number - 1, "plain")
        self.kernel, self.library, self.merging, self.rotate = kernel, library, merging, rotate
        # QK-norms per head that `rotate` computes: modules of the attention layer, which holds them
        self.qk_norms: tuple[Any, ...] = ()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackDescription | None = None,
    ) -> Tensor:
        """query [T, B, N, H], key and value [T, B, G, H] of this rank -> [T, B, N * H]."""
        assert isinstance(packed_seq_params, PackDescription), "Molmo2's attention needs the pack's description"
        query, key = self.rotated(query, key, packed_seq_params)
        if packed_seq_params.chunk is not None:
            return packed_seq_params.chunk.attend(query).flatten(2)
        cache = packed_seq_params.cache
        if cache is not None and cache.decoding:
            # With sequence parallelism it comes once for each tensor-parallel rank, see `Molmo2Model.next_hidden`
            out = cache.attend(self.layer, query[:1], key[:1], value[:1], self.scale)
            return out.expand(query.shape).flatten(2)
        if cache is not None:
            cache.fill(self.layer, key, value)
        return self._attend(query, key, value, packed_seq_params).flatten(2)

    def rotated(self, query: Tensor, key: Tensor, pack: PackDescription) -> tuple[Tensor, Tensor]:
        """Rotary, and QK-norms where it computes them."""
        norms = (*(n.weight for n in self.qk_norms), self.qk_norms[0].eps) if self.qk_norms else ()
        return self.rotate(query, key, *pack.rotary[self.table], *norms)

    def carry(self, pack: ChunkedPack, query: Tensor) -> CarriedKeys:
        """For a layer whose queries (`query` is some of them) come in chunks."""
        return CarriedKeys(pack, self._kernel(query, merged=True), self.scale)

    @torch.compiler.disable  # as in `attend_across`
    def _attend(self, query: Tensor, key: Tensor, value: Tensor, pack: PackDescription) -> Tensor:
        """query [T, B, N, H], key and value [T, B, G, H] after rotary -> [T, B, N, H]."""
        groups = pack.groups or ContextGroups(None, None, None, None)
        kernel = self._kernel(query, merged=group_size(groups.ring) > 1)
        return attend_across(
            query, key, value, pack.mask, self.scale, kernel, groups, pack.visible, pack.kept, layer=self
        )

    def _kernel(self, query: Tensor, merged: bool) -> Kernel:
        return choose(
            self.kernel,
            query.device,
            query.dtype,
            query.shape[-1],
            merged=merged,
            library=self.library,
            merging=self.merging,
        )
