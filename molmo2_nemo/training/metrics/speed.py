"""How fast a step was."""

from __future__ import annotations

from typing import Any

from molmo2_nemo.cost.hardware import utilisation
from molmo2_nemo.training.metrics.interface import FinishedStep, Metric


class Seconds(Metric):
    """Seconds of the step, seconds that the slowest rank waited for data, and tokens per second of all replicas."""

    place = 70

    def summed(self, step: FinishedStep) -> list[float]:
        return [step.result.statistics.tokens]

    def largest(self, step: FinishedStep) -> list[float]:
        return [step.result.statistics.wait]

    def figures(self, step: FinishedStep, summed: list[float], largest: list[float]) -> dict[str, Any]:
        return {"seconds": step.seconds, "wait": largest[0], "tokens_per_second": summed[0] / step.seconds}


class Compute(Metric):
    """TFLOP/s of one process, counted by mask area (cost/flops.py)."""

    place = 80

    def summed(self, step: FinishedStep) -> list[float]:
        return [step.result.flops]

    def figures(self, step: FinishedStep, summed: list[float], largest: list[float]) -> dict[str, Any]:
        return {"tflops": summed[0] / step.seconds / step.processes / 1e12}


class Utilisation(Compute):
    """Model FLOPs utilisation (MFU), where the peak of a device is known."""

    place = 110

    def figures(self, step: FinishedStep, summed: list[float], largest: list[float]) -> dict[str, Any]:
        if not step.peak_tflops:
            return {}
        return {"mfu": utilisation(summed[0], step.seconds, step.processes * step.peak_tflops * 1e12)}
