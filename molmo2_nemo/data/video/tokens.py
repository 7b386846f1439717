"""The tokens of a sampled video: timestamps, markers and patches of its frames, and the subtitles after them.

Every frame is one stretched crop (no tiles, no global view) whose patches are pooled in pool x pool windows.

Shape legend: C frames (= crops), P patches per frame, D_p values per patch, N pooled tokens, K patches of a window.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from molmo2_nemo.data.config import ImageConfig, VideoConfig
from molmo2_nemo.data.image import TileGeometry, VisualInput, pool_windows
from molmo2_nemo.data.resize import patchify
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.data.video.read import SampledVideo, VideoPlan
from molmo2_nemo.errors import UserError


class SubtitleLike(Protocol):
    """One subtitle: its start and end in seconds from the start of the clip, and its text."""

    start: float
    end: float
    text: str


def timestamp_text(number: int, seconds: float, mode: str) -> str:
    """What precedes frame `number` (from 0) in the token sequence.

    Raises:
        DataError: unknown mode.
    """
    if mode == "per-frame-compact":
        return f"{seconds:.1f} " if number == 0 else f" {seconds:.1f} "
    if mode == "per-frame":
        return f"time {seconds:.2f}"
    if mode == "numbered-frames":
        return f"{number}:"
    if mode == "none":
        return ""
    raise UserError(f"unknown video.time_mode {mode!r}; known: per-frame-compact, per-frame, numbered-frames, none")


def subtitles_shown(
    subtitles: Sequence[SubtitleLike] | str, times: np.ndarray, mode: str
) -> Sequence[SubtitleLike] | str | None:
    """The subtitles that a mode keeps: `frame_N` those within N seconds of a sampled frame. None: it wants none at all.

    Subtitles without times are one text, which is kept whole.
    """
    if not subtitles or mode == "ignore":
        return None
    near = re.fullmatch(r"frame(?:_(\d+(?:\.\d+)?))?", mode)
    if not near and mode != "all" and not re.fullmatch(r"truncate_\d+", mode):
        raise UserError(f"unknown video.subtitle_mode {mode!r}; known: frame_N, all, truncate_N, ignore")
    if isinstance(subtitles, str) or not near:
        return subtitles
    reach = float(near.group(1) or 1)
    return [s for s in subtitles if np.any((s.end >= times - reach) & (s.start <= times + reach))]


def subtitle_text(shown: Sequence[SubtitleLike] | str | None) -> str:
    """The subtitle block that follows the frames: a header and one line per entry; "" for None."""
    if shown is None:
        return ""
    if isinstance(shown, str):
        return "subtitle\n" + shown
    return "".join(["subtitle\n", *(f"{entry.start:.1f} - {entry.end:.1f} {entry.text}\n" for entry in shown)])


def subtitle_ids(
    subtitles: Sequence[SubtitleLike] | str, times: np.ndarray, config: VideoConfig, tokenizer: Molmo2Tokenizer
) -> tuple[list[int], dict[str, int]]:
    """Token ids of the subtitle block, cut to the configured length; and what was left out, by kind (tally.py)."""
    shown = subtitles_shown(subtitles, times, config.subtitle_mode)
    text = subtitle_text(shown)
    ids = whole = tokenizer.encode(text) if text else []
    limits = [config.max_subtitle_tokens]
    if config.subtitle_mode.startswith("truncate_"):
        limits.append(int(config.subtitle_mode.removeprefix("truncate_")))
    for limit in limits:
        ids = ids if limit is None else ids[:limit]
    lost = {"subtitles_unseen": _lines(subtitles) - _lines(shown), "subtitle_tokens_cut": len(whole) - len(ids)}
    return ids, {kind: count for kind, count in lost.items() if count}


def _lines(subtitles: Sequence[SubtitleLike] | str | None) -> int:
    return int(bool(subtitles)) if isinstance(subtitles, str) else len(subtitles or ())


def video_token_ids(
    times: np.ndarray, tokens_per_frame: int, config: VideoConfig, tokenizer: Molmo2Tokenizer
) -> list[int]:
    """Timestamps, markers and patches of all frames in one of the layouts of the reference.

    `per_frame_markers`: time, start, patches, end for every frame; otherwise one start and one end around the whole
    video.
    """
    special = tokenizer.special
    start, end = (special.frame_start, special.frame_end) if config.frame_tokens else (special.im_start, special.im_end)
    patches = [special.im_patch] * tokens_per_frame
    ids: list[int] = [] if config.per_frame_markers else [start]
    for number, seconds in enumerate(times):
        text = timestamp_text(number, float(seconds), config.time_mode)
        ids += tokenizer.encode(text) if text else []
        ids += [start, *patches, end] if config.per_frame_markers else patches
    return ids if config.per_frame_markers else [*ids, end]


def video_layout(
    plan: VideoPlan | SampledVideo,
    image: ImageConfig,
    config: VideoConfig,
    tokenizer: Molmo2Tokenizer,
    *,
    subtitles: Sequence[SubtitleLike] | str = (),
) -> VisualInput:
    """The tokens and pooling windows of a video's frames and subtitles; its crops, not decoded, are [0, P, D_p]."""
    geometry = TileGeometry.of(image)
    patches = geometry.grid**2
    first = pool_windows(np.arange(patches).reshape(geometry.grid, geometry.grid), config.pool)
    first = first.reshape(-1, config.pool**2)
    count, pooled = len(plan.times), len(first)
    offsets = (np.arange(count) * patches)[:, None, None]
    pooling = np.where(first < 0, -1, first + offsets).reshape(count * pooled, -1).astype(np.int64)
    said, lost = subtitle_ids(subtitles, plan.times, config, tokenizer)
    return VisualInput(
        token_ids=video_token_ids(plan.times, pooled, config, tokenizer) + said,
        crops=geometry.new_crops(0),
        pooling=pooling,
        unit_crops=[1] * count,
        unit_pooled_tokens=[pooled] * count,
        info={
            "frame_times": [float(t) for t in plan.times],
            "size": list(plan.size),
            "duration": plan.duration,
            "fps": plan.fps,
            **lost,
        },
    )


def encode_video(
    video: SampledVideo,
    image: ImageConfig,
    config: VideoConfig,
    tokenizer: Molmo2Tokenizer,
    *,
    subtitles: Sequence[SubtitleLike] | str = (),
) -> VisualInput:
    """Sampled frames as crops and tokens, followed by the subtitles."""
    visual = video_layout(video, image, config, tokenizer, subtitles=subtitles)
    visual.crops = patchify(video.frames, TileGeometry.of(image).patch)
    visual.info |= video.decoding.info
    return visual
