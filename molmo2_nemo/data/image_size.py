"""The size of an encoded image without decoding it, where its header says it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.picture_decoder import ORIENTATION, Source, opened

TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
# Of these, Pillow says the size of the pixels it decodes, and reads the orientation from the header. (A TIFF's header
# may say either size, depending on Pillow's version.)
BY_HEADER = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "PPM", "GIF")
PNG_NOTES = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # may hold an orientation, also after the pixels


def image_size(data: bytes, decode: Callable[[bytes], np.ndarray], limits: LimitsConfig) -> tuple[int, int]:
    """Width and height in pixels of the upright image, as `decode` returns it.

    What has no header that can be relied on is decoded, which also raises its own errors for what is no image.

    Raises:
        DataError: from `decode`.
    """
    size = _from_header(data, limits)
    if size is not None:
        return size
    pixels = decode(data)
    return pixels.shape[1], pixels.shape[0]


def _from_header(data: bytes, limits: LimitsConfig) -> tuple[int, int] | None:
    try:
        with opened(Source(data, limits.image_seconds), limits) as image:
            if image.format not in BY_HEADER:
                return None
            if image.format == "PNG":
                return None if any(note in data for note in PNG_NOTES) else image.size
            turned = image.getexif().get(ORIENTATION) in TURNED
            return (image.height, image.width) if turned else image.size
    except Exception:  # what Pillow raises for broken files depends on the format; decoding says it in words
        return None
