"""Haystacks: dull drawn scenes, or a film of one's own, as long as wanted; and dull sentences."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from molmo2_nemo.errors import DataError
from molmo2_nemo.evaluation.needles.pictures import SIDE

SCENE = 16  # frames from one cut to the next, on average
BLOCKS = 3  # that move through a scene
TICKS = 90_000  # a second
EARLY = 0.001  # seconds
FILLERS = (
    "The rain falls on the road.",
    "A man walks to the house.",
    "The light of the day is soft.",
    "They look at the old wall.",
    "There is a tree in the field.",
    "The road leads to the sea.",
    "She opens the door and waits.",
    "The wind moves the leaves.",
)


def drawn_scenes(count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Frames uint8 [SIDE, SIDE, 3]: grey gradients with a tint, dark blocks moving over them."""
    done = 0
    while done < count:
        length = min(count - done, int(rng.integers(SCENE // 2, SCENE * 3 // 2 + 1)))
        yield from _scene(length, rng)
        done += length


def _scene(length: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    tilt = rng.uniform(-25, 25, 2)
    x, y = np.meshgrid(*[np.linspace(-1, 1, SIDE)] * 2)
    shade = rng.uniform(80, 150) + tilt[0] * x + tilt[1] * y
    ground = (shade[..., None] + rng.uniform(-15, 15, 3)).astype(np.uint8)
    size = rng.integers(12, 40, (BLOCKS, 2))
    start, speed = rng.uniform(0, SIDE, (BLOCKS, 2)), rng.uniform(-4, 4, (BLOCKS, 2))
    paint = (rng.uniform(50, 170, (BLOCKS, 1)) + rng.uniform(-20, 20, (BLOCKS, 3))).astype(np.uint8)
    for number in range(length):
        frame = ground.copy()
        for (top, left), (height, width), colour in zip(
            ((start + number * speed) % SIDE).astype(int), size, paint, strict=True
        ):
            frame[top : top + height, left : left + width] = colour
        yield frame


def film_scenes(film: bytes, count: int) -> Iterator[np.ndarray]:
    """Frames of a film, stretched to [SIDE, SIDE, 3], from the start again where it ends before `count`.

    Raises:
        DataError: not a film.
    """
    import av

    done = 0
    while done < count:
        before = done
        try:
            with av.open(io.BytesIO(film), "r") as source:
                for frame in source.decode(video=0):
                    if done == count:
                        return
                    yield frame.reformat(SIDE, SIDE, "rgb24").to_ndarray()
                    done += 1
        except (av.FFmpegError, IndexError) as error:
            raise DataError(f"the film for the haystack cannot be read: {error}") from error
        if done == before:
            raise DataError("the film for the haystack holds no frames")


def encode(frames: Iterator[np.ndarray], fps: float) -> bytes:
    """An mp4 of these frames, `fps` a second, all but the first `EARLY` before their time, so that a sample at a
    frame's time shows that frame however times are rounded. The bytes depend on them and on the encoder's version."""
    import av

    file, base = io.BytesIO(), Fraction(1, TICKS)
    options = {"preset": "ultrafast", "crf": "18", "threads": "1"}
    with av.open(file, "w", format="mp4", options={"video_track_timescale": str(TICKS)}) as out:
        rate = Fraction(fps).limit_denominator(1000)
        stream: Any = out.add_stream("libx264", rate=rate, options=options)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 32
        stream.codec_context.time_base = stream.time_base = base
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = max(0, round(number / fps * TICKS) - round(EARLY * TICKS))
            frame.time_base = base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()
