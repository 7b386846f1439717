"""Molmo2's optimizer on Megatron-core: AdamW, each parameter group clipped on its own, steps that can be refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import param_is_not_shared
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor

from molmo2_nemo.settings.run import OPTIMIZER_GROUPS, OptimConfig
from molmo2_nemo.training.groups import group_overrides, name_saved_groups

# Called on every rank with each group's norm before clipping, alike on all ranks, and its learning rate. True: weights
# and moments stay as they are.
Skips = Callable[[dict[str, float], dict[str, float]], bool]


def adam_config(optim: OptimConfig, *, bf16: bool, distributed: bool) -> OptimizerConfig:
    """Megatron's settings of the optimizer.

    Args:
        bf16: parameters are bf16 with fp32 master weights.
        distributed: shard master weights and moments over data-parallel ranks.
    """
    return OptimizerConfig(
        optimizer="adam",
        lr=max(getattr(optim, g).lr for g in OPTIMIZER_GROUPS),
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=0.0,  # GroupClippingOptimizer clips; Megatron's joint clipping stays off
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=distributed,
    )


def clipping_optimizer(
    config: OptimizerConfig, chunks: list[Any], optim: OptimConfig, skips: Skips, *, use_gloo_process_groups: bool
) -> GroupClippingOptimizer:
    """The optimizer of a model, every group at its peak rate until a schedule sets another.

    Args:
        config: from `adam_config`.
        chunks: this rank's parts of the model, each in Megatron's DistributedDataParallel.
        use_gloo_process_groups: for Megatron's distributed optimizer.
    """
    megatron = get_megatron_optimizer(
        config,
        chunks,
        config_overrides=group_overrides(optim),  # type: ignore[arg-type]
        use_gloo_process_groups=use_gloo_process_groups,
    )
    inner = megatron.chained_optimizers if isinstance(megatron, ChainedOptimizer) else [megatron]
    clipping = GroupClippingOptimizer(inner, optim.clip_grad, skips)
    for made in clipping.param_groups:
        made["lr"] = made["initial_lr"] = made["max_lr"]
    for optimizer in inner:
        _materialise_adam_state(optimizer)
    return clipping


class GroupClippingOptimizer(ChainedOptimizer):
    """Megatron's optimizer, each parameter group clipped to its own L2 norm.

    Args:
        clip_grad: the largest norm of a group; 0: as it is.
    """

    def __init__(self, chained_optimizers: list[MegatronOptimizer], clip_grad: float, skips: Skips) -> None:
        super().__init__(chained_optimizers)
        self.clip_grad, self.skips = clip_grad, skips

    def load_state_dict(self, state_dict: Any) -> None:
        """Load a state, groups matched by their names. Every parameter gets a `step` of its own: Megatron
        gives all of torch's AdamW states one and the same tensor, which would be counted up once per parameter."""
        name_saved_groups(state_dict)
        super().load_state_dict(state_dict)
        for optimizer in self.chained_optimizers:
            for state in optimizer.optimizer.state.values():
                if torch.is_tensor(state.get("step")):
                    state["step"] = state["step"].clone()

    @torch.no_grad()
    def step(self) -> tuple[bool, float | None, int | None]:
        if self.prepare_grads():
            return False, None, None
        norms, rates = {}, {}
        for optimizer in self.chained_optimizers:
            for group in optimizer.param_groups:
                norms[group["name"]] = self._clip(optimizer, group["params"])
                rates[group["name"]] = group["lr"]
        if self.skips(norms, rates):
            return False, None, None
        return self.step_with_ready_grads(), math.sqrt(sum(norm**2 for norm in norms.values())), None

    def _clip(self, optimizer: MegatronOptimizer, parameters: list[Tensor]) -> float:
        grads = [
            p.grad
            for p in parameters
            if p.grad is not None and param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p)
        ]
        norm = l2_norm(grads, optimizer.get_grad_stats_parallel_group())
        if parameters and self.clip_grad > 0 and math.isfinite(norm):
            clip_grad_by_total_norm_fp32(parameters, self.clip_grad, norm)
        return norm


def l2_norm(tensors: list[Tensor], group: Any) -> float:
    """L2 norm over all tensors of all ranks of `group`, summed in fp64.

    Megatron's own (fp32 on a machine without Apex) is off by up to 3e-5 on a 200,000-element gradient, which is more
    than two layouts of one run may differ.
    """
    squares = [torch.linalg.vector_norm(t, dtype=torch.float64).square() for t in tensors]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
    total = total.to(torch.cuda.current_device())
    torch.distributed.all_reduce(total, group=group)
    return math.sqrt(total.item())


def _materialise_adam_state(optimizer: MegatronOptimizer) -> None:
    """torch's AdamW makes its state at the first step; Megatron's checkpoint code wants it, and one `step`, before."""
    inner = optimizer.optimizer
    if not isinstance(inner, torch.optim.AdamW):
        return
    for group in inner.param_groups:
        for p in group["params"]:
            inner.state[p] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(p.data),
                "exp_avg_sq": torch.zeros_like(p.data),
            }
    if isinstance(optimizer, DistributedOptimizer):
        _keep_step_on_load(optimizer)
        if not inner.state:  # a pipeline stage where nothing trains; Megatron would look for a `step` there
            optimizer.state_dict = lambda: {"optimizer": _groups_without_parameters(inner)}


def _groups_without_parameters(inner: torch.optim.Optimizer) -> dict[str, Any]:
    """What Megatron keeps of an optimizer besides tensors; `step` is that of the stages that train, on loading."""
    groups = [{k: v for k, v in group.items() if k != "params"} | {"step": 0.0} for group in inner.param_groups]
    return {"param_groups": groups}


def _keep_step_on_load(optimizer: DistributedOptimizer) -> None:
    """The reshardable checkpoint holds moments and master weights per parameter, and `step` once, elsewhere; Megatron's
    loader would look for it among the former."""
    load = optimizer._set_main_param_and_optimizer_states

    def load_keeping_step(parameter: Tensor, tensors: dict[str, Tensor]) -> None:
        group, order = optimizer.model_param_group_index_map[parameter]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
        load(parameter, {"step": state["step"], **tensors})

    optimizer._set_main_param_and_optimizer_states = load_keeping_step
