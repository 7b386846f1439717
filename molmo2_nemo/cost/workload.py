"""What one optimizer step is made of, on average: tokens, pairs of the mask, crops, scored tokens."""

from __future__ import annotations

from dataclasses import dataclass

from molmo2_nemo.settings.run import RunConfig

# Averages per pack on the stream of benchmarks/packing.py, which follows the published mixture (stage 1 is our estimate
# from its single images): length, share of its tokens that are not padding, of the crop budget used, of S x S that the
# mask allows, and of its tokens that have a loss.
AVERAGES = (
    (2536, 0.90, 0.85, 0.55, 0.15),
    (16384, 0.78, 0.995, 0.343, 0.041),
    (36864, 0.995, 0.98, 0.397, 0.040),
)


@dataclass(frozen=True)
class Workload:
    """Averages per pack, and how many packs a step has."""

    packs: int  # per optimizer step
    steps: int
    length: int  # tokens of a pack, padding included
    tokens: float  # padding left out
    area: float  # share of S x S that the mask allows
    crops: float
    max_crops: int
    scored: float  # tokens with a loss

    @property
    def pairs(self) -> float:
        """(query, key) pairs that the mask allows."""
        return self.area * self.length**2

    @property
    def pooled_tokens(self) -> float:
        """Visual tokens: 81 of a frame; images have more, of fewer patches each."""
        return self.crops * 81.0

    @property
    def window_positions(self) -> float:
        return self.crops * 729.0


def workload(cfg: RunConfig, area: float | None = None) -> Workload:
    """The average step of a run.

    Args:
        area: share of S x S that the mask allows, where it is known better than from `AVERAGES`.
    """
    packing = cfg.data.packing
    length = packing.sequence_length
    fill, crop_fill, known_area, scored = averages(length)
    return Workload(
        packs=cfg.stage.global_batch_size,
        steps=cfg.stage.max_steps,
        length=length,
        tokens=length * fill,
        area=known_area if area is None else area,
        crops=packing.max_crops * crop_fill,
        max_crops=packing.max_crops,
        scored=length * scored,
    )


def averages(length: int) -> tuple[float, ...]:
    """`AVERAGES` at a length, on straight lines between the known ones and level outside."""
    for (short, *low), (long, *high) in zip(AVERAGES, AVERAGES[1:], strict=False):
        if length <= long:
            t = max(0.0, (length - short) / (long - short))
            return tuple(a + t * (b - a) for a, b in zip(low, high, strict=True))
    return tuple(AVERAGES[-1][1:])
