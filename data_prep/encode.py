"""Films made of images: H.264 in mp4, the same bytes for the same images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.media_kinds import NOT_FOUND, MediaError
from data_prep.sources.base import Frames
from molmo2_nemo.data.record import IMAGE_SUFFIXES
from molmo2_nemo.errors import DataError
from molmo2_nemo.files import atomic

MAX_FRAME_FILES = 200_000


def encode_frames(folder: Path, media: Frames, cache: Path) -> Path:
    """An mp4 (H.264) of the images in a folder, encoded once and cached, and anew when one of them is newer.

    Raises:
        MediaError: no images, or one that cannot be decoded.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES)
    files = files[:: media.step][media.first : None if media.last is None else media.last + 1]
    if not files or len(files) > MAX_FRAME_FILES:
        raise MediaError(NOT_FOUND, f"{len(files)} images in {folder}, {media.first} to {media.last}")
    identity = f"{folder.resolve()} {media.fps} {media.step} {media.first} {media.last} {len(files)}"
    name = hashlib.sha256(identity.encode()).hexdigest()
    target = cache / name[:2] / f"{name}.mp4"
    if not target.exists() or target.stat().st_mtime_ns < max(file.stat().st_mtime_ns for file in files):
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic(target) as part:
            encode_video(_images(files), part, media.fps)
    return target


def _images(files: list[Path]) -> Iterator[Any]:
    from molmo2_nemo.data.pictures import decode_image

    for file in files:
        try:
            yield decode_image(file.read_bytes())
        except (DataError, OSError) as error:
            raise MediaError("image cannot be decoded", f"{file}: {error}") from None


class Ticks(NamedTuple):
    """When the frames of a video are shown."""

    base: Fraction  # seconds of a tick
    marks: np.ndarray  # int64 [frames + 1], ascending: when each begins, and the end


def encode_video(images: Iterator[Any], path: Path, fps: float, *, gop: int = 0, ticks: Ticks | None = None) -> None:
    """Write RGB images (uint8 [H, W, 3]) as an H.264 mp4; the same images give the same bytes.

    Odd sizes lose their last row or column.

    Args:
        gop: frames from one key frame to the next; 0: two seconds.
        ticks: when they are shown; default: `fps` a second.
    """
    import av

    rate = Fraction(fps).limit_denominator(1001)
    base = ticks.base if ticks is not None else 1 / rate
    size: tuple[int, int] | None = None
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream("libx264", rate=rate)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = stream.time_base = base
        stream.options = {"crf": "18", "preset": "fast", "bf": "0", "g": str(gop or max(round(2 * fps), 1))}
        lasts: dict[int, int] = {}  # pts of a frame -> its duration

        def write(frame: Any) -> None:
            for packet in stream.encode(frame):
                packet.duration = lasts.pop(packet.pts, packet.duration)
                container.mux(packet)

        for number, pixels in enumerate(images):
            height, width = (v - v % 2 for v in pixels.shape[:2])
            if size is None:
                size = stream.width, stream.height = width, height
            if (width, height) != size:
                raise MediaError("frames of different sizes", f"{width} x {height} after {size[0]} x {size[1]}")
            frame: Any = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")
            frame.time_base = base
            frame.pts, end = (number, number + 1) if ticks is None else map(int, ticks.marks[number : number + 2])
            lasts[frame.pts] = end - frame.pts
            write(frame)
        write(None)
