"""How fast a step was."""

from __future__ import annotations

from typing import Any

from molmo2_nemo.nemo.metrics.interface import FinishedStep, Metric


class Seconds(Metric):
    """Of the step, of them those that the slowest rank waited for data, and tokens per second of all replicas."""

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
        return [step.result.statistics.flops]

    def figures(self, step: FinishedStep, summed: list[float], largest: list[float]) -> dict[str, Any]:
        return {"tflops": summed[0] / step.seconds / step.processes / 1e12}


class Utilisation(Compute):
    """The same as a share of what the device could do (MFU), where that is known."""

    place = 110

    def figures(self, step: FinishedStep, summed: list[float], largest: list[float]) -> dict[str, Any]:
        own = super().figures(step, summed, largest)["tflops"]
        return {"mfu": own / step.peak_tflops} if step.peak_tflops else {}
