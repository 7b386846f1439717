"""Stretching pictures and frames, and putting their pixels in the order of patches.

Bilinear in fp32 without antialiasing, rounded half to even: the same numbers as torchvision's
`Resize([height, width], BILINEAR, antialias=False)` on a uint8 tensor. A patch is (row, column, channel), channel
fastest.

Shape legend: C crops, P patches per crop, D_p values per patch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

KEPT = 2**23  # numbers that a thread keeps room for: 32 MiB, a frame of 1920 x 1080
BILINEAR: Any = {"mode": "bilinear", "align_corners": False}
_scratch = threading.local()


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Stretch uint8 [H, W, 3] to uint8 [height, width, 3]. May return `pixels` itself."""
    return resizes(pixels, [(height, width)])[0]


def resizes(pixels: np.ndarray, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """`resize` to several heights and widths; the picture is made floating-point once for all of them."""
    if all(pixels.shape[:2] == size for size in sizes):
        return [pixels for _ in sizes]
    from torch.nn import functional as F  # here, so that data_prep can use the geometry without torch

    with _one_thread():
        source = _floats(np.ascontiguousarray(pixels))
        return [
            pixels if pixels.shape[:2] == size else _bytes(F.interpolate(source, size=size, **BILINEAR))
            for size in sizes
        ]


def _bytes(image: Any) -> np.ndarray:
    """An fp32 tensor [1, 3, H, W], channels last in memory, rounded in place: uint8 [H, W, 3]."""
    return (
        image.round_()[0].permute(1, 2, 0).numpy().astype(np.uint8, order="C")
    )  # NumPy's cast is several times torch's


def _floats(pixels: np.ndarray) -> Any:
    """uint8 [H, W, 3] as an fp32 tensor [1, 3, H, W], valid until the next call.

    Channels stay last in memory; any other layout costs copies and gives the same numbers. Memory is used again: for
    every frame anew, the system would spend longer on handing it out than the conversion takes.
    """
    import torch

    height, width, _ = pixels.shape
    room = getattr(_scratch, "room", None)
    if room is None or room.numel() < pixels.size:
        room = torch.empty(pixels.size)
        if pixels.size <= KEPT:
            _scratch.room = room
    image = room[: pixels.size].view(1, height, width, 3)
    return image.copy_(torch.from_numpy(pixels)).permute(0, 3, 1, 2)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Where torch splits the work between threads changes its rounding; pixels must be the same in every process.

    Every operation belongs inside: one that runs on all threads between two that run on one makes OpenMP end and start
    its threads, which takes longer than the operation.
    """
    import torch

    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def patchify(crops: np.ndarray, patch: int, out: np.ndarray | None = None) -> np.ndarray:
    """[C, height, width, 3] in patches: [C, P, D_p], written to `out` if that is given (contiguous)."""
    count, height, width, channels = crops.shape
    rows, columns, values = height // patch, width // patch, patch * channels
    if out is None:
        out = np.empty((count, rows * columns, patch * values), crops.dtype)
    assert out.flags.c_contiguous
    one_row = np.dtype((np.void, values * crops.itemsize))  # the row of a patch, moved as one value
    source = crops.reshape(count, rows, patch, columns, values)
    if source.strides[-1] != crops.itemsize:
        source = np.ascontiguousarray(source)
    target = out.reshape(count, rows, columns, patch, values)
    target.view(one_row)[..., 0] = source.view(one_row)[..., 0].transpose(0, 1, 3, 2)
    return out
