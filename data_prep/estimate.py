"""Estimates of the tokens and crops that a record will have in training.

Crops and visual tokens follow from sizes and durations and are exact for the published preprocessing (`ImageConfig` and
`VideoConfig` with their defaults: 8 tiles, 128 frames). Text is estimated: it depends on the tokenizer and on the
wordings drawn in training. Of tracks count the frames that are shown. The manifest keeps both for `molmo2 shards
stats`; nothing in training depends on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.text_length import estimated
from molmo2_nemo.data.annotation_json import read_tracks
from molmo2_nemo.data.check import View
from molmo2_nemo.data.config import DataConfig, ImageConfig, VideoConfig
from molmo2_nemo.data.image import TileGeometry, select_tiling
from molmo2_nemo.data.points import answer_frames, shown_track_frames, visible_points
from molmo2_nemo.data.styles import Kind, style_of
from molmo2_nemo.data.video.sampling import TimeSampler

TURN_TOKENS = 10  # chat scaffolding of one turn, and its end token
PROMPT_TOKENS = 12  # a training prompt, where the annotation has no question
POINT_TOKENS = 10  # "1 234 567" and its separator
TIME_TOKENS = 6  # "12.5" with a space before and after
SUBTITLE_TOKENS = 12  # times of one line
FRAME_MARKERS = 2


def image_cost(sizes: Sequence[tuple[int, int]], config: ImageConfig | None = None) -> tuple[int, int]:
    """(tokens, crops) of all images of a record; `sizes` holds their (width, height) in pixels."""
    config = config or ImageConfig()
    geometry = TileGeometry.of(config)
    used = sizes[: config.max_images]
    most = config.max_crops if len(used) == 1 else config.max_multi_image_crops
    tokens = crops = 0
    for width, height in used:
        rows, cols = select_tiling(
            max(height - geometry.overlap, 1), max(width - geometry.overlap, 1), geometry.window, most
        )
        high = [
            math.ceil((count * geometry.window_patches + 2 * geometry.margin) / geometry.pool) for count in (rows, cols)
        ]
        low = math.ceil(geometry.grid / geometry.pool) ** 2
        tokens += low + 2 + high[0] * (high[1] + 1) + 2
        crops += 1 + rows * cols
    return tokens, crops


def video_cost(
    duration: float, fps: float, sampling: Mapping[str, Any], image: ImageConfig | None = None
) -> tuple[int, int]:
    """(tokens, crops) of a video or clip of `duration` seconds; timestamps are estimated."""
    config = VideoConfig()
    frames = video_crops(duration, fps, sampling, config)
    side = math.ceil(TileGeometry.of(image or ImageConfig()).grid / config.pool)
    return frames * (side * side + FRAME_MARKERS + TIME_TOKENS), frames


def video_crops(duration: float, fps: float, sampling: Mapping[str, Any], config: VideoConfig) -> int:
    """Frames that are sampled from a video or clip of `duration` seconds."""
    return len(TimeSampler.of(config, sampling, fps)(duration))


def text_cost(
    trees: Iterable[Sequence[Mapping[str, Any]]],
    subtitles: Sequence[Mapping[str, Any]] | str = (),
    shown: np.ndarray | None = None,
) -> int:
    """Estimated text tokens: those of the longest variant and of the subtitles.

    Args:
        shown: float64 [n], the times of the sampled frames, seconds; without it all frames of tracks count.
    """
    return max((sum(_annotation(a, shown) for a in tree) for tree in trees), default=0) + subtitle_cost(subtitles)


def subtitle_cost(subtitles: Sequence[Mapping[str, Any]] | str) -> int:
    """Estimated tokens of subtitles."""
    if isinstance(subtitles, str):
        return _text(subtitles)
    return sum(SUBTITLE_TOKENS + _text(line["text"]) for line in subtitles)


def visual_cost(view: View, sampling: Mapping[str, Any], config: DataConfig) -> int:
    """Tokens of a record's images or sampled frames, their markers and timestamps included."""
    if view.video_size is None:
        return image_cost(view.image_sizes, config.image)[0] if view.image_sizes else 0
    side = math.ceil(TileGeometry.of(config.image).grid / config.video.pool)
    frames = video_crops(view.duration, view.fps, sampling, config.video)
    return frames * (side * side + FRAME_MARKERS + TIME_TOKENS)


def _annotation(annotation: Mapping[str, Any], shown: np.ndarray | None) -> int:
    if annotation.get("either"):
        shared = {name: value for name, value in annotation.items() if name != "either"}
        return max(_annotation({**shared, **form}, shown) for form in annotation["either"])
    if annotation.get("turns"):
        style = {name: annotation[name] for name in ("style",) if name in annotation}
        return sum(_annotation({**style, **turn}, shown) for turn in annotation["turns"])
    if annotation.get("messages"):
        messages = annotation["messages"]
        return sum(map(_text, messages)) + TURN_TOKENS * (len(messages) // 2)
    if is_raw(annotation):
        return _text(annotation["text"]) + 1
    tokens = TURN_TOKENS
    for name in ("question", "explanation", "answer", "text", "label", "prompt"):
        tokens += _text(annotation.get(name) or "")
    tokens += sum(map(_text, annotation.get("options") or ()))
    if annotation.get("answers"):
        tokens += max(map(_text, annotation["answers"]))
    if not annotation.get("question"):
        tokens += PROMPT_TOKENS
    if shown is not None and style_of(annotation.get("style", "")).kind is Kind.TRACKS:
        return tokens + _track(annotation, shown)
    return tokens + _points(annotation.get("points") or ())


def _track(annotation: Mapping[str, Any], shown: np.ndarray) -> int:
    """Tokens of the answer of a track, of the frames that training takes."""
    track = read_tracks(dict(annotation))
    frames = answer_frames(track, shown_track_frames(track, shown))
    return TIME_TOKENS * len(frames) + POINT_TOKENS * visible_points(frames)


def is_raw(annotation: Mapping[str, Any]) -> bool:
    """Whether an annotation is a document."""
    return style_of(annotation.get("style", "")).kind is Kind.RAW_TEXT


def _points(points: Any) -> int:
    """The number of points in a list of points, of groups of points, or of frames of a track."""
    if isinstance(points, Mapping):  # a tracked point
        return POINT_TOKENS
    if len(points) == 2 and all(isinstance(v, (int, float)) for v in points):
        return POINT_TOKENS
    tokens = 0
    for entry in points:
        if isinstance(entry, Mapping):  # a frame of a track
            tokens += TIME_TOKENS + POINT_TOKENS * len(entry.get("points", ()))
        else:
            tokens += _points(entry)
    return tokens


def _text(text: str) -> int:
    return math.ceil(estimated(text).likely)
