"""Films whose frames show their own number, written with PyAV: what a reader took is read off its pixels.

Bit b of the number is stripe b of eight vertical ones, bright for 1; a red mark at the top left shows which way up.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np

STRIPES = 8
SIZE = (160, 120)  # width, height


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """uint8 [height, width, 3]."""
    width, height = size
    bits = (number >> (np.arange(width) * STRIPES // width)) & 1
    pixels = np.repeat(np.where(bits, 220, 30).astype(np.uint8)[None, :, None], height, 0).repeat(3, 2)
    pixels[: height // 4, : width // 8] = (255, 0, 0)
    return pixels


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers that upright frames, uint8 [C, H, W, 3], show: read below the mark, in the middle of each stripe."""
    width = frames.shape[2]
    middles = ((np.arange(STRIPES) + 0.5) * width / STRIPES).astype(int)
    bits = frames[:, frames.shape[1] // 2 :, middles, 1].mean(1) > 125
    return (bits @ (1 << np.arange(STRIPES))).tolist()


def film(
    count: int = 90,
    container: str = "mp4",
    codec: str = "libx264",
    *,
    fps: int = 30,
    ticks: Sequence[int] | None = None,
    timescale: int | None = None,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    gop: int = 12,
    bframes: int = 2,
    size: tuple[int, int] = SIZE,
    first: int = 0,
    matrix: Sequence[int] | None = None,
) -> bytes:
    """An encoded film.

    Args:
        ticks: presentation times of the frames, in 1/timescale seconds; default: one every 1/fps seconds.
        timescale: of the encoder, and of an mp4's or mov's track; default: fps.
        options, muxer: of the encoder and of the container, as for the ffmpeg program.
        first: number that the first frame shows.
        matrix: the display matrix, 9 numbers in 16.16 fixed point (2.30 in the last column).
    """
    base = Fraction(1, timescale or fps)
    muxer = dict(muxer or {})
    if timescale and container in ("mp4", "mov"):
        muxer["video_track_timescale"] = str(timescale)
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=muxer) as out:
        stream: Any = out.add_stream(codec, rate=fps, options={**({"bf": str(bframes)}), **(options or {})})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = stream.time_base = base
        if matrix is not None:
            stream.set_display_matrix(list(matrix))
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(first + i, size), format="rgb24")
            frame.pts, frame.time_base = i * base.denominator // fps if ticks is None else ticks[i], base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()
