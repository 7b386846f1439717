"""Needle pictures: a picture whose five colours are asked for.

Three by three cells: the corners and the middle in one of eight colours; above, left, right and below a cross of
another such colour, each on a ground of its own. So a question says what to look for and not where, and reading the
picture is easy: what needles measure is whether it is found. A haystack shows nothing of the kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIDE = 126  # pixels; nine patches of 14, and even, as films need it
CELL = SIDE // 3

COLOURS = {  # each begins with a letter of its own: the tiny tokenizer spells most of them
    "red": (220, 20, 20),
    "green": (20, 170, 40),
    "blue": (30, 50, 225),
    "yellow": (240, 225, 20),
    "orange": (255, 135, 0),
    "violet": (120, 20, 150),
    "pink": (255, 130, 190),
    "maroon": (100, 20, 30),
}
GROUNDS = {  # row and column of the cell, colour
    "black": ((0, 1), (0, 0, 0)),
    "white": ((1, 0), (255, 255, 255)),
    "grey": ((1, 2), (128, 128, 128)),
    "cyan": ((2, 1), (0, 235, 235)),
}
QUESTIONS = {  # property -> what is asked
    "picture": "Which colour is the picture?",
    **{ground: f"Which colour is on {ground}?" for ground in GROUNDS},
}
ANSWERS = tuple(COLOURS)
CROSS = np.kron([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.ones((CELL // 3, CELL // 3))).astype(bool)  # [CELL, CELL]


@dataclass(frozen=True)
class NeedlePicture:
    """What a needle picture shows."""

    colours: dict[str, str]  # of the picture, and of the cross on each ground

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> NeedlePicture:
        """Each colour uniform; the five differ."""
        return cls(dict(zip(QUESTIONS, rng.permutation(ANSWERS).tolist(), strict=False)))

    def pixels(self) -> np.ndarray:
        """uint8 [SIDE, SIDE, 3]."""
        picture = np.empty((SIDE, SIDE, 3), np.uint8)
        picture[:] = COLOURS[self.colours["picture"]]
        for ground, ((row, column), paint) in GROUNDS.items():
            cell = picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            cell[:] = np.where(CROSS[..., None], COLOURS[self.colours[ground]], paint)
        return picture
