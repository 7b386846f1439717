"""Films whose frames show their own number, written with PyAV: what a reader took is read off its pixels.

Bit b of the number is stripe b of eight vertical ones, bright for 1; a red mark at the top left shows which way up.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.stream import Disposition

STRIPES = 8
SIZE = (160, 120)  # width, height
UNIT = 1 << 16  # 1 in the fixed point of a display matrix


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


def display_matrix(a: int, b: int, c: int, d: int) -> list[int]:
    """The display matrix that shows column x, row y in column a x + c y, row b x + d y."""
    return [a * UNIT, b * UNIT, 0, c * UNIT, d * UNIT, 0, 0, 0, 1 << 30]


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
    pixels: str = "yuv420p",
    first: int = 0,
    matrix: Sequence[int] | None = None,
) -> bytes:
    """An encoded film.

    Args:
        ticks: presentation times of the frames, in 1/timescale seconds; default: one every 1/fps seconds.
        timescale: of the encoder, and of an mp4's or mov's track; default: fps.
        options, muxer: of the encoder and of the container, as for the ffmpeg program.
        pixels: the pixel format.
        first: number that the first frame shows.
        matrix: see `display_matrix`.
    """
    base = Fraction(1, timescale or fps)
    muxer = dict(muxer or {})
    if timescale and container in ("mp4", "mov"):
        muxer["video_track_timescale"] = str(timescale)
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=muxer) as out:
        stream: Any = out.add_stream(codec, rate=fps, options={"bf": str(bframes), "threads": "1", **(options or {})})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = stream.time_base = base
        if matrix is not None:
            stream.set_display_matrix(list(matrix))
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(first + i, size), format="rgb24")
            frame.pts, frame.time_base = i * base.denominator // fps if ticks is None else ticks[i], base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def remuxed(
    films: Sequence[bytes],
    container: str,
    change: Callable[[int, Any], None] | None = None,
    *,
    flags: Sequence[Disposition] = (),
    muxer: dict[str, str] | None = None,
) -> bytes:
    """The packets of these films as streams of one file, not encoded again.

    Args:
        change: called with each packet and its number in its stream, in decoding order.
        flags: the disposition of each stream.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=muxer or {}) as out:
        sources = [av.open(io.BytesIO(data)) for data in films]
        made = [out.add_stream_from_template(source.streams.video[0]) for source in sources]
        for stream, flag in zip(made, flags, strict=False):
            stream.disposition = flag
        for source, stream in zip(sources, made, strict=True):
            for number, packet in enumerate(p for p in source.demux(source.streams.video[0]) if p.size):
                if change is not None:
                    change(number, packet)
                packet.stream = stream
                out.mux(packet)
            source.close()
    return file.getvalue()
