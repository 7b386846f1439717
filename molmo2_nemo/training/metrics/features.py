"""What the step had of a frozen encoder's features, where they are kept."""

from __future__ import annotations

from dataclasses import astuple, fields
from typing import Any

from molmo2_nemo.features.frozen import Counts
from molmo2_nemo.training.metrics.interface import FinishedStep, Metric


class FeatureCache(Metric):
    """Counts of all ranks (features/frozen.py), in lines of runs that encode crops of a frozen encoder once."""

    place = 120

    def summed(self, step: FinishedStep) -> list[float]:
        own = step.result.features
        return [float(own is not None), *astuple(own or Counts())]

    def figures(self, step: FinishedStep, summed: list[float], largest: list[float]) -> dict[str, Any]:
        ranks, *counts = summed
        if not ranks:
            return {}
        return {f"features_{f.name}": int(n) for f, n in zip(fields(Counts), counts, strict=True)}
