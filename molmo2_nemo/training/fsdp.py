"""Parameters sharded over data-parallel and context ranks by Megatron-FSDP (`parallel.fsdp=megatron`).

Megatron-FSDP does the work: parameters, gradients and optimizer state lie in shards, those of a decoder layer are
gathered before it runs and dropped after. What is here makes it safe for a model whose ranks do not all run the same
modules, and writes checkpoints that any other layout reads.

Order: the vision encoder runs only on ranks that have crops, and gathering is a collective. So what is outside the
decoder's layers (encoder, connector, embedding, head) is gathered by all ranks when a forward pass begins and stays
until the update, and its gradients are reduced by all when a backward pass is over.

Checkpoints: rows of each parameter, under the keys and with the global shapes that Megatron's other layouts have. No
rank gathers a parameter for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import FullyShardedDataParallel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from molmo2_nemo.convert.megatron_io import PREFIX
from molmo2_nemo.model.loss import LossSums
from molmo2_nemo.model.molmo2 import Molmo2Model

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def is_sharded(chunk: Any) -> bool:
    """Whether a part of the model is in Megatron-FSDP, not in DistributedDataParallel."""
    return isinstance(chunk, FullyShardedDataParallel)


def local(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that this rank holds; any other tensor as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def whole_entries(model: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds of a model, by name; to be asked before the model is sharded."""
    return {name: _one_tensor(entry) for name, entry in model.sharded_state_dict(metadata=metadata).items()}


def install(chunk: FullyShardedDataParallel, saved: dict[str, Any]) -> None:
    """Make collectives come in one order on all ranks, and the checkpoint that of other layouts. Called once, before
    the optimizer is made.

    Args:
        saved: from `whole_entries`.
    """
    fsdp = chunk.module
    groups = fsdp.param_and_grad_buffer.parameter_groups
    outside = [p for group in groups if group.fsdp_unit_id is None for p in group.params]
    for parameter in outside:  # the hook at the end of a backward pass reduces what is left, by name
        if parameter.requires_grad:
            fsdp.grad_acc_hooks[f"grad_acc and reduce for {fsdp.param_to_name[parameter]}"].remove()
    _begin_with_the_loss(fsdp)
    _gather_ahead_inside_only(fsdp.all_gather_pipeline, {*map(id, outside)})

    def gather(*unused: Any) -> None:
        fsdp._replace_param_with_raw_if_needed()
        fsdp.all_gather_and_wait_parameters_ready(params=outside, prefetch=False)

    fsdp.register_forward_pre_hook(gather)
    chunk.saved = saved
    chunk.sharded_state_dict = lambda *unused, **ignored: model_state(chunk)


def _one_tensor(entry: Any) -> Any:
    """An entry of a checkpoint; a factory's as one tensor. Without tensor parallelism it only cuts the two halves of
    SwiGLU at rows."""
    if not isinstance(entry, ShardedTensorFactory):
        return entry
    built = entry.build()
    return next(iter(built.values() if isinstance(built, dict) else built))


def _begin_with_the_loss(fsdp: Any) -> None:
    """Let the hook that begins a backward pass see the loss. Megatron-FSDP hangs it on the model's output where that is
    tensors, and on the last of the model's modules, which need not be the last to run."""
    fsdp._root_pre_backward_hook_handle.remove()
    begins = fsdp.module._forward_hooks[fsdp.backward_pre_hooks[" _root_pre_backward"].id]

    def see_loss(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, LossSums) and output.loss.requires_grad:
            return dataclasses.replace(output, loss=begins(module, inputs, output.loss))
        return output

    fsdp.register_forward_hook(see_loss)


def _gather_ahead_inside_only(pipeline: Any, outside: set[int]) -> None:
    """Let only layers of the decoder, which all ranks run alike, begin to gather what comes after them."""
    gather = pipeline.all_gather_params

    def gather_in_order(params: Any, prefetch: bool = False, **options: Any) -> Any:
        return gather(params=params, prefetch=prefetch and not any(id(p) in outside for p in params), **options)

    pipeline.all_gather_params = gather_in_order


class Part:
    """The rows of one parameter that this rank holds.

    Attributes:
        name: of the parameter, within the model.
        weight: what the optimizer updates, fp32 with bf16 parameters; a DTensor.
        rows: first one and the one after the last; of a parameter without dimensions or with one, elements.
        model: the rows as the model computes with them.
        main: the fp32 copy of them, where there is one.
    """

    def __init__(self, name: str, weight: Any, group: Any) -> None:
        self.name, self.weight = name.removeprefix(PREFIX), weight  # bf16 wraps once more
        shape = weight.orig_param.shape
        item = group.model_weight_buffer.param_idx[weight.orig_param]
        begin, end = group.model_weight_buffer.locate_item_in_global_item(item)
        row = max(1, shape[1:].numel())
        self.rows = begin // row, end // row
        self.shape = (self.rows[1] - self.rows[0], *shape[1:])

        def rows_of(buffer: Any) -> Tensor:
            return buffer.get_item(item, only_shard=True).view(self.shape)

        self.model = rows_of(group.model_weight_buffer)
        self.main = rows_of(group.main_weight_buffer) if group.main_weight_buffer is not None else None

    def entry(self, whole: ShardedTensor, data: Tensor, prefix: str = "") -> ShardedTensor:
        """These rows in a checkpoint.

        Args:
            whole: the parameter, from `whole_entries`.
            data: of `shape`.
            prefix: what stands before the key of the model's own tensor.
        """
        before = whole.prepend_axis_num
        return dataclasses.replace(
            whole,
            key=f"{prefix}{PREFIX}{whole.key}",
            data=data.view(*(1,) * before, *self.shape),
            dtype=data.dtype,
            local_shape=(*(1,) * before, *self.shape),
            global_offset=(*whole.global_offset[:before], self.rows[0], *(0,) * (len(self.shape) - 1)),
            global_shape=(*whole.global_shape[:before], *self.weight.orig_param.shape),
            axis_fragmentations=None,  # rows of different ranks are not equally many
            replica_id=(0, 0, 0),
            prepend_axis_num=0,
            allow_shape_mismatch=False,
        )


def parts(chunk: FullyShardedDataParallel) -> Iterator[Part]:
    """The parameters of which this rank holds some."""
    buffer = chunk.module.param_and_grad_buffer
    for name, weight in buffer.optimizer_named_parameters:
        part = Part(name, weight, buffer.parameter_groups[buffer.param_to_param_group[weight.orig_param]])
        if part.rows[1] > part.rows[0]:
            yield part


def model_state(chunk: FullyShardedDataParallel) -> dict[str, Any]:
    """This rank's rows of the model, as they are, for a checkpoint to write or to read into."""
    model = next(module for module in chunk.modules() if isinstance(module, Molmo2Model))
    found: dict[str, Any] = {part.name: part.entry(chunk.saved[part.name], part.model) for part in parts(chunk)}
    for name, entry in chunk.saved.items():
        if not isinstance(entry, ShardedTensor):  # what Transformer Engine keeps beside parameters
            found[name] = dataclasses.replace(entry, key=f"{PREFIX}{entry.key}")
    return {f"{PREFIX}{name}": entry for name, entry in found.items() if model.in_checkpoint(name)}


@torch.no_grad()
def load_model_state(chunk: FullyShardedDataParallel, state: dict[str, Tensor], *, main: bool, strict: bool) -> None:
    """Take what `model_state` asked for.

    Args:
        state: what was read, by name.
        main: also as the fp32 copies, where no state of the optimizer follows.
        strict: every parameter must be there.
    """
    for part in parts(chunk):
        found = state.get(f"{PREFIX}{part.name}")
        if found is None and strict:
            raise KeyError(f"{part.name} is not in the checkpoint")
        if found is not None:
            part.model.copy_(found.view(part.shape))
            if main and part.main is not None:
                part.main.copy_(part.model)


def keep_rows(optimizer: Any, chunks: list[FullyShardedDataParallel]) -> None:
    """Let the state of a DistributedOptimizer be written and read as rows, under the names that the optimizer has with
    whole parameters (Megatron's `fully_reshardable`). Megatron's own for FSDP are readable by FSDP only."""
    inner = optimizer.optimizer

    def step() -> float:
        counted = [s["step"] for s in inner.state.values() if "step" in s]  # empty rows are never updated
        counted += [group["step"] for group in inner.param_groups if "step" in group]
        return max(map(float, counted), default=0.0)

    def state_dict() -> dict[str, Any]:
        common = {"step": step()}
        groups = [{k: v for k, v in group.items() if k != "params"} | common for group in inner.param_groups]
        return {"optimizer": {"param_groups": groups}}

    def tensors() -> Iterator[tuple[FullyShardedDataParallel, Part, dict[str, Tensor]]]:
        for chunk in chunks:
            for part in parts(chunk):
                if (own := inner.state.get(part.weight)) is not None:
                    yield chunk, part, {"param": local(part.weight), **{key: local(own[key]) for key in MOMENTS}}

    @torch.no_grad()
    def sharded_state_dict(*unused: Any, **ignored: Any) -> dict[str, Any]:
        rows = {
            part.name: {
                key: part.entry(chunk.saved[part.name], tensor.view(part.shape), f"optimizer.state.{key}.")
                for key, tensor in state.items()
            }
            for chunk, part, state in tensors()
        }
        return state_dict() | {"param_state": rows, "param_state_sharding_type": "fully_reshardable"}

    @torch.no_grad()
    def load_state_dict(state: dict[str, Any]) -> None:
        saved = {group["name"]: group for group in state["optimizer"]["param_groups"]}
        for group in inner.param_groups:
            group.update({key: value for key, value in saved[group["name"]].items() if key != "params"})
        for own in inner.state.values():
            if "step" in own:
                own["step"].fill_(step())
        for _, part, here in tensors():
            for key, tensor in here.items():
                tensor.view(part.shape).copy_(state["param_state"][part.name][key].view(part.shape))
        for chunk in chunks:
            chunk.module.install_optimized_model_weights()

    optimizer.state_dict, optimizer.load_state_dict = state_dict, load_state_dict
    optimizer.sharded_state_dict = sharded_state_dict
