"""Stretching pictures and frames, and putting their pixels in the order of patches.

Bilinear in fp32 without antialiasing, rounded half to even: the same numbers as torchvision's
`Resize([height, width], BILINEAR, antialias=False)` on a uint8 tensor. A patch is (row, column, channel), channel
fastest.

Shape legend: C crops, P patches per crop, D_p values per patch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Stretch uint8 [H, W, 3] to uint8 [height, width, 3]. May return `pixels` itself."""
    if pixels.shape[:2] == (height, width):
        return pixels
    import torch  # here, so that data_prep can use the geometry without it
    from torch.nn import functional as F

    # Channels stay last in memory from beginning to end; any other layout costs copies and gives the same numbers.
    source = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
    with _one_thread():
        out = F.interpolate(source.float(), size=(height, width), mode="bilinear", align_corners=False).round_()
    return out[0].permute(1, 2, 0).numpy().astype(np.uint8, order="C")  # NumPy's cast is several times torch's


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
