"""Molmo2, top to bottom: encode crops, pool them, add them to the embeddings, decode, and score the answers.

    crops --VisionEncoder--> features of two depths --Connector--> visual tokens
    token ids --Embedding--> vectors  + visual tokens at <im_patch>  --decoder--> --final norm--> --head--> loss

Parallel layouts. Tensor: decoder, embedding and head are sharded. Sequence: the decoder's residual stream is sharded
between its linear layers. Context: tokens are cut into contiguous shards, attention trades tokens for heads or shows
other ranks its keys (attention/across.py). Crops are sharded among the context x tensor ranks (parallel/crops.py).
Pipeline: vision and embedding live on the first stage, head and loss on the last.

Shape legend: B packs, S tokens of a pack, T = S / CP tokens of this rank, D width, C crops, N visual tokens.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from molmo2_nemo.attention.across import plan_attention
from molmo2_nemo.attention.cache import KVCache
from molmo2_nemo.attention.core import PackDescription
from molmo2_nemo.attention.kept import KeptResults
from molmo2_nemo.attention.kernels import choose
from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.attention.ring import VisibleKeys, visible_keys
from molmo2_nemo.features.frozen import FrozenFeatures
from molmo2_nemo.fused.choice import choose_all, in_common, possible
from molmo2_nemo.model.chunks import chunked_pack
from molmo2_nemo.model.config import PLAIN, KernelConfig, MemoryConfig, Molmo2Config, TrainingOptions
from molmo2_nemo.model.connector import Connector
from molmo2_nemo.model.decoder import decoder_spec
from molmo2_nemo.model.embedding import Embedding, Head
from molmo2_nemo.model.init import initialize
from molmo2_nemo.model.inputs import PackInputs, PackPlan
from molmo2_nemo.model.loss import LossSums, check_labels, sum_of_weights
from molmo2_nemo.model.memory import AHEAD, AHEAD_WITH_RESULTS, HostOffload
from molmo2_nemo.model.rotary import RotaryTables
from molmo2_nemo.model.vision import VisionEncoder
from molmo2_nemo.parallel.context import ContextGroups, ContextSettings, context_groups, group_size
from molmo2_nemo.parallel.crops import CropPlan, VisionRanks, mark_partial, plan_crops, send_to_owners, tie_parameters
from molmo2_nemo.transfer import to_device


def ways_of_all_ranks(dtype: torch.dtype) -> dict[str, frozenset[str]]:
    """The ways of every piece that each rank of the run can run on its GPU. A collective of all ranks."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, possible("cuda", dtype))
    return in_common(found)


class Molmo2Model(MegatronModule):
    """Molmo2 as a Megatron-core model; one pipeline stage of it where `pre_process` or `post_process` is False.

    Args:
        model_config: what the model is.
        config: Megatron's settings, from `decoder.transformer_config`.
        training: dropout and z-loss; None: neither.
        memory: what is traded for memory, as given to `transformer_config`; it changes no number.
        kernels: how pieces are computed; it changes numbers by rounding only.
        context: how ranks that share a pack work together in attention.
        seed: parameters are drawn from it, alike under every layout. None leaves them to be filled by the caller.

    With `config.init_model_with_meta_device` (and `use_cpu_initialization`) parameters have shapes but no memory.
    """

    def __init__(
        self,
        model_config: Molmo2Config,
        config: TransformerConfig,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        training: TrainingOptions | None = None,
        memory: MemoryConfig | None = None,
        kernels: KernelConfig | None = None,
        context: ContextSettings | None = None,
        seed: int | None,
    ) -> None:
        super().__init__(config=config)
        self.model_config = model_config
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = pre_process, post_process
        self.training_options, self.memory = training or PLAIN, memory or MemoryConfig()
        self._no_adapters = False
        self.features: FrozenFeatures | None = None  # set where the encoder is frozen: computes each crop once
        self.rotary = RotaryTables(model_config.text)
        self.groups = context_groups(context or ContextSettings())  # by the number of ranks that share a pack
        device = "cuda" if torch.cuda.is_available() else "cpu"
        merged = any(group_size(groups.ring) > 1 for groups in self.groups.values())
        among = ways_of_all_ranks(config.params_dtype) if device == "cuda" else None  # on CPU "auto" is plain anyway
        self.choices = choose_all(vars(kernels or KernelConfig()), device, config.params_dtype, among)
        self.kernel = choose(  # or raise an error that says why not
            model_config.attention,
            device,
            config.params_dtype,
            model_config.text.head_dim,
            merged=merged or self.memory.sequence_chunk is not None,
            library=self.choices["flash"].function,
            merging=self.choices["merge"].function,
        )
        # A kernel whose forward autograd goes through has no results to be given: it runs again in backward.
        self.keeps_attention = self.memory.keeps_attention and self.kernel.backward is not None
        ahead = AHEAD_WITH_RESULTS if self.keeps_attention else AHEAD
        self.offload = HostOffload(ahead=ahead) if self.memory.offload else None
        self.share_embeddings_and_output_weights = model_config.text.tie_embeddings
        meta = config.init_model_with_meta_device
        with torch.device("meta") if meta else contextlib.nullcontext():
            self._build()
        self._mark_shared_head()
        if not meta and seed is not None:
            initialize(self, seed)

    def _build(self) -> None:
        model_config, config, memory = self.model_config, self.config, self.memory
        if self.pre_process:
            block = self.choices["vision"]
            self.vision = VisionEncoder(
                model_config.vision,
                config.params_dtype,
                recompute=memory.recomputes_vision,
                block=None if block.name == "plain" else block.function,
            )
            self.connector = Connector(model_config, config.params_dtype, self.choices["pooling"].function)
            self.embedding = Embedding(config, model_config)
            if parallel_state.get_tensor_model_parallel_world_size() > 1:
                mark_partial(self.vision)
                mark_partial(self.connector)
        self.decoder = TransformerBlock(
            config,
            decoder_spec(model_config, get_num_layers_to_build(config), self.training_options, memory, self.choices),
            pre_process=self.pre_process,
            post_process=self.post_process,
        )
        if self.post_process and not (self.pre_process and model_config.text.tie_embeddings):
            self.output_layer = Head(config, model_config)

    def forward(self, inputs: PackInputs) -> Tensor | LossSums:
        """One micro-batch.

        Returns:
            On the last pipeline stage, with labels: this rank's part of the sums that make the loss (model/loss.py).
            Without labels: logits [B, T, V / TP], see `logits`. On other stages: the hidden states for the next one.
        """
        hidden = self.hidden_states(inputs)
        if not self.post_process:
            return hidden
        return self.logits(hidden) if inputs.labels is None else self.loss(hidden, inputs)

    def hidden_states(self, inputs: PackInputs, cache: KVCache | None = None) -> Tensor:
        """What comes out of this stage's layers for a micro-batch.

        Args:
            cache: is filled with the keys and values of all layers.

        Returns:
            On the last pipeline stage [T, B, D] behind the final norm, on every tensor-parallel rank. On other stages:
            what the next one takes.
        """
        hidden = None
        if self.pre_process:
            hidden = self.embedding(self.context_of(inputs).shard(inputs.input_ids))  # [T, B, D]
            if self.config.sequence_parallel:
                hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
            hidden = self.add_visual_tokens(hidden, inputs)
        pack = self.describe(inputs)
        pack.cache = cache
        hidden = self.decode(hidden, pack)
        return self._on_tensor_ranks(hidden) if self.post_process else hidden

    def next_hidden(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """What comes out of the last layer for the next token of each prompt, of a model of one pipeline stage.

        Args:
            tokens, positions: int64 [B], alike on all ranks that share the prompts.
            cache: filled by `hidden_states`; gets the token's keys and values.

        Returns:
            [B, D] behind the final norm.
        """
        # Sequence parallelism shards tokens: each rank gets one, the same.
        copies = parallel_state.get_tensor_model_parallel_world_size() if self.config.sequence_parallel else 1
        hidden = self.embedding(tokens[:, None].expand(-1, copies))
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        cache.next_token()
        tables = self.rotary.tables(positions[:, None].expand(-1, copies))
        hidden = self.decode(hidden, PackDescription(rotary=tables, cache=cache))
        return self._on_tensor_ranks(hidden)[0]

    def _on_tensor_ranks(self, hidden: Tensor) -> Tensor:
        if self.config.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(hidden)
        return tensor_parallel.copy_to_tensor_model_parallel_region(hidden)

    def plan(self, inputs: PackInputs) -> PackPlan:
        """Everything about a micro-batch that is found on the host, with its indices on the device, for `inputs.plan`:
        who may see whom, what the attention kernel makes of it, which crops go where, which positions have a loss. Of
        crops and windows the inputs keep what this rank works on.

        Without it each is found where it is first needed, between the device's kernels. Reads nothing that training
        changes, so it may run in another thread, ahead of training.
        """
        mask, visible = self._mask(inputs)
        groups, device, chunk = self.context_of(inputs), inputs.input_ids.device, self.memory.sequence_chunk
        if chunk is None:
            plan_attention(mask, groups, visible, self.kernel, device)
        else:
            chunked_pack(mask, groups, visible, self.config.sequence_parallel).plan(self.kernel, chunk, device)
        crops = self._crop_plan(inputs) if self.pre_process else None
        if self.features is not None and crops is not None:
            inputs.features = self.features.look_up(inputs.crops[crops.crops])
        inputs.keep_own_crops(crops, self.model_config.vision.num_patches)
        return PackPlan(
            mask,
            visible,
            None if crops is None else crops.within_run(),
            self._scored(inputs) if self.post_process and inputs.labels is not None else None,
        )

    def _mask(self, inputs: PackInputs) -> tuple[TokenMask, VisibleKeys | None]:
        if inputs.plan is not None:
            return inputs.plan.mask, inputs.plan.visible
        mask = inputs.mask(self.model_config.text.vocab_size, self.model_config.visual_attention)
        chunks = group_size(self.context_of(inputs).ring)
        return mask, visible_keys(mask, chunks) if chunks > 1 else None

    def _crop_plan(self, inputs: PackInputs) -> CropPlan:
        if inputs.plan is not None and inputs.plan.crops is not None:
            return inputs.plan.crops
        ranks = VisionRanks.of(self.context_of(inputs), self.config.sequence_parallel)
        units, chunk = inputs.vision_units(self.model_config), self.memory.vision_chunk
        plan = plan_crops(units, ranks, chunk, by_pack=inputs.encoded is not None)
        return plan.on(inputs.input_ids.device)

    def _scored(self, inputs: PackInputs) -> Tensor:
        """This rank's positions with a loss, chosen and checked on the host."""
        if inputs.plan is not None and inputs.plan.scored is not None:
            return inputs.plan.scored
        groups = self.context_of(inputs)
        scored = inputs.scored(groups)
        check_labels(groups.shard(inputs.on_host("labels")).T.reshape(-1)[scored], self.model_config.text.vocab_size)
        return to_device(scored, inputs.input_ids.device)

    def context_of(self, inputs: PackInputs) -> ContextGroups:
        """The groups of the ranks that share the micro-batch."""
        return inputs.groups or self.groups[max(self.groups)]

    def add_visual_tokens(self, hidden: Tensor, inputs: PackInputs) -> Tensor:
        """Encode and pool this rank's crops, send each visual token to its owner, add it to the embedding there.

        Args:
            hidden: [T, B, D], embeddings of this rank's tokens (T / TP of them with sequence parallelism).
        """
        groups = self.context_of(inputs)
        plan = self._crop_plan(inputs)
        visual = self._encode(inputs, plan)
        if visual is None:
            visual = hidden.new_zeros(0, hidden.shape[-1])
            visual = tie_parameters(tie_parameters(visual, self.vision), self.connector)
        visual = send_to_owners(visual, plan, groups.vision)
        flat = hidden.flatten(0, 1)
        return flat.index_add(0, plan.targets, visual.to(flat.dtype)).view_as(hidden)

    def _encode(self, inputs: PackInputs, plan: CropPlan) -> Tensor | None:
        """Visual tokens [this rank's pooled tokens, D]; None without crops.

        With `memory.vision_chunk` chunks are encoded one after another and, in training, recomputed in backward: only
        their crops and visual tokens are kept.
        """

        def encode(crops: slice, windows: Tensor) -> Tensor:
            return self.connector(self._features(inputs, plan, crops), windows)

        encoded = []
        for crops, pooled_tokens in plan.chunks:
            windows = inputs.pooling[pooled_tokens]
            windows = torch.where(windows >= 0, windows - crops.start * self.model_config.vision.num_patches, windows)
            if self.memory.vision_chunk is not None and self.training and torch.is_grad_enabled():
                encoded.append(torch.utils.checkpoint.checkpoint(encode, crops, windows, use_reentrant=False))
            elif inputs.encoded is not None:
                encoded.append(inputs.encoded.of(crops, windows, encode))
            else:
                encoded.append(encode(crops, windows))
        return torch.cat(encoded) if encoded else None

    def _features(self, inputs: PackInputs, plan: CropPlan, crops: slice) -> Tensor:
        """Features of some of this rank's crops, [c, P, F]."""
        if self.features is None:
            return self.vision(inputs.crops[crops])
        if inputs.features is None:
            inputs.features = self.features.look_up(inputs.crops[plan.crops])
        first = plan.crops.start
        return self.features.encode(
            inputs.crops[crops], inputs.features, slice(crops.start - first, crops.stop - first)
        )

    def decode(self, hidden: Tensor | None, pack: PackDescription) -> Tensor:
        """This stage's decoder layers, [T, B, D] -> the same (None where the stage before sends the input)."""
        if hidden is not None and self.config.recompute_granularity is not None and torch.is_grad_enabled():
            # Megatron's checkpoints are reentrant: where no input requires grad, what they recompute gets no
            # gradient. So it is when all in front of the decoder is frozen. Costs one more [T, B, D], the gradient of
            # the input.
            hidden.requires_grad_()
        saved: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.offload is not None and torch.is_grad_enabled():
            tables = [table for pair in pack.rotary.values() for table in pair]
            saved = self.offload.active(keep=[*self.decoder.parameters(), *tables])
        with saved as line:
            if self.keeps_attention and self.memory.sequence_chunk is None and torch.is_grad_enabled():
                pack = copy.copy(pack)  # results belong to this pass alone
                pack.kept = KeptResults() if line is None else KeptResults(line.pack, line.unpack)
            return self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=pack)

    def describe(self, inputs: PackInputs) -> PackDescription:
        """What every attention layer must know about the micro-batch."""
        groups = self.context_of(inputs)
        response = None
        if self.training_options.response_residual_dropout and inputs.loss_weights is not None:
            response = (groups.shard(inputs.loss_weights) > 0).T[..., None]
            if self.config.sequence_parallel:
                group = parallel_state.get_tensor_model_parallel_group()
                response = response.chunk(group.size())[group.rank()]
        mask, visible = self._mask(inputs)
        return PackDescription(
            mask=mask,
            rotary=self.rotary.tables(groups.shard(inputs.position_ids)),
            groups=groups,
            visible=visible,
            response=response,
        )

    def loss(self, hidden: Tensor, inputs: PackInputs) -> LossSums:
        """Weighted loss of this rank's response positions; only they reach the head. hidden: [T, B, D]."""
        assert inputs.labels is not None and inputs.loss_weights is not None
        groups = self.context_of(inputs)
        own = groups.shard(inputs.loss_weights)  # [B, T]
        weights = own.T.flatten()  # [T * B]
        scored = self._scored(inputs)
        each = torch.empty_like(weights[scored], dtype=torch.float32) if inputs.tasks is not None else None
        loss = self.choices["loss"].function(
            hidden.flatten(0, 1)[scored],
            self.head_weight(),
            groups.shard(inputs.labels).T.flatten()[scored],
            weights[scored],
            self.training_options.z_loss,
            self.model_config.text.vocab_size,
            parallel_state.get_tensor_model_parallel_group(),
            self.memory.loss_chunk,
            each,
        )
        by_task = None
        if each is not None and inputs.tasks is not None:
            tasks = groups.shard(inputs.tasks).T.flatten()[scored]
            sums = torch.stack((each, weights[scored].float()))
            by_task = sums.new_zeros(2, inputs.num_tasks).index_add_(1, tasks, sums)
        return LossSums(loss, sum_of_weights(own), by_task)

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, B, D] -> [B, T, columns of this tensor-parallel rank]; all ranks' together are the V base columns.

        Padding columns are cut off (the last rank has fewer), and the extra ids have none: they are never predicted.
        """
        weight = self.head_weight()
        start = parallel_state.get_tensor_model_parallel_rank() * weight.shape[0]
        return (hidden @ weight[: max(0, self.model_config.text.vocab_size - start)].T).transpose(0, 1)

    def head_weight(self) -> Tensor:
        return self.embedding.base.weight if hasattr(self, "embedding") and self._tied() else self.output_layer()

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
        """The state for a checkpoint. The last stage's copy of a tied head is stored as the embedding that it
        copies."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state = {key: value for key, value in state.items() if self.in_checkpoint(key)}
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

    def in_checkpoint(self, name: str) -> bool:
        """Whether `sharded_state_dict` has the parameter, by the end of its name."""
        return not (self._no_adapters and name.endswith((".lora_a", ".lora_b")))

    @contextlib.contextmanager
    def without_adapters(self, without: bool = True) -> Iterator[None]:
        """Inside the block, `sharded_state_dict` leaves adapters out: to start from a checkpoint that has none."""
        self._no_adapters = without
        try:
            yield
        finally:
            self._no_adapters = False

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
