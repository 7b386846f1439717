"""What is known of a film before frames are chosen: its frames' times, its size, and which way up it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.video.container import SUFFIX, Deadline, Source, open_video
from molmo2_nemo.data.video.frames_pyav import reader_of, stamps_fit
from molmo2_nemo.data.video.index import VideoIndex, scan
from molmo2_nemo.data.video.orientation import Orientation, frame_orientation, is_turned


@dataclass(frozen=True, slots=True)
class Film:
    """The film of a video file, from a scan of its packets and its first frame."""

    index: VideoIndex
    size: tuple[int, int]  # width and height as shown, pixels
    orientation: Orientation
    stream: int  # its number among the file's streams
    kind: str  # of container, FFmpeg's short name
    suffix: str  # the usual file suffix of this kind
    begins: bool = True  # its first frame can be decoded; else a later one stands in


def look_at(source: Source, limits: LimitsConfig) -> Film:
    """Raises DataError: not a video, broken at the start, or beyond the limits."""
    deadline = Deadline(limits.decode_seconds)
    with open_video(source, limits) as (container, stream):
        index = scan(container, stream, limits, deadline)
        doubtful = index.in_decoding_order and (stream.codec_context.has_b_frames or container.format.name == "avi")
        if index.order == "stamps" and not doubtful:  # seeks, while the other orders are read from the start
            return _film(container, stream, index, deadline)
    if index.order == "stamps":
        with open_video(source, limits) as (container, stream):
            index = index if stamps_fit(container, stream, deadline) else index.counted()
    with open_video(source, limits) as (container, stream):
        return _film(container, stream, index, deadline)


def _film(container: Any, stream: Any, index: VideoIndex, deadline: Deadline) -> Film:
    reader = reader_of(container, stream, index, np.zeros(1, np.int64), deadline)
    first = reader.at(0)
    orientation = frame_orientation(first)
    size = (first.height, first.width) if is_turned(orientation) else (first.width, first.height)
    kind = container.format.name.split(",")[0]
    return Film(index, size, orientation, stream.index, kind, SUFFIX.get(kind, kind), reader.replaced == 0)
