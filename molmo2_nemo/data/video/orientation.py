"""Turning and mirroring decoded frames as their file says: the display matrix of FFmpeg and of ISO base media files."""

from __future__ import annotations

from typing import Any

import numpy as np

# (a, b, c, d) of -1, 0, 1: a pixel in column x and row y is shown in column a x + c y, row b x + d y, from whatever
# origin makes these positive.
Orientation = tuple[int, int, int, int]
IDENTITY: Orientation = (1, 0, 0, 1)


def frame_orientation(frame: Any) -> Orientation:
    """That of a decoded frame; angles between quarter turns are rounded to the nearest of the eight orientations."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
            return nearest(a, b, c, d)
    return IDENTITY


def nearest(a: int, b: int, c: int, d: int) -> Orientation:
    """The nearest orientation to a matrix of any scale."""
    if abs(b) + abs(c) > abs(a) + abs(d):
        return 0, -1 if b < 0 else 1, -1 if c < 0 else 1, 0
    return -1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1


def is_turned(orientation: Orientation) -> bool:
    """Whether width and height change places."""
    return orientation[0] == 0


def is_mirrored(orientation: Orientation) -> bool:
    """Whether no turning alone brings it about."""
    a, b, c, d = orientation
    return a * d - b * c < 0


def upright(pixels: np.ndarray, orientation: Orientation) -> np.ndarray:
    """Pixels [H, W, ...] as they are shown: a view of the same pixels, [W, H, ...] where they are turned."""
    a, b, c, d = orientation
    if is_turned(orientation):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
