"""Molmo2's optimizer on NeMo: three groups with their own rate, warm-up and clipping; weighted-mean gradients.

NeMo 2.7's `MegatronOptimizerModule` calls Megatron-core with arguments that 0.16 no longer takes, clips one global norm
and warms every group up alike; this subclass does what the published recipe says instead:

  * groups `vit`, `connector` (with the 128 extra embedding rows) and `llm`, told apart by parameter names;
  * each group's L2 norm is taken over all shards and clipped on its own;
  * learning rate of update t (from 1): p t / W while t < W, then cosine from p to final_lr_fraction * p over the stage;
  * gradients are divided by the sum of loss weights of the whole global batch.
"""

from __future__ import annotations

import functools
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
from nemo.lightning.pytorch.optim import LRSchedulerModule, MegatronOptimizerModule
from nemo.utils import AppState
from torch import Tensor

from molmo2_nemo.nemo.faults import FaultGuard
from molmo2_nemo.settings.run import OPTIMIZER_GROUPS, FaultConfig, OptimConfig


def group_of(name: str) -> str:
    """The optimizer group of a parameter, by its canonical (or wrapped) name."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    if name.startswith("vision."):
        return "vit"
    if name.startswith("connector.") or name == "embedding.extra.weight":
        return "connector"
    return "llm"


class Molmo2Optimizer(MegatronOptimizerModule):
    """AdamW as published, on Megatron-core's (distributed) optimizer.

    Args:
        optim: rates, warm-ups, betas and clipping.
        max_steps: horizon of the cosine, in optimizer steps.
        bf16: parameters are bf16 with fp32 master weights.
        distributed: shard master weights and moments over data-parallel ranks.
        faults: which steps are skipped.
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
        self.loss_weights: Any = None  # the module's WeightedLossReduction, set when it connects

    def connect(self, model: Any) -> None:
        super().connect(model)
        self.loss_weights = model.training_loss_reduction

    def optimizers(self, model: Any) -> list[torch.optim.Optimizer]:
        overrides: dict[ParamKey, dict[str, Any]] = {}
        for index, group in enumerate(OPTIMIZER_GROUPS):
            predicate = ParamWithNamePredicate(name=group, fn=lambda p, name, group=group: group_of(name) == group)
            overrides[ParamKey(with_name_predicate=predicate)] = dict(
                max_lr=getattr(self.optim, group).lr,
                min_lr=getattr(self.optim, group).lr * self.optim.final_lr_fraction,
                # Checkpoints match groups by lr_mult among others, so each group needs its own. Nothing multiplies by
                # it: the schedule below sets the rates.
                lr_mult=float(index + 1),
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
        for group in clipping.param_groups:
            group["lr"] = group["initial_lr"] = group["max_lr"]
        for optimizer in inner:
            _materialise_adam_state(optimizer)
        return [_NeMoOptimizer(clipping)]

    def _skips(self, norms: dict[str, float]) -> bool:
        loss = self.loss_weights.take_loss() if self.loss_weights is not None else None
        return self.guard.skips(loss, [norms.get(group, 0.0) for group in OPTIMIZER_GROUPS])

    def finalize_model_grads(self, model: Any, num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        """Megatron's reductions, then division by the global batch's sum of loss weights.

        Megatron counts tokens in an integer tensor; loss weights are floats, so the sum that the loss reduction kept is
        handed over instead. Stages without a loss hand over zero: Megatron broadcasts the last stage's.
        """
        finalize_model_grads(model, self.loss_weights.take_weight_sum(), **kwargs)
        sum_partial_gradients(model)


class GroupClippingOptimizer(ChainedOptimizer):
    """Megatron's optimizer, each parameter group clipped to its own L2 norm.

    `group_norms` holds the norms before clipping, alike on all ranks, after every step.

    Args:
        skips: asked on every rank with these norms; True leaves weights and moments as they are.
    """

    def __init__(
        self,
        chained_optimizers: list[MegatronOptimizer],
        clip_grad: float,
        skips: Callable[[dict[str, float]], bool],
    ) -> None:
        super().__init__(chained_optimizers)
        self.clip_grad, self.skips = clip_grad, skips
        self.group_norms: dict[str, float] = {}

    def load_state_dict(self, state_dict: Any) -> None:
        """As Megatron's, which gives all of torch's AdamW states one and the same `step` tensor: it would then be
        counted up once per parameter and step."""
        super().load_state_dict(state_dict)
        for optimizer in self.chained_optimizers:
            for state in optimizer.optimizer.state.values():
                if torch.is_tensor(state.get("step")):
                    state["step"] = state["step"].clone()

    @torch.no_grad()
    def step(self) -> tuple[bool, float | None, int | None]:
        if self.prepare_grads():
            return False, None, None
        squares = 0.0
        for optimizer in self.chained_optimizers:
            for group in optimizer.param_groups:
                norm = self._clip(optimizer, group["params"])
                self.group_norms[name_of_group(group)] = norm
                squares += norm**2
        if self.skips(self.group_norms):
            return False, None, None
        return self.step_with_ready_grads(), math.sqrt(squares), None

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


def name_of_group(group: dict[str, Any]) -> str:
    """Name of an optimizer's parameter group; `Molmo2Optimizer.optimizers` numbers them by lr_mult."""
    return OPTIMIZER_GROUPS[round(group["lr_mult"] if "lr_mult" in group else group["pre_lr_mult"]) - 1]


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
        if not inner.state:  # a pipeline stage where nothing learns; Megatron would look for a `step` there
            optimizer.state_dict = lambda: {"optimizer": _groups_without_parameters(inner)}


def _groups_without_parameters(inner: torch.optim.Optimizer) -> dict[str, Any]:
    """What Megatron keeps of an optimizer besides tensors; `step` is that of the stages that learn, on loading."""
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


class GroupSchedule(LRSchedulerModule):
    """Linear warm-up from 0 and cosine to `final_lr_fraction`, with each group's own warm-up."""

    def __init__(self, optim: OptimConfig, max_steps: int) -> None:
        super().__init__()
        self.optim, self.max_steps = optim, max_steps

    def scheduler(self, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        factors: list[Callable[[int], float]] = []
        for group in optimizer.param_groups:
            warmup = getattr(self.optim, name_of_group(group)).warmup_steps
            factors.append(
                # LambdaLR counts from 0 before the first update; the published schedule calls that update 1
                functools.partial(self._factor, warmup)
            )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _factor(self, warmup: int, done: int) -> float:
        return lr_factor(done + 1, warmup, self.max_steps, self.optim.final_lr_fraction)


def lr_factor(t: int, warmup: int, horizon: int, final: float) -> float:
    """Learning rate of update t (from 1) as a fraction of the peak.

    t < warmup: t / warmup; then final + (1 - final) (1 + cos(pi (t - warmup) / (horizon - warmup))) / 2; final beyond.
    """
    if t < warmup:
        return t / warmup
    if t >= horizon:
        return final
    return final + (1 - final) * (1 + math.cos(math.pi * (t - warmup) / (horizon - warmup))) / 2
