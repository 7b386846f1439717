"""Masks of objects as COCO writes them: lengths of runs down the columns, background first.

{"size": [height, width], "counts": [5, 3, 8]}          plain
{"size": [height, width], "counts": "538"}              compressed to a text, as pycocotools writes it

>>> mask = read_mask({"size": [4, 4], "counts": [5, 3, 8]})
>>> mask.covers(1, 1), mask.covers(1, 0), mask.covers(9, 9)
(True, False, False)
>>> read_mask({"size": [4, 4], "counts": "538"}).pixels().sum()
3
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from molmo2_nemo.errors import UserError


@dataclass(frozen=True)
class Mask:
    """The pixels of one object in one image."""

    height: int
    width: int
    ends: np.ndarray  # int64 [R]: ends of the runs, pixels counted down the columns; runs 1, 3, 5, ... are the object

    def covers(self, x: int, y: int) -> bool:
        """Whether a pixel is of the object; pixels outside of the image are not."""
        if not (0 <= x < self.width and 0 <= y < self.height):
            return False
        return bool(np.searchsorted(self.ends, x * self.height + y, side="right") % 2)

    def pixels(self) -> np.ndarray:
        """bool [H, W]."""
        flags = np.repeat(np.arange(len(self.ends)) % 2 == 1, np.diff(self.ends, prepend=0))
        return flags.reshape(self.width, self.height).T


def covers_point(mask: Mask, x: float, y: float) -> bool:
    """Whether the pixel nearest to a point is of the object (halves to even, as published)."""
    return mask.covers(round(x), round(y))


def read_mask(value: Any) -> Mask:
    """A mask from its JSON.

    Raises:
        UserError: it is not one; says what is wrong.
    """
    expected = 'expected {"size": [height, width], "counts": run lengths, or their compressed text}'
    if not isinstance(value, Mapping) or not {"size", "counts"} <= set(value):
        raise UserError(f"a mask is {str(value)[:60]}; {expected}")
    size, counts = value["size"], value["counts"]
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise UserError(f"a mask's size is {str(size)[:60]}; expected [height, width]")
    if isinstance(counts, str):
        counts = _decompressed(counts)
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        raise UserError(f"a mask's counts are {str(value['counts'])[:60]}; {expected}")
    if sum(counts) != size[0] * size[1]:
        raise UserError(f"a mask's counts sum to {sum(counts)}; its size {size[0]} x {size[1]} has {size[0] * size[1]}")
    return Mask(size[0], size[1], np.cumsum(np.array(counts, np.int64)))


def write_mask(pixels: np.ndarray) -> dict[str, Any]:
    """The plain JSON of a mask, bool [H, W]."""
    flat = np.concatenate([[False], pixels.astype(bool).T.ravel()])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], changes, [pixels.size]])).tolist()
    return {"size": list(pixels.shape), "counts": counts}


def _decompressed(text: str) -> list[int] | None:
    """Run lengths from COCO's text: groups of five bits from '0' on, lowest first, bit 6 for more to come, the last
    group's fifth bit for the sign; from the fourth run on the difference to the run two before. None if it is cut off.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 50:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return None if shift else counts
