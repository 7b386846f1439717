"""Needle pictures: a framed picture whose five properties are asked for.

Three by three cells: a background in one of ten colours, corners in another one, a digit in the middle, a pattern above
it and dots below. A haystack shows nothing of the kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIDE = 126  # pixels; nine patches of 14, and even, as films need it
CELL = SIDE // 3
PATCH = SIDE // 9

COLOURS = {
    "red": (220, 20, 20),
    "green": (20, 170, 40),
    "blue": (30, 50, 225),
    "yellow": (240, 225, 20),
    "orange": (255, 135, 0),
    "purple": (120, 20, 150),
    "pink": (255, 130, 190),
    "brown": (110, 60, 20),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}
PATTERNS = ("rows", "columns", "checks", "grid", "rings", "cross")
DIGITS = tuple("0123456789")
MOST_DOTS = 9  # three by three in their cell, filled row by row
QUESTIONS = {  # property -> what is asked
    "colour": "Which colour is the picture?",
    "corner": "Which colour are its corners?",
    "digit": "Which digit is in it?",
    "pattern": "Which pattern is in it?",
    "count": "How many dots are in it?",
}
ANSWERS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "corner": tuple(COLOURS),
    "digit": DIGITS,
    "pattern": PATTERNS,
    "count": tuple(str(n) for n in range(1, MOST_DOTS + 1)),
}
_SEGMENTS = {  # of a seven-segment digit: top, upper left, upper right, middle, lower left, lower right, bottom
    **{"0": "1110111", "1": "0010010", "2": "1011101", "3": "1011011", "4": "0111010"},
    **{"5": "1101011", "6": "1101111", "7": "1010010", "8": "1111111", "9": "1111011"},
}


@dataclass(frozen=True)
class NeedlePicture:
    """What a needle picture shows."""

    colour: str  # of the background
    corner: str  # colour of the corners
    digit: str
    pattern: str
    count: int  # dots

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> NeedlePicture:
        """Each property uniform, but for the two colours, which differ."""
        colour, corner = (str(name) for name in rng.choice(list(COLOURS), 2, replace=False))
        count = int(rng.integers(1, MOST_DOTS + 1))
        return cls(colour, corner, str(rng.choice(DIGITS)), str(rng.choice(PATTERNS)), count)

    def answer(self, kind: str) -> str:
        """The answer to `QUESTIONS[kind]`."""
        return str(getattr(self, kind))

    def pixels(self) -> np.ndarray:
        """uint8 [SIDE, SIDE, 3]."""
        picture = np.empty((SIDE, SIDE, 3), np.uint8)
        picture[:] = COLOURS[self.colour]
        for rows in (slice(0, CELL), slice(2 * CELL, SIDE)):
            for columns in (slice(0, CELL), slice(2 * CELL, SIDE)):
                picture[rows, columns] = COLOURS[self.corner]
        middle = slice(CELL, 2 * CELL)
        masks = (pattern_mask(self.pattern), digit_mask(self.digit), dots_mask(self.count))
        for number, mask in enumerate(masks):
            picture[number * CELL : (number + 1) * CELL, middle] = np.where(mask, 0, 255)[..., None]
        return picture


def pattern_mask(pattern: str) -> np.ndarray:
    """Which pixels of its cell a pattern blackens, bool [CELL, CELL]."""
    y, x = np.mgrid[:CELL, :CELL]
    half = PATCH // 2
    row, column = y // half % 2 == 0, x // half % 2 == 0
    off = np.maximum(abs(x - (CELL - 1) / 2), abs(y - (CELL - 1) / 2))
    near = np.minimum(abs(x - (CELL - 1) / 2), abs(y - (CELL - 1) / 2))
    return {
        "rows": row,
        "columns": column,
        "checks": row ^ column,
        "grid": row & column,
        "rings": off // half % 2 == 0,
        "cross": near < half,
    }[pattern]


def dots_mask(count: int) -> np.ndarray:
    """Which pixels of their cell so many dots blacken, bool [CELL, CELL]."""
    mask = np.zeros((CELL, CELL), bool)
    for number in range(count):
        top, left = number // 3 * PATCH, number % 3 * PATCH
        mask[top + 1 : top + PATCH - 1, left + 1 : left + PATCH - 1] = True
    return mask


def digit_mask(digit: str) -> np.ndarray:
    """Which pixels of the plate a digit covers, bool [CELL, CELL]."""
    on = [segment == "1" for segment in _SEGMENTS[digit]]
    mask = np.zeros((CELL, CELL), bool)
    left, right, thick = 10, CELL - 10, 5
    tops = (4, CELL // 2 - 2, CELL - 4 - thick)
    for lit, top in zip((on[0], on[3], on[6]), tops, strict=True):
        mask[top : top + thick, left:right] |= lit
    for lit, row, column in zip(on[1:3] + on[4:6], (0, 0, 1, 1), (0, 1, 0, 1), strict=True):
        start = right - thick if column else left
        mask[tops[row] : tops[row + 1] + thick, start : start + thick] |= lit
    return mask
