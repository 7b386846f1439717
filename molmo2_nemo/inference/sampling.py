"""How the next token is chosen, and when an answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molmo2_nemo.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Args:
        max_new_tokens: an answer of more is cut off.
        temperature: divides the logits; 0: always the most probable token (greedy).
        top_p: draw among the most probable tokens that together have this probability; 1: among all.
        seed: of the draws. A prompt's draws depend on this and its number alone, not on what it shares a batch with.
        stop: texts that end an answer; they are not part of it.

    Raises:
        UserError: a number out of range, or an empty stop text.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_p < 1 and self.temperature == 0:
            raise UserError(f"top_p={self.top_p} draws tokens, and temperature=0 does not: give a temperature, too")
        if not all(self.stop):
            raise UserError("a stop text is empty; it would end every answer before it begins")


class Chooser:
    """Chooses the next token of each prompt of a batch.

    Args:
        numbers: of the prompts, over all batches.
    """

    def __init__(self, sampling: Sampling, numbers: Sequence[int]) -> None:
        self.sampling = sampling
        # On the host, so that a seed means the same on every device.
        self._draws = [torch.Generator().manual_seed(hash_of(sampling.seed, number)) for number in numbers]

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """The next tokens, int64 [B] on the host.

        Args:
            logits: [B, V].
            rows: which prompts of the batch these are.
        """
        if self.sampling.temperature == 0:
            return logits.argmax(-1).cpu()
        probabilities = nucleus(torch.softmax(logits.float() / self.sampling.temperature, -1), self.sampling.top_p)
        each = zip(probabilities.cpu(), rows, strict=True)
        return torch.stack([torch.multinomial(p, 1, generator=self._draws[row])[0] for p, row in each])


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest set of most probable tokens with a probability of at least `top_p`, the others at 0 (arXiv
    1904.09751). Not normalised. [B, V] -> the same."""
    if top_p >= 1:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(before >= top_p, 0.0))


def hash_of(seed: int, number: int) -> int:
    """A seed of 63 bits for one prompt."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "big") >> 1


def stopped(text: str, stop: Sequence[str]) -> str | None:
    """The text before the first stop text in it; None where there is none."""
    places = [place for place in (text.find(one) for one in stop) if place >= 0]
    return text[: min(places)] if places else None
