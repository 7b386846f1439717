"""What the step's packs held, over all replicas."""

from __future__ import annotations

from typing import Any

from molmo2_nemo.training.metrics.interface import FinishedStep, Metric


class Packs(Metric):
    """Tokens without and with padding, crops, and the shares of the token and crop budgets that are used."""

    place = 40

    def summed(self, step: FinishedStep) -> list[float]:
        own = step.result.statistics
        return [own.tokens, own.padded_tokens, own.crops, own.packs]

    def figures(self, step: FinishedStep, summed: list[float], largest: list[float]) -> dict[str, Any]:
        tokens, padded_tokens, crops, packs = summed
        return {
            "tokens": int(tokens),
            "padded_tokens": int(padded_tokens),
            "crops": int(crops),
            "fill": tokens / padded_tokens,
            "crop_fill": crops / (packs * step.max_crops),
        }


class SkippedRecords(Metric):
    """Records that could not be used, since the run began."""

    place = 50

    def summed(self, step: FinishedStep) -> list[float]:
        return [step.skipped_records if step.first_of_replica else 0]

    def figures(self, step: FinishedStep, summed: list[float], largest: list[float]) -> dict[str, Any]:
        return {"skipped": int(summed[0])}
