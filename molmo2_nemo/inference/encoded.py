"""Media that several questions are about: encoded once. What is kept is visual tokens, behind the connector.

A model's results must not depend on what is kept, and a product's rows may round differently with their number. So the
crops of one prompt are encoded together, as many at a time as the model's `memory.vision_chunk` allows, and never with
those of another, whether anything is kept or not: what is kept is what the same computation would give again.
"""

from __future__ import annotations

import hashlib
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from molmo2_nemo.data.example import Example

LIMIT = 2**31  # bytes on the host


class EncodedMedia:
    """Visual tokens of the media that prompts have shown, those used last, as long as the weights stay the same.

    Args:
        limit: bytes that are kept, on the host.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.bytes = limit, 0
        self.encoded = 0  # crops
        self.reused = 0  # crops that were not encoded again
        self._kept: OrderedDict[tuple[bytes, int, int], Tensor] = OrderedDict()
        self._digests: dict[int, tuple[weakref.ref[np.ndarray], bytes]] = {}

    def batch(self, prompts: Sequence[Example]) -> EncodedBatch:
        """For the crops of a batch that has these prompts in this order."""
        starts = np.cumsum([0, *(prompt.num_crops for prompt in prompts)]).tolist()
        widths = [prompt.pooling.shape[1] for prompt in prompts]
        return EncodedBatch(self, [self._digest(prompt) for prompt in prompts], starts, widths)

    def _digest(self, prompt: Example) -> bytes:
        """Of all that a prompt's visual tokens follow from; its crops are read once as long as they are the same
        array."""
        crops, known = prompt.crops, self._digests.get(id(prompt.crops))
        if known is None or known[0]() is not crops:
            self._digests = {number: held for number, held in self._digests.items() if held[0]() is not None}
            known = (weakref.ref(crops), hashlib.blake2b(np.ascontiguousarray(crops).data, digest_size=16).digest())
            self._digests[id(crops)] = known
        rest = (prompt.pooling, prompt.unit_crops, prompt.unit_pooled_tokens)
        whole = b"".join([known[1], repr([crops.shape, *(array.shape for array in rest)]).encode()])
        return hashlib.blake2b(whole + b"".join(array.tobytes() for array in rest), digest_size=16).digest()

    def of(self, key: tuple[bytes, int, int], encode: Callable[[], Tensor]) -> Tensor:
        """Visual tokens of the crops from key[1] up to key[2] of a medium, kept or encoded."""
        crops, found = key[2] - key[1], self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
            self.reused += crops
            return found
        made = encode()
        self.encoded += crops
        if made.nbytes <= self.limit:
            self._kept[key] = made.to("cpu")
            self.bytes += made.nbytes
            while self.bytes > self.limit:
                self.bytes -= self._kept.popitem(last=False)[1].nbytes
        return made


@dataclass(frozen=True)
class EncodedBatch:
    """What `EncodedMedia` has for one batch."""

    media: EncodedMedia
    digests: list[bytes]  # of each prompt
    starts: list[int]  # first crop of each prompt in the batch, and the end of the last
    widths: list[int]  # patches of each prompt's windows; the batch's are those of the widest

    def of(self, crops: slice, windows: Tensor, encode: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """Visual tokens of consecutive crops of one prompt.

        Args:
            crops: of the batch.
            windows: int64 [N, K], of the patches of these crops.
            encode: crops and windows -> [N, D].
        """
        prompt = bisect_right(self.starts, crops.start) - 1
        first = self.starts[prompt]
        key = (self.digests[prompt], crops.start - first, crops.stop - first)
        found = self.media.of(key, lambda: encode(crops, windows[:, : self.widths[prompt]]))
        return found.to(windows.device)
