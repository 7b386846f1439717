"""Molmo2's optimizer and schedule as NeMo sees them; training/ does the work (optimizer, lr_schedule, gradients).

NeMo 2.7's `MegatronOptimizerModule` calls Megatron-core with arguments that 0.16 no longer takes, clips one global norm
and warms every group up alike. These do what the published recipe says instead: groups with their own learning rate,
warm-up and clipping, and gradients divided by the global batch's sum of loss weights.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.utils import get_attr_wrapped_model
from nemo.core.optim.mcore_optim import McoreDistributedOptimizer
from nemo.lightning.pytorch.optim import LRSchedulerModule, MegatronOptimizerModule
from nemo.utils import AppState
from torch import Tensor

from molmo2_nemo.settings.run import FaultConfig, OptimConfig
from molmo2_nemo.training.faults import FaultGuard
from molmo2_nemo.training.gradients import finalize_gradients
from molmo2_nemo.training.lr_schedule import group_factor
from molmo2_nemo.training.optimizer import adam_config, clipping_optimizer
from molmo2_nemo.training.step_result import StepResult


class GroupSchedule(LRSchedulerModule):
    """training/lr_schedule.py for NeMo.

    Args:
        optim: warm-up of every group, and the final fraction.
        max_steps: horizon of the cosine, in optimizer steps.
    """

    def __init__(self, optim: OptimConfig, max_steps: int) -> None:
        super().__init__()
        self.optim, self.max_steps = optim, max_steps

    def scheduler(self, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        factors = [group_factor(self.optim, group["name"], self.max_steps) for group in optimizer.param_groups]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Molmo2Optimizer(MegatronOptimizerModule):
    """AdamW as published, on Megatron-core's (distributed) optimizer.

    Args:
        optim: learning rates, warm-ups, betas and clipping.
        max_steps: horizon of the cosine, in optimizer steps.
        bf16: parameters are bf16 with fp32 master weights.
        distributed: shard master weights and moments over data-parallel ranks.
        on_host: keep those on the GPU's host, and update there.
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
        on_host: bool = False,
        faults: FaultConfig | None = None,
    ) -> None:
        config = adam_config(optim, bf16=bf16, distributed=distributed, on_host=on_host)
        super().__init__(config=config, lr_scheduler=GroupSchedule(optim, max_steps))
        self.optim = optim
        self.guard = FaultGuard(faults or FaultConfig())
        self.result = StepResult()

    def optimizers(self, model: Any) -> list[torch.optim.Optimizer]:
        chunks = [chunk.module for chunk in model]
        gloo = AppState().use_gloo_process_groups
        adamw = get_attr_wrapped_model(chunks[0], "choices")["adamw"].function
        return [
            _NeMoOptimizer(
                clipping_optimizer(
                    self.config, chunks, self.optim, self._skips, use_gloo_process_groups=gloo, adamw=adamw
                )
            )
        ]

    def _skips(self, norms: dict[str, float], rates: dict[str, float]) -> bool:
        return self.guard.judge(self.result, norms, rates)

    def finalize_model_grads(self, model: Any, num_tokens: Tensor | None = None, **options: Any) -> None:
        """Called by Megatron's schedules after the last micro-batch. They count tokens in an integer tensor; this
        rank's sum of loss weights, a float, takes its place."""
        self.result.clock.exchanges()
        finalize_gradients(model, self.result.weight, **options)


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
