"""What the optimizer did: gradient norms and learning rates of its groups, and steps that were not taken."""

from __future__ import annotations

from typing import Any

from molmo2_nemo.training.groups import trained_groups
from molmo2_nemo.training.metrics.interface import FinishedStep, Metric, finite


class GradientNorms(Metric):
    """Gradient norm of each optimizer group before clipping; 0 for a frozen one."""

    place = 20

    def figures(self, step: FinishedStep, summed: list[float], largest: list[float]) -> dict[str, Any]:
        norms = step.result.gradient_norms
        return {f"grad_norm_{group}": finite(norms.get(group, 0.0)) for group in trained_groups(norms)}


class LearningRates(Metric):
    """Learning rate of each optimizer group in this update; none for a frozen one."""

    place = 30

    def figures(self, step: FinishedStep, summed: list[float], largest: list[float]) -> dict[str, Any]:
        return {f"lr_{group}": rate for group, rate in step.result.learning_rates.items()}


class SkippedStepCount(Metric):
    """Number of steps skipped in the run so far."""

    place = 60

    def figures(self, step: FinishedStep, summed: list[float], largest: list[float]) -> dict[str, Any]:
        return {"skipped_steps": step.result.skipped_steps}


class Fault(Metric):
    """Why the step was skipped, where it was."""

    place = 120

    def figures(self, step: FinishedStep, summed: list[float], largest: list[float]) -> dict[str, Any]:
        return {"fault": step.result.fault} if step.result.fault else {}
