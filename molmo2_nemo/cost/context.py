"""How long a pack takes on 1, 2, 4, ... ranks: what dynamic context parallelism assigns packs by. No torch here.

seconds(pack, ranks) = seconds of the micro-batch on `ranks` context ranks (cost/step.py) + seconds that no rank shares
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from molmo2_nemo.cost.layout import Layout
from molmo2_nemo.cost.step import StepCost, Work, unit_runs
from molmo2_nemo.data.counts import PackCounts
from molmo2_nemo.data.example import Batch
from molmo2_nemo.parallel.partition import ulysses_degree

MICROSECOND = 1e-6
UNSHARED = 0.01  # seconds of a micro-batch that no rank shares: launches, planning, small kernels


@dataclass(frozen=True)
class ContextCost:
    """Seconds of a pack's forward and backward, by the number of context ranks that share it.

    Only ratios matter to an assignment, so a pipeline counts as one rank: its stages share every pack alike.

    Args:
        step: predicts the time of a micro-batch.
        layout: of one rank alone; its number of context ranks is replaced.
        ulysses: context ranks that shard heads; None: all that share the pack.
        unshared: seconds of a micro-batch that no rank shares.
    """

    step: StepCost
    layout: Layout = Layout()
    ulysses: int | None = None
    unshared: float = UNSHARED

    def counts(self, batch: Batch) -> PackCounts:
        """What the predictions need to know of a micro-batch: its tokens, allowed pairs and vision units, counted."""
        model_config = self.step.model_config
        return PackCounts.of(batch, model_config.visual_attention, model_config.text.vocab_size)

    def seconds(self, pack: PackCounts, ranks: int) -> float:
        """Predicted seconds of a pack, forward and backward, on `ranks` context ranks."""
        layout = replace(self.layout, context=ranks, ulysses=ulysses_degree(ranks, self.ulysses))
        work = Work.of(self.step.model_config, pack, layout)
        return self.step.micro_batch(work, layout).total + self.unshared

    def microseconds(self, pack: PackCounts, ranks: int) -> int:
        """Predicted time of a pack on `ranks` context ranks, in whole microseconds: their sums do not depend on
        order."""
        return round(self.seconds(pack, ranks) / MICROSECOND)

    def crops_of_rank(self, pack: PackCounts, ranks: int) -> int:
        """The most crops that one of `ranks` context ranks encodes."""
        bounds = unit_runs(self.step.model_config, pack, ranks * self.layout.tensor)
        return max(int(pack.unit_crops[a:b].sum()) for a, b in zip(bounds, bounds[1:], strict=False))
