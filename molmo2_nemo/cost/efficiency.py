"""What share of a GPU's peak and of its links' bandwidth each kind of work reaches: the one place that states it.

The planner and dynamic context parallelism both compute from these (cost/step.py). Nothing of this was measured on a
cluster: the shares come from public measurements on H100. Large matrix products reach 600-650 of 989 TFLOP/s, the
vision encoder's smaller ones 380; attention on packed documents (MagiAttention's chart) 584 forward and 426 backward
with FlashAttention-3, 344 and 263 with FlashAttention-2, 270 and 178 with FlexAttention. Links reach some three
quarters of their nominal bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from molmo2_nemo.errors import UserError, nearest

ATTENTION_BACKWARD = 2.5  # times the forward's operations: the scores are recomputed


@dataclass(frozen=True)
class Efficiency:
    """Shares of peak, and of a link's bandwidth; attention's are those of FlashAttention-2."""

    matrix: float = 0.62
    vision: float = 0.38
    attention_forward: float = 0.35
    attention_backward: float = 0.27
    link: float = 0.75
    network: float = 0.80
    other: float = 0.12  # of all computing: norms, activations, rotary, launches
    hidden_gradients: float = 0.7  # share of the gradients' reduction that computing hides
    hidden_communication: float = 0.3  # share of the communication inside layers that computing hides
    half_rate: float = 256.0  # tokens of a rank at which matrix products reach half of `matrix`
    latency: float = 20e-6  # seconds of one message, whatever its size

    def matrix_share(self, tokens: float) -> float:
        """The share of peak that matrix products on `tokens` tokens of a rank reach."""
        return self.matrix * tokens / (tokens + self.half_rate)


# By implementation of attention, as `Kernel.implementation` (attention/kernels.py) names it. For FlashAttention-4 we
# know of no public figures; `blocks` is not a fast kernel and has none.
EFFICIENCIES = {
    "flash2": Efficiency(),
    "flash3": Efficiency(attention_forward=0.59, attention_backward=0.43),
    "flex": Efficiency(attention_forward=0.27, attention_backward=0.18),
}
SAME_EFFICIENCY = {
    "flash4": "flash3",
    "cudnn": "flash3",  # assumed; and without the plans that PyTorch makes it build for every call (fused/varlen.py)
    "flash-cpu": "flash2",
    "blocks": "flex",
}  # implementation -> the one whose figures it gets
# Fields that are no shares of something (any number from 0 on), and shares that may be 0
NO_SHARES, MAY_BE_0 = ("other", "half_rate", "latency"), ("hidden_gradients", "hidden_communication")


def measured(assumed: Efficiency, rates: Mapping[str, Any]) -> Efficiency:
    """`assumed` with rates that were measured in place of some of its own.

    Args:
        rates: fields of Efficiency.

    Raises:
        UserError: an unknown name, or a value that the field cannot have.
    """
    known = [f.name for f in fields(Efficiency)]
    for name, value in rates.items():
        if name not in known:
            raise UserError(f"{name}: no such rate; {nearest(str(name), known)}")
        most = math.inf if name in NO_SHARES else 1.0
        least = 0.0 if name in (*NO_SHARES, *MAY_BE_0) else 1e-9
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            what = "a number of at least 0" if name in NO_SHARES else "a share, above 0 and at most 1"
            raise UserError(f"{name}={value}: expected {what}")
    return replace(assumed, **rates)
