"""The learning rate: linear warm-up and cosine, each optimizer group with its own peak and warm-up.

Rate of update t (from 1) of a group with peak p and W warm-up steps: p t / W while t < W, then cosine from p down to
final_lr_fraction * p over the stage.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from nemo.lightning.pytorch.optim import LRSchedulerModule

from molmo2_nemo.settings.run import OptimConfig


def lr_factor(t: int, warmup: int, horizon: int, final: float) -> float:
    """Learning rate of update t (from 1) as a fraction of the peak.

    t < warmup: t / warmup; then final + (1 - final) (1 + cos(pi (t - warmup) / (horizon - warmup))) / 2; final beyond.
    """
    if t < warmup:
        return t / warmup
    if t >= horizon:
        return final
    return final + (1 - final) * (1 + math.cos(math.pi * (t - warmup) / (horizon - warmup))) / 2


class GroupSchedule(LRSchedulerModule):
    """`lr_factor` for NeMo, with each group's own warm-up.

    Args:
        optim: warm-up of every group, and the final fraction.
        max_steps: horizon of the cosine, in optimizer steps.
    """

    def __init__(self, optim: OptimConfig, max_steps: int) -> None:
        super().__init__()
        self.optim, self.max_steps = optim, max_steps

    def scheduler(self, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        warmups = [getattr(self.optim, group["name"]).warmup_steps for group in optimizer.param_groups]
        factors: list[Callable[[int], float]] = [functools.partial(self._factor, warmup) for warmup in warmups]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _factor(self, warmup: int, done: int) -> float:
        """LambdaLR counts from 0 before the first update; the published schedule calls that update 1."""
        return lr_factor(done + 1, warmup, self.max_steps, self.optim.final_lr_fraction)
