"""The result of one optimizer step: written as the step runs, read by the optimizer, the fault guard and the log."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from molmo2_nemo.features.frozen import Counts
from molmo2_nemo.training.step_clock import StepClock
from molmo2_nemo.training.step_statistics import StepStatistics


@dataclass
class StepResult:
    """One step on one rank. Molmo2Module begins every step with a fresh one and hands it to those who write into it.

    In the order in which a step comes to know them:
    """

    statistics: StepStatistics = field(default_factory=StepStatistics)  # Molmo2Module.data_step
    clock: StepClock = field(default_factory=StepClock)  # what this rank does by itself, in seconds
    features: Counts | None = None  # FrozenFeatures; None: the encoder is trained, or on another rank
    crop_flops: float = 0.0  # Molmo2Module: of encoding a crop, which one that was read from disk did not take
    weight: Tensor | float = 0.0  # WeightedLossReduction: this rank's sum of loss weights, fp32, over micro-batches
    loss: Tensor | None = None  # WeightedLossReduction: of the global batch; None on stages that do not compute it
    task_sums: Tensor | None = None  # likewise: weighted losses of every task, then their weights; fp32 [2 * tasks]
    gradient_norms: dict[str, float] = field(default_factory=dict)  # Molmo2Optimizer: of every group, before clipping
    learning_rates: dict[str, float] = field(default_factory=dict)  # Molmo2Optimizer: of every group, in this update
    fault: str | None = None  # Molmo2Optimizer: why the step was skipped; None if it was taken
    skipped_steps: int = 0  # Molmo2Optimizer: of the whole run so far

    @property
    def flops(self) -> float:
        """Computed on this rank: those of its packs, without the encoding of crops whose features were read."""
        return self.statistics.flops - (self.crop_flops * self.features.hits if self.features is not None else 0.0)
