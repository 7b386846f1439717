"""Molmo2's optimizer on Megatron-core: AdamW, each parameter group clipped on its own, steps that can be refused.

Which AdamW computes the update is Megatron's choice where Transformer Engine or Apex is installed (their FusedAdam),
and that of `kernels.adamw` otherwise (PyTorch's, fused or not). Checkpoints hold the same whichever it is, and any of
them resumes from any other's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import param_is_not_shared
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor

from molmo2_nemo.fused.adamw import PLAIN, AdamW, squares_in_fp64
from molmo2_nemo.settings.run import OPTIMIZER_GROUPS, OptimConfig
from molmo2_nemo.training import overlap
from molmo2_nemo.training.fsdp import is_sharded, keep_rows, local
from molmo2_nemo.training.groups import group_overrides, is_adapter, name_saved_groups

# Called on every rank with each group's norm before clipping, alike on all ranks, and its learning rate. True: weights
# and moments stay as they are.
Skips = Callable[[dict[str, float], dict[str, float]], bool]


def adam_config(optim: OptimConfig, *, bf16: bool, distributed: bool, on_host: bool = False) -> OptimizerConfig:
    """Megatron's settings of the optimizer.

    Args:
        bf16: parameters are bf16 with fp32 master weights.
        distributed: shard master weights and moments over data-parallel ranks.
        on_host: keep those on the host of a GPU, and update there (Megatron's `optimizer_cpu_offload`); takes the
            other two.
    """
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
        optimizer_cpu_offload=on_host,
        optimizer_offload_fraction=float(on_host),
        overlap_cpu_optimizer_d2h_h2d=on_host,
    )
    if on_host:  # else master weights stay on the GPU; as an argument Megatron takes it with Transformer Engine only
        config.use_precision_aware_optimizer = config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        config.store_param_remainders = False
    return config


def clipping_optimizer(
    config: OptimizerConfig,
    chunks: list[Any],
    optim: OptimConfig,
    skips: Skips,
    *,
    use_gloo_process_groups: bool,
    adamw: AdamW = PLAIN,
) -> GroupClippingOptimizer:
    """The optimizer of a model, every group at its peak rate until a schedule sets another.

    Args:
        config: from `adam_config`.
        chunks: this rank's parts of the model, each in Megatron's DistributedDataParallel.
        use_gloo_process_groups: for Megatron's distributed optimizer.
        adamw: how norms and the update are computed.
    """
    adapters = any(is_adapter(name) for chunk in chunks for name, _ in chunk.named_parameters())
    megatron = get_megatron_optimizer(
        config,
        chunks,
        config_overrides=group_overrides(optim, adapters),  # type: ignore[arg-type]
        use_gloo_process_groups=use_gloo_process_groups,
    )
    inner = megatron.chained_optimizers if isinstance(megatron, ChainedOptimizer) else [megatron]
    sharded = is_sharded(chunks[0])
    clipping = GroupClippingOptimizer(inner, chunks, optim.clip_grad, skips, adamw)
    for made in clipping.param_groups:
        made["lr"] = made["initial_lr"] = made["max_lr"]
    for optimizer in inner:
        _materialise_adam_state(optimizer, adamw)
        if sharded:
            keep_rows(optimizer, chunks)
    for chunk in chunks if not sharded else ():
        overlap.install(chunk)
    return clipping


class GroupClippingOptimizer(ChainedOptimizer):
    """Megatron's optimizer, each parameter group clipped to its own L2 norm.

    Args:
        chunks: this rank's parts of the model, each in Megatron's DistributedDataParallel.
        clip_grad: the largest norm of a group; 0: as it is.
        adamw: how norms and the update are computed.

    A step waits for the device once, for the norms of all groups together; twice where one is found again in fp64.
    """

    def __init__(
        self,
        chained_optimizers: list[MegatronOptimizer],
        chunks: list[Any],
        clip_grad: float,
        skips: Skips,
        adamw: AdamW = PLAIN,
    ) -> None:
        super().__init__(chained_optimizers)
        self.chunks = chunks
        self.clip_grad, self.skips, self.adamw = clip_grad, skips, adamw

    def load_state_dict(self, state_dict: Any) -> None:
        """Load a state, groups matched by their names, whichever AdamW it was saved by."""
        name_saved_groups(state_dict)
        for part in state_dict if isinstance(state_dict, list) else [state_dict]:
            adapt_saved(part.get("optimizer", part), torch_adamw=self._is_torch())
        super().load_state_dict(state_dict)
        for optimizer in self.chained_optimizers:
            _as_here(optimizer.optimizer)

    def _is_torch(self) -> bool:
        return all(isinstance(o.optimizer, torch.optim.AdamW | None) for o in self.chained_optimizers)

    @torch.no_grad()
    def step(self) -> tuple[bool, float | None, int | None]:
        if self.prepare_grads():
            return False, None, None
        groups = [(optimizer, group) for optimizer in self.chained_optimizers for group in optimizer.param_groups]
        found = self._norms(groups)
        norms = {group["name"]: norm for (_, group), norm in zip(groups, found, strict=True)}
        rates = {group["name"]: group["lr"] for _, group in groups}
        for (_, group), norm in zip(groups, found, strict=True):
            self._clip(gradients(group["params"]), norm)
        if self.skips(norms, rates):
            return False, None, None
        taken = self.step_with_ready_grads()
        overlap.start_gathers(self.chunks)
        return taken, math.hypot(*norms.values()), None

    def _norms(self, groups: list[tuple[MegatronOptimizer, dict[str, Any]]]) -> list[float]:
        """The norm of each group's gradient over all ranks, before clipping. A collective of all ranks."""
        stats = [(_counted(group["params"]), optimizer.get_grad_stats_parallel_group()) for optimizer, group in groups]
        norms = l2_norms(stats, self.adamw.squares)
        doubtful = [number for number, norm in enumerate(norms) if not self.adamw.certain(norm)]
        if doubtful:  # the same ones on all ranks
            exact = l2_norms([stats[number] for number in doubtful], squares_in_fp64)
            norms = [exact[doubtful.index(n)] if n in doubtful else norm for n, norm in enumerate(norms)]
        return norms

    def _clip(self, grads: list[Tensor], norm: float) -> None:
        factor = self.clip_grad / (norm + 1e-6)
        if grads and 0 < self.clip_grad and math.isfinite(norm) and factor < 1:
            torch._foreach_mul_(grads, factor)


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Those that there are; of sharded parameters this rank's rows. Of an optimizer on the host they are the model's
    own, beside parameters in bf16."""
    found = (getattr(p, "decoupled_grad", p.grad) for p in parameters)
    return [local(grad) for grad in found if grad is not None]


def _counted(parameters: list[Tensor]) -> list[Tensor]:
    """Gradients that count towards a norm: each element of the model on one rank only."""
    return gradients(p for p in parameters if param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p))


def l2_norms(
    groups: list[tuple[list[Tensor], Any]], squares: Callable[[Sequence[Tensor]], Tensor] = squares_in_fp64
) -> list[float]:
    """L2 norms of groups of tensors over the ranks of their process groups; one wait for the device in all.

    Megatron's own (fp32 on a machine without Apex) is off by up to 3e-5 on a 200,000-element gradient, which is more
    than two layouts of one run may differ.

    Args:
        groups: (tensors of this rank, process group), alike in number and order on all ranks.
        squares: sum of squares of tensors, fp64 [].
    """
    nothing = torch.zeros(1, dtype=torch.float64, device=torch.cuda.current_device())[0]
    totals: list[Tensor] = []
    for process_group, members in itertools.groupby(groups, key=lambda item: item[1]):
        total = torch.stack([squares(tensors) if tensors else nothing for tensors, _ in members])
        torch.distributed.all_reduce(total, group=process_group)
        totals.append(total)
    return torch.cat(totals).sqrt().tolist() if totals else []


def adapt_saved(state: dict[str, Any], *, torch_adamw: bool) -> None:
    """Put the number of steps where the optimizer of this run looks for it, in place.

    FusedAdam counts in its groups. So does what Megatron's distributed optimizer saves of PyTorch's AdamW; otherwise
    that one's count is the "common_step" of the parameters' states.

    Args:
        state: "param_groups", and "state" unless it is from the distributed optimizer.
        torch_adamw: this run's optimizer is PyTorch's.
    """
    per_parameter = state.get("state")
    common = per_parameter.pop("common_step", None) if per_parameter is not None else None
    counted = [group["step"] for group in state["param_groups"] if group.get("step") is not None]
    step = float(common if common is not None else counted[0] if counted else 0)
    if torch_adamw and per_parameter is not None:
        per_parameter["common_step"] = torch.tensor(step)
    for group in state["param_groups"]:
        group["step"] = step if torch_adamw else int(step)


def _as_here(inner: torch.optim.Optimizer | None) -> None:
    """Undo what a loaded state brought along of the optimizer that it was saved by: its options, and where `step` is.

    Every parameter gets a `step` of its own: Megatron gives all of torch's AdamW states one and the same tensor, which
    would be counted up once per parameter.
    """
    if inner is None:
        return
    trained_with = ("lr", "betas", "eps", "weight_decay")
    for group in inner.param_groups:
        group.update({name: value for name, value in inner.defaults.items() if name not in trained_with})
        for p in group["params"]:
            if torch.is_tensor(step := inner.state.get(p, {}).get("step")):
                on_device = group.get("fused") and not isinstance(inner, HybridDeviceOptimizer)
                device = p.device if on_device else "cpu"
                inner.state[p]["step"] = step.detach().clone().to(device)


def _materialise_adam_state(optimizer: MegatronOptimizer, adamw: AdamW) -> None:
    """AdamW makes its state at the first step; Megatron's checkpoint code wants it, and one `step`, before."""
    inner = optimizer.optimizer
    if inner is None:
        return
    if isinstance(inner, HybridDeviceOptimizer):
        _materialise_on_host(inner)
        _save_as_adamw(optimizer, inner)
        return
    if not isinstance(inner, torch.optim.AdamW):
        optimizer.init_state_fn(inner, optimizer.config)
        return
    chosen = {"fused": adamw.fused or None, "foreach": False if adamw.fused else None}
    inner.defaults.update(chosen)
    for group in inner.param_groups:
        group.update(chosen)
        for p in group["params"]:
            inner.state[p] = _zero_state(p, p.device if adamw.fused else torch.device("cpu"))
    if isinstance(optimizer, DistributedOptimizer):
        _keep_step_on_load(optimizer)
        if not inner.state:  # a pipeline stage where nothing trains; Megatron would look for a `step` there
            optimizer.state_dict = lambda: {"optimizer": _groups_without_parameters(inner)}


def _zero_state(parameter: Tensor, step_on: torch.device) -> dict[str, Tensor]:
    """AdamW's state before the first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=step_on),
        "exp_avg": torch.zeros_like(parameter.data),
        "exp_avg_sq": torch.zeros_like(parameter.data),
    }


def _materialise_on_host(optimizer: HybridDeviceOptimizer) -> None:
    """The same for Megatron's optimizer on the host, which has one AdamW for each parameter."""
    for inner in optimizer.sub_optimizers:
        for p in itertools.chain.from_iterable(group["params"] for group in inner.param_groups):
            inner.state[p] = _zero_state(p, p.device)
    optimizer._sync_sub_optimizers_state_to_hdo()


def _save_as_adamw(optimizer: MegatronOptimizer, inner: HybridDeviceOptimizer) -> None:
    """Megatron's optimizer on the host keeps its own settings in its groups, two classes among them, which a checkpoint
    must not hold."""
    state_dict, own = optimizer.state_dict, set(inner.defaults) - {"lr", "betas", "eps", "weight_decay"}

    def without_own() -> dict[str, Any]:
        found: dict[str, Any] = state_dict()
        for group in found["optimizer"]["param_groups"]:
            for name in own:
                group.pop(name, None)
        return found

    optimizer.state_dict = without_own


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
