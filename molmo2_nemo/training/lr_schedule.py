"""The learning rate: linear warm-up and cosine, each optimizer group with its own peak and warm-up.

Rate of update t (from 1) of a group with peak p and W warm-up steps: p t / W while t < W, then cosine from p down to
final_lr_fraction * p over the stage.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

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


def group_factor(optim: OptimConfig, group: str, max_steps: int) -> Callable[[int], float]:
    """Updates done so far -> the learning rate of the next one as a fraction of the group's peak.

    Args:
        optim: warm-up of every group, and the final fraction.
        max_steps: horizon of the cosine, in optimizer steps.
    """
    warmup = getattr(optim, group).warmup_steps
    return functools.partial(_next_factor, warmup, max_steps, optim.final_lr_fraction)


def _next_factor(warmup: int, horizon: int, final: float, done: int) -> float:
    """The published schedule calls the first update 1."""
    return lr_factor(done + 1, warmup, horizon, final)
