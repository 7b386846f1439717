"""Needle pictures: a picture whose five properties are asked for.

Three by three cells: a background in one of ten colours, corners and centre in others, a pattern above the centre, and
a field below it that is black on one side. A haystack shows nothing of the kind.
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
SIDES = ("left", "right", "top", "bottom", "middle", "edge")
QUESTIONS = {  # property -> what is asked
    "colour": "Which colour is the picture?",
    "corner": "Which colour are its corners?",
    "centre": "Which colour is its centre?",
    "pattern": "Which pattern is in it?",
    "side": "Which side of it is black?",
}
ANSWERS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "corner": tuple(COLOURS),
    "centre": tuple(COLOURS),
    "pattern": PATTERNS,
    "side": SIDES,
}


@dataclass(frozen=True)
class NeedlePicture:
    """What a needle picture shows."""

    colour: str  # of the background
    corner: str  # colour of the corners
    centre: str  # colour of the middle
    pattern: str
    side: str  # of the lower field, that is black

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> NeedlePicture:
        """Each property uniform; the three colours differ."""
        colour, corner, centre = (str(name) for name in rng.choice(list(COLOURS), 3, replace=False))
        return cls(colour, corner, centre, str(rng.choice(PATTERNS)), str(rng.choice(SIDES)))

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
        picture[middle, middle] = COLOURS[self.centre]
        picture[:CELL, middle] = np.where(pattern_mask(self.pattern), 0, 255)[..., None]
        picture[2 * CELL :, middle] = np.where(side_mask(self.side), 0, 255)[..., None]
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


def side_mask(side: str) -> np.ndarray:
    """Which pixels of its cell are black, bool [CELL, CELL]."""
    y, x = np.mgrid[:CELL, :CELL]
    inner = (abs(x - (CELL - 1) / 2) < PATCH / 2) & (abs(y - (CELL - 1) / 2) < PATCH / 2)
    return {
        "left": x < CELL // 2,
        "right": x >= CELL // 2,
        "top": y < CELL // 2,
        "bottom": y >= CELL // 2,
        "middle": inner,
        "edge": ~inner,
    }[side]
