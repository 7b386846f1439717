"""The loss of a step, and that of each task in it."""

from __future__ import annotations

from typing import Any

from molmo2_nemo.training.metrics.interface import FinishedStep, Metric, finite


class Loss(Metric):
    place = 10

    def figures(self, step: FinishedStep, summed: list[float], largest: list[float]) -> dict[str, Any]:
        return {"loss": finite(step.loss)}


class TaskLosses(Metric):
    """Loss of each task that the step had tokens of; `task/NAME` in the loggers. The sums are known on the last
    pipeline stage, alike on all its ranks."""

    place = 100

    def largest(self, step: FinishedStep) -> list[float]:
        sums = step.result.task_sums
        return [0.0] * (2 * len(step.tasks)) if sums is None else sums.tolist()

    def figures(self, step: FinishedStep, summed: list[float], largest: list[float]) -> dict[str, Any]:
        losses, weights = largest[: len(step.tasks)], largest[len(step.tasks) :]
        means = zip(step.tasks, losses, weights, strict=True)
        return {"tasks": {task: finite(loss / weight) for task, loss, weight in means if weight > 0}}

    def scalars(self, figures: dict[str, Any]) -> dict[str, float]:
        return {f"task/{name}": value for name, value in figures["tasks"].items() if value is not None}
