"""Host memory in pages that are used again: where saved activations wait (model/memory.py).

PyTorch's allocator of pinned memory rounds every request up to a power of two, and gives a freed block away only once
the device has passed its last copy; a host that runs ahead of the device pins a second set meanwhile. Here a buffer is
made of pages of two sizes, powers of two both, so that PyTorch adds nothing and tensors of all sizes share pages.
What was given back may be taken at once: all copies to and from pages are queued on one stream and happen in order.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

PAGE = 16 << 20  # large enough for a copy at full speed
PART = 1 << 20  # a page is cut into these for the end of a buffer


class Pages:
    """Pages of host memory for copies of one stream. They are kept until `release`, or until the object goes.

    Args:
        pinned: so that a device can copy without the host waiting.

    Attributes:
        held, used: bytes of all pages, and of what is taken. At most as many pages are held as were taken whole at
            once, and as many cut as were needed for the most parts at once.
    """

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self.held = self.used = 0
        self._free: list[Tensor] = []
        self._free_parts: list[Tensor] = []

    def take(self, size: int) -> list[Tensor]:
        """Pieces, uint8 [PAGE or PART], of `size` bytes together, rounded up to a whole PART."""
        pages, parts = divmod(-(-size // PART), PAGE // PART)
        pieces = [self._page() for _ in range(pages)] + [self._part() for _ in range(parts)]
        self.used += pages * PAGE + parts * PART
        return pieces

    def give(self, pieces: list[Tensor]) -> None:
        """Takes pieces back. Copies that were queued before may still be under way."""
        for piece in pieces:
            (self._free if len(piece) == PAGE else self._free_parts).append(piece)
            self.used -= len(piece)

    def release(self) -> None:
        """Gives pages that nobody has taken back to the system; pages that were cut only where no part is taken."""
        parts = Counter(map(_page_of, self._free_parts))
        whole = {page for page, count in parts.items() if count == PAGE // PART}
        self.held -= PAGE * (len(self._free) + len(whole))
        self._free.clear()
        self._free_parts = [part for part in self._free_parts if _page_of(part) not in whole]
        if self.pinned:
            torch._C._host_emptyCache()

    def _page(self) -> Tensor:
        if self._free:
            return self._free.pop()
        try:
            page = self._made()
        except RuntimeError:  # no more memory to pin: parts that are free, and what PyTorch keeps for others
            self.release()
            page = self._made()
        self.held += PAGE
        return page

    def _made(self) -> Tensor:
        return torch.empty(PAGE, dtype=torch.uint8, pin_memory=self.pinned)

    def _part(self) -> Tensor:
        if not self._free_parts:
            self._free_parts.extend(self._page().split(PART))
        return self._free_parts.pop()


def _page_of(part: Tensor) -> int:
    return part.untyped_storage().data_ptr()
