"""Molmo2's optimizer on NeMo: groups with their own learning rate, warm-up and clipping; weighted-mean gradients.

NeMo 2.7's `MegatronOptimizerModule` calls Megatron-core with arguments that 0.16 no longer takes, clips one global norm
and warms every group up alike; this subclass does what the published recipe says instead:

  * groups `vit`, `connector` (with the 128 extra embedding rows) and `llm` are the fields of OptimConfig, which also
    says how the names of their parameters begin; a parameter group knows its own by "name";
  * each group's L2 norm is taken over all shards and clipped on its own;
  * the learning rate is in lr_schedule.py;
  * gradients are divided by the sum of loss weights of the whole global batch (model/loss.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import param_is_not_shared
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from nemo.core.optim.mcore_optim import McoreDistributedOptimizer
from nemo.lightning.pytorch.optim import MegatronOptimizerModule
from nemo.utils import AppState
from torch import Tensor

from molmo2_nemo.nemo.lr_schedule import GroupSchedule
from molmo2_nemo.settings.run import OPTIMIZER_GROUPS, FaultConfig, OptimConfig
from molmo2_nemo.training.faults import FaultGuard
from molmo2_nemo.training.step_result import StepResult

# Megatron's checkpoints match parameter groups by lr_mult, among fields that are alike for all of ours. Nothing
# multiplies by it: GroupSchedule sets the rates.
LR_MULT = {name: float(number) for number, name in enumerate(OPTIMIZER_GROUPS, start=1)}
UNNAMED = {"vit": 1.0, "connector": 2.0, "llm": 3.0}  # lr_mult in checkpoints from before groups had names


def group_of(name: str) -> str:
    """The optimizer group of a parameter, by its canonical (or wrapped) name."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return next(group for group, beginnings in OPTIMIZER_GROUPS.items() if name.startswith(beginnings))


class Molmo2Optimizer(MegatronOptimizerModule):
    """AdamW as published, on Megatron-core's (distributed) optimizer.

    Args:
        optim: learning rates, warm-ups, betas and clipping.
        max_steps: horizon of the cosine, in optimizer steps.
        bf16: parameters are bf16 with fp32 master weights.
        distributed: shard master weights and moments over data-parallel ranks.
        faults: which steps are skipped.

    `result` is the StepResult of the current step, which Molmo2Module renews when a step begins.
    """

    def __init__(
        self,
        optim: OptimConfig,
        max_steps: int,
        *,
        bf16: bool = False,
        distributed: bool = True,
        faults: FaultConfig | None = None,
    ) -> None:
        config = OptimizerConfig(
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
        super().__init__(config=config, lr_scheduler=GroupSchedule(optim, max_steps))
        self.optim = optim
        self.guard = FaultGuard(faults or FaultConfig())
        self.result = StepResult()

    def optimizers(self, model: Any) -> list[torch.optim.Optimizer]:
        overrides: dict[ParamKey, dict[str, Any]] = {}
        for group in OPTIMIZER_GROUPS:
            predicate = ParamWithNamePredicate(name=group, fn=lambda p, name, group=group: group_of(name) == group)
            overrides[ParamKey(with_name_predicate=predicate)] = dict(
                name=group,
                max_lr=getattr(self.optim, group).lr,
                min_lr=getattr(self.optim, group).lr * self.optim.final_lr_fraction,
                lr_mult=LR_MULT[group],
                wd_mult=1.0,
            )
        megatron = get_megatron_optimizer(
            self.config,
            [chunk.module for chunk in model],
            config_overrides=overrides,  # type: ignore[arg-type]
            use_gloo_process_groups=AppState().use_gloo_process_groups,
        )
        inner = megatron.chained_optimizers if isinstance(megatron, ChainedOptimizer) else [megatron]
        clipping = GroupClippingOptimizer(inner, self.optim.clip_grad, self._skips)
        for made in clipping.param_groups:
            made["lr"] = made["initial_lr"] = made["max_lr"]
        for optimizer in inner:
            _materialise_adam_state(optimizer)
        return [_NeMoOptimizer(clipping)]

    def _skips(self, norms: dict[str, float], rates: dict[str, float]) -> bool:
        """Write the optimizer's figures into the step result; True if the step must be skipped."""
        result = self.result
        result.gradient_norms, result.learning_rates = norms, rates
        loss = None if result.loss is None else float(result.loss)
        skips = self.guard.skips(loss, [norms.get(group, 0.0) for group in OPTIMIZER_GROUPS])
        result.fault, result.skipped_steps = self.guard.reason, self.guard.total
        return skips

    def finalize_model_grads(self, model: Any, num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        """Megatron's reductions, then division by the global batch's sum of loss weights.

        Megatron counts tokens in an integer tensor; loss weights are floats, so this rank's sum of them is handed over
        instead, fp32 [1]; Megatron adds it up over data and context parallel ranks. Stages without a loss hand over
        zero: Megatron broadcasts the last stage's.
        """
        weight = torch.as_tensor(self.result.weight, dtype=torch.float32, device=torch.cuda.current_device())
        finalize_model_grads(model, weight.reshape(1), **kwargs)
        sum_partial_gradients(model)


class GroupClippingOptimizer(ChainedOptimizer):
    """Megatron's optimizer, each parameter group clipped to its own L2 norm.

    Args:
        skips: called on every rank with each group's norm before clipping, alike on all ranks, and its learning rate;
            True leaves weights and moments as they are.
    """

    def __init__(
        self,
        chained_optimizers: list[MegatronOptimizer],
        clip_grad: float,
        skips: Callable[[dict[str, float], dict[str, float]], bool],
    ) -> None:
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


def sum_partial_gradients(model: list[Any]) -> None:
    """Add up over the tensor-parallel group what its ranks computed from different crops (parallel/crops.py)."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    grads = [
        p.main_grad
        for m in model
        for p in m.parameters()
        if getattr(p, "partial_over_tensor", False) and p.requires_grad
    ]
    for together in torch._utils._take_tensors(grads, 1 << 28):  # bytes that travel at once
        flat = torch._utils._flatten_dense_tensors(together)
        torch.distributed.all_reduce(flat, group=group)
        for grad, summed in zip(together, torch._utils._unflatten_dense_tensors(flat, together), strict=True):
            grad.copy_(summed)


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


def name_saved_groups(state_dict: Any) -> None:
    """Give every parameter group of a checkpoint its name, where it has none, and the lr_mult of that name, in place.

    So a checkpoint is read whatever the order of OPTIMIZER_GROUPS was when it was written.
    """
    for state in state_dict if isinstance(state_dict, list) else [state_dict]:
        for group in state.get("optimizer", state)["param_groups"]:
            key = "lr_mult" if "lr_mult" in group else "pre_lr_mult"  # NeMo's name for it
            named = next((name for name, number in UNNAMED.items() if number == group[key]), None)
            group.setdefault("name", named)
            group[key] = LR_MULT[group["name"]]


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


class _NeMoOptimizer(McoreDistributedOptimizer):
    """NeMo's wrapper, passing on the arguments that Megatron-core 0.16 knows."""

    def sharded_state_dict(
        self,
        model_sharded_state_dict: dict[str, Any],
        optimizer_state_dict: Any = None,
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
        **unused: Any,
    ) -> dict[str, Any]:
        return self.mcore_optimizer.sharded_state_dict(model_sharded_state_dict, is_loading, metadata=metadata)
