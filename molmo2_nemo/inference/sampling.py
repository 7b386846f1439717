"""How answers are drawn, and when they end: what a user may ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
            raise UserError(f"--max-new-tokens {self.max_new_tokens}: must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature}: must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if self.top_p < 1 and self.temperature == 0:
            raise UserError(f"--top-p {self.top_p} without --temperature: only draws need it; give both, or neither")
        if not all(self.stop):
            raise UserError("--stop with an empty text: it would end every answer before it begins")


def stopped(text: str, stop: Sequence[str]) -> str | None:
    """The text before the first stop text in it; None where there is none."""
    places = [place for place in (text.find(one) for one in stop) if place >= 0]
    return text[: min(places)] if places else None
