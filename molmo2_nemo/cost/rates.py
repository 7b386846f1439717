"""What share of a GPU's peak and of its links' bandwidth each kind of work reaches: the one place that states it.

The planner (cost/step.py) and the cost model of dynamic context parallelism (cost/context.py) both compute from
these. Nothing of this was measured on a cluster: they come from public measurements on H100. Large matrix products
reach 600-650 of 989 TFLOP/s, the vision encoder's smaller ones 380; attention on packed documents (MagiAttention's
chart) 584 forward and 426 backward with FlashAttention-3, 270 and 178 with FlexAttention. Links reach some three
quarters of their nominal bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

ATTENTION_BACKWARD = 2.5  # times the forward's operations: the scores are computed again


@dataclass(frozen=True)
class Rates:
    """Shares of peak, and of a link's bandwidth."""

    matrix: float = 0.62
    vision: float = 0.38
    attention_forward: float = 0.27
    attention_backward: float = 0.18
    link: float = 0.75
    network: float = 0.80
    other: float = 0.12  # of all computing: norms, activations, rotary, launches
    hidden_gradients: float = 0.7  # share of the gradients' exchange behind computing
    hidden_exchange: float = 0.3  # of the exchanges inside layers
    half_rate: float = 256.0  # tokens of a rank at which matrix products reach half of their rate
    latency: float = 20e-6  # seconds of one exchange, whatever its size

    def matrix_share(self, tokens: float) -> float:
        """Of peak, for matrix products on so many tokens of a rank."""
        return self.matrix * tokens / (tokens + self.half_rate)


FLASH = Rates(attention_forward=0.59, attention_backward=0.43)
KERNELS = {"flex": Rates(), "flash": FLASH}
