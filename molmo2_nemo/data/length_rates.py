"""Documents upsampled by their length (as ProLong does, arXiv 2410.02660): `data.sources.NAME.length_rates`.

The rate of a document is a step function of its tokens. One of the greatest rate comes once in every epoch; one of a
share p of it comes in so many epochs that after any E of them it has come floor(p E) or ceil(p E) times. Which epochs
these are follows from the seed and the record, so nothing has to be counted or kept, and no length has to be known
before a document is read. What does not come is read, tokenised and passed over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from molmo2_nemo.data.config import LengthRateConfig

if TYPE_CHECKING:
    from molmo2_nemo.data.mixture import Draw


def rate_of(rates: Sequence[LengthRateConfig], tokens: int) -> float:
    """The rate of a document of that many tokens; `rates` ascend."""
    return next((entry.rate for entry in reversed(rates) if tokens >= entry.tokens), 1.0)


def keeps(rates: Sequence[LengthRateConfig], tokens: int, seed: int, draw: Draw) -> bool:
    """Whether a document of that many tokens comes in the epoch of a draw."""
    if not rates:
        return True
    from molmo2_nemo.data.mixture import stable_key  # with numpy, which --help does without

    most = max(entry.rate for entry in rates)
    share = rate_of(rates, tokens) / (most if rates[0].tokens <= 0 else max(most, 1.0))
    phase = stable_key("length", seed, draw.source, draw.index) % 2**32 / 2.0**32
    return math.floor((draw.epoch + 1) * share + phase) > math.floor(draw.epoch * share + phase)


def rate_problems(name: str, rates: Sequence[LengthRateConfig]) -> Iterator[str]:
    """What is wrong with the rates of the setting `name`, in words."""
    before = -1
    for i, entry in enumerate(rates):
        if entry.tokens <= before:
            least = f"more than {before}, those of the entry before" if i else "at least 0"
            yield f"{name}[{i}].tokens={entry.tokens}: must be {least}; list lengths in ascending order"
        if not 0 <= entry.rate < math.inf:
            yield f"{name}[{i}].rate={entry.rate}: must be a finite number of at least 0"
        before = entry.tokens
    if rates and all(entry.rate == 0 for entry in rates) and rates[0].tokens <= 0:
        yield f"{name}: every rate is 0, so no document would ever come; give one a rate above 0"
