"""What all ranks and their workers took from object stores since this attempt began. No figures without."""

from __future__ import annotations

from typing import Any

from molmo2_nemo.data.objects.traffic import KINDS, counts
from molmo2_nemo.training.metrics.interface import FinishedStep, Metric


class ObjectStores(Metric):
    """`store_bytes` and `store_requests` of records and manifests, `store_retries` after failed tries, `store_hits` in
    the cache, `store_damaged` spans fetched again, and `store_not_kept` for which the cache's disk had no room."""

    place = 60

    def summed(self, step: FinishedStep) -> list[float]:
        return [float(counts[kind]) for kind in KINDS]

    def figures(self, step: FinishedStep, summed: list[float], largest: list[float]) -> dict[str, Any]:
        if not any(summed):
            return {}
        return {f"store_{kind}": int(count) for kind, count in zip(KINDS, summed, strict=True)}
