"""Still images: encoded bytes -> upright RGB pixels, with limits on pixels and processor time.

A picture of few bytes can take hours: a progressive JPEG of empty scans, an AVIF of hidden frames, a TIFF of tiles
larger than the picture. Most decoders are given the file in blocks, so the time is looked at before each block
(picture_decoder.py). Those that take the whole file in one call run in a process of their own, which the system ends
(picture_process.py). WebP takes it in one call too, but its work is bounded by its pixels: 64 million take 2 s to 4 s.
"""

from __future__ import annotations

import numpy as np

from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.picture_decoder import Picture, Source, Truncated, decode_here, describe, opened
from molmo2_nemo.data.picture_process import decode_apart
from molmo2_nemo.errors import DataError


def decode_image(
    data: bytes,
    *,
    limits: LimitsConfig | None = None,
    truncated: Truncated = "load",
    notes: list[str] | None = None,
) -> np.ndarray:
    """Pixels of an encoded image, turned upright: uint8 [H, W, 3].

    Transparency is dropped, deep grey is scaled to 8 bits, of several pictures in one file the first is taken.

    Args:
        limits: on pixels and processor time.
        truncated: a file that is cut off or damaged inside: `load` what there is, as the published code does.
        notes: TRUNCATED is appended where that happened.
    Raises:
        DataError: not an image, more than the limits allow, or of values whose black and white nobody can know.
    """
    picture = decode_picture(data, limits=limits or LimitsConfig(), truncated=truncated)
    if notes is not None:
        notes += picture.notes
    return picture.pixels


def decode_picture(data: bytes, *, limits: LimitsConfig, truncated: Truncated, probe: bool = False) -> Picture:
    """The picture in `data`.

    Args:
        probe: find out size, format and all notes, and that it decodes; a JPEG is decoded at an eighth of its size,
            which still reads every byte, and no pixels are returned.
    Raises:
        DataError: see `decode_image`.
    """
    try:
        decode = decode_apart if _apart(data, limits) else decode_here
        return decode(data, limits=limits, truncated=truncated, probe=probe)
    except Exception as error:  # what Pillow raises for broken files depends on the format and on where it breaks
        raise DataError(describe(data, error, limits)) from error


def _apart(data: bytes, limits: LimitsConfig) -> bool:
    """Whether the decoder of this picture would take it in one call that may be long."""
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        try:
            with opened(Source(data, limits.image_seconds), limits) as image:
                return bool(image.tile) and image.tile[0][0] == "libtiff"
        except DataError:
            raise
        except Exception:  # it cannot be opened; decoding says why
            return False
    return data[4:12] in (b"ftypavif", b"ftypavis", b"jP  \r\n\x87\n") or data[:4] == b"\xff\x4f\xff\x51"
