"""Molmo2, top to bottom: encode crops, pool them, add them to the embeddings, decode, and score the answers.

    crops --VisionEncoder--> features of two depths --Connector--> visual tokens
    token ids --Embedding--> vectors  + visual tokens at <im_patch>  --decoder--> --final norm--> --head--> loss

Parallel layouts. Tensor: decoder, embedding and head are sharded, vision is replicated. Sequence: the decoder's
residual stream is sharded between its linear layers. Context: tokens are cut into contiguous shards, crops are dealt to
ranks (parallel/crops.py), attention trades tokens for heads (attention/ulysses.py). Pipeline: vision and embedding live
on the first stage, head and loss on the last.

Shape legend: B packs, S tokens of a pack, T = S / CP tokens of this rank, D width, C crops, N visual tokens.
"""

from __future__ import annotations

import contextlib

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from molmo2_nemo.attention.core import PackDescription
from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.model.connector import Connector
from molmo2_nemo.model.decoder import decoder_spec
from molmo2_nemo.model.embedding import Embedding, Head
from molmo2_nemo.model.init import initialize
from molmo2_nemo.model.inputs import PackInputs, visual_blocks
from molmo2_nemo.model.loss import weighted_loss
from molmo2_nemo.model.memory import HostOffload
from molmo2_nemo.model.rotary import rotary_tables
from molmo2_nemo.model.vision import VisionEncoder
from molmo2_nemo.parallel.crops import exchange, plan_crops, tie_parameters


class Molmo2Model(MegatronModule):
    """Molmo2 as a Megatron-core model; one pipeline stage of it where `pre_process` or `post_process` is False.

    Args:
        molmo2: what the model is.
        config: Megatron's settings, from `decoder.transformer_config`.
        z_loss: weight of logsumexp^2 in the loss.
        response_dropout: residual dropout of response tokens only (stage 1); config.hidden_dropout is for all others.
        mlp_tiles, offload, loss_chunk: see MemoryConfig; they change no number.
        seed: parameters are drawn from it, alike under every layout. None leaves them to be filled by the caller.

    With `config.init_model_with_meta_device` (and `use_cpu_initialization`) parameters have shapes but no memory.
    """

    def __init__(
        self,
        molmo2: Molmo2Config,
        config: TransformerConfig,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        z_loss: float = 1e-4,
        response_dropout: float = 0.0,
        mlp_tiles: int = 1,
        offload: bool = False,
        loss_chunk: int = 1024,
        seed: int | None = 6198,
    ) -> None:
        super().__init__(config=config)
        self.molmo2 = molmo2
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = pre_process, post_process
        self.z_loss, self.response_dropout = z_loss, response_dropout
        self.mlp_tiles, self.loss_chunk = mlp_tiles, loss_chunk
        self.offload = HostOffload() if offload else None
        self.share_embeddings_and_output_weights = molmo2.text.tie_embeddings
        meta = config.init_model_with_meta_device
        with torch.device("meta") if meta else contextlib.nullcontext():
            self._build()
        self._mark_shared_head()
        if not meta and seed is not None:
            initialize(self, seed)

    def _build(self) -> None:
        molmo2, config = self.molmo2, self.config
        if self.pre_process:
            self.vision = VisionEncoder(molmo2.vision, config.params_dtype)
            self.connector = Connector(molmo2, config.params_dtype)
            self.embedding = Embedding(config, molmo2)
        self.decoder = TransformerBlock(
            config,
            decoder_spec(molmo2, get_num_layers_to_build(config), self.response_dropout, self.mlp_tiles),
            pre_process=self.pre_process,
            post_process=self.post_process,
        )
        if self.post_process and not (self.pre_process and molmo2.text.tie_embeddings):
            self.output_layer = Head(config, molmo2)

    def forward(self, inputs: PackInputs) -> Tensor:
        """One micro-batch.

        Returns:
            On the last pipeline stage, with labels: this rank's sum of weighted token losses, fp32 scalar (a part of
            the sum over the context-parallel group). Without labels: logits [B, T, V / TP], see `logits`. On other
            stages: the hidden states for the next one.
        """
        hidden = None
        if self.pre_process:
            hidden = self.embedding(self._local(inputs.input_ids))  # [T, B, D]
            hidden = self.add_visual_tokens(hidden, inputs)
            if self.config.sequence_parallel:
                hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        hidden = self.decode(hidden, self.describe(inputs))
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        return self.logits(hidden) if inputs.labels is None else self.loss(hidden, inputs)

    def add_visual_tokens(self, hidden: Tensor, inputs: PackInputs) -> Tensor:
        """Encode and pool this rank's crops, send each visual token to its owner, add it to the embedding there.

        Args:
            hidden: [T, B, D], embeddings of this rank's tokens.
        """
        group = parallel_state.get_context_parallel_group()
        packs, size = inputs.input_ids.shape
        plan = plan_crops(
            inputs.unit_crops, inputs.unit_rows, inputs.pooled_positions, size, packs, group.size(), group.rank()
        )
        crops = inputs.crops[plan.crops]
        if len(crops):
            features = self.vision(crops)
            windows = inputs.pooling[plan.rows]
            offset = plan.crops.start * self.molmo2.vision.num_patches
            visual = self.connector(features, torch.where(windows >= 0, windows - offset, windows))
        else:
            visual = hidden.new_zeros(0, hidden.shape[-1])
            visual = tie_parameters(tie_parameters(visual, self.vision), self.connector)
        visual = exchange(visual, plan, group)
        flat = hidden.flatten(0, 1)
        return flat.index_add(0, plan.targets.to(flat.device), visual.to(flat.dtype)).view_as(hidden)

    def decode(self, hidden: Tensor | None, pack: PackDescription) -> Tensor:
        """This stage's decoder layers, [T, B, D] -> the same (None where the stage before sends the input)."""
        saved: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.offload is not None and torch.is_grad_enabled():
            tables = [table for pair in pack.rotary.values() for table in pair]
            saved = self.offload.active(keep=[*self.decoder.parameters(), *tables])
        with saved:
            return self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=pack)

    def describe(self, inputs: PackInputs) -> PackDescription:
        """What every attention layer must know about the micro-batch."""
        blocks = visual_blocks(inputs.input_ids, inputs.visual, self.molmo2.text.vocab_size)
        response = None
        if self.response_dropout and inputs.loss_weights is not None:
            response = (self._local(inputs.loss_weights) > 0).T[..., None]
            if self.config.sequence_parallel:
                group = parallel_state.get_tensor_model_parallel_group()
                response = response.chunk(group.size())[group.rank()]
        return PackDescription(
            mask=TokenMask(inputs.example_ids, inputs.branch_ids, blocks, self.molmo2.visual_attention),
            rotary=rotary_tables(self.molmo2.text, self._local(inputs.position_ids)),
            response=response,
        )

    def loss(self, hidden: Tensor, inputs: PackInputs) -> Tensor:
        """Weighted loss of this rank's response positions; only they reach the head. hidden: [T, B, D]."""
        assert inputs.labels is not None and inputs.loss_weights is not None
        weights = self._local(inputs.loss_weights).T.flatten()  # [T * B]
        scored = weights.nonzero()[:, 0]
        return weighted_loss(
            hidden.flatten(0, 1)[scored],
            self.head_weight(),
            self._local(inputs.labels).T.flatten()[scored],
            weights[scored],
            self.z_loss,
            self.molmo2.text.vocab_size,
            parallel_state.get_tensor_model_parallel_group(),
            self.loss_chunk,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, B, D] -> [B, T, columns of this tensor-parallel rank]; all ranks' together are the V base columns.

        Padding columns are cut off (the last rank has fewer), and the extra ids have none: they are never predicted.
        """
        weight = self.head_weight()
        start = parallel_state.get_tensor_model_parallel_rank() * weight.shape[0]
        return (hidden @ weight[: max(0, self.molmo2.text.vocab_size - start)].T).transpose(0, 1)

    def head_weight(self) -> Tensor:
        return self.embedding.base.weight if hasattr(self, "embedding") and self._tied() else self.output_layer.weight

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied weight on the stages that hold a copy; Megatron adds their gradients up."""
        if self.pre_process:
            return self.embedding.base.weight
        return self.output_layer.weight if self.post_process else None

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Hidden states from the stage before (called by Megatron's schedules)."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As Megatron's, but the last stage's copy of a tied head is stored as the embedding it copies."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self._tied() and self.post_process and not self.pre_process:
            state[f"{prefix}output_layer.weight"] = make_tp_sharded_tensor_for_checkpoint(
                tensor=self.output_layer.weight,
                key=f"{prefix}embedding.base.weight",
                replica_id=(1, 0, parallel_state.get_data_parallel_rank(with_context_parallel=True)),
                allow_shape_mismatch=True,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            )
        return state

    def _tied(self) -> bool:
        return self.share_embeddings_and_output_weights

    def _mark_shared_head(self) -> None:
        """Megatron's attributes for a tied weight that lives on two stages: sum its gradients, count its norm once."""
        if not self._tied() or (self.pre_process and self.post_process):
            return
        weight = self.shared_embedding_or_output_weight()
        if weight is not None:
            weight.shared_embedding = True  # type: ignore[attr-defined]
            weight.shared = not self.pre_process  # type: ignore[attr-defined]

    def _local(self, tokens: Tensor) -> Tensor:
        """[B, S] -> [B, T]: this context rank's contiguous shard."""
        group = parallel_state.get_context_parallel_group()
        size = tokens.shape[1] // group.size()
        return tokens[:, group.rank() * size : (group.rank() + 1) * size]
