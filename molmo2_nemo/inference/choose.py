"""The next token of each prompt, from its logits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from molmo2_nemo.inference.sampling import Sampling


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
        below = (logits.double() - logits.double().amax(-1, keepdim=True)) / self.sampling.temperature
        probabilities = nucleus(torch.softmax(below, -1).float(), self.sampling.top_p)  # of any temperature above 0
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
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "big") >> 1
