"""Points of an annotation that its texts lack, or have elsewhere: what training loses of it without refusing it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from molmo2_nemo.data.annotations import (
    Answer,
    MultiImagePoints,
    Point,
    Points,
    TrackFrame,
    Tracks,
    TurnAnnotation,
    VideoPoints,
)
from molmo2_nemo.data.points import SAME_TIME, at_rate, on_grid, shown_track_frames, visible_points, wanted_frames

Size = tuple[float, float]  # width and height: what a point's x and y are divided by


def lost_points(
    entry: TurnAnnotation, image_sizes: Sequence[Size], video_size: Size | None, frame_times: np.ndarray
) -> dict[str, int]:
    """How many points are lost, by kind (`KINDS` of tally.py); no kind without any.

    Args:
        image_sizes: of the images that are shown.
        frame_times: float64 [n], of the sampled frames, seconds.
    """
    found = {
        "points_ignored": sum(map(len, entry.points[len(image_sizes) :])) if isinstance(entry, MultiImagePoints) else 0,
        "points_unseen": unseen_points(entry, frame_times) if isinstance(entry, Tracks) else 0,
        "points_moved": sum(moved_points(points, size) for points, size in _shown(entry, image_sizes, video_size)),
    }
    return {kind: count for kind, count in found.items() if count}


def unseen_points(track: Tracks, frame_times: np.ndarray) -> int:
    """Visible points that the task asks for and the answer lacks: those that are asked for less those in the answer.

    A task at a rate asks for the tracked frame nearest to each multiple of 1 / fps seconds; of a track that has
    positions no closer than that, these are all of its points. A task without a rate asks for every frame, or, where
    the track snaps to the sampled frames, as most may be meant to lie between them, for each object once.
    """
    task, seen = track.style.track, shown_track_frames(track, frame_times)
    if task is not None and task.on_grid:
        if at_rate(track, seen):
            return _lacking(track, seen)
        return max(visible_points(wanted_frames(track, track.snap)) - visible_points(seen), 0)
    if track.snap > 0:
        return len(_objects(track.frames) - _objects(seen))
    frames = track.frames
    if not frames:
        return 0
    away = np.abs(np.array([frame.time for frame in frames])[:, None] - np.asarray(frame_times)[None])
    seen_there = (away <= SAME_TIME).any(axis=1)
    return sum(len(_visible(frame)) for frame, is_seen in zip(frames, seen_there, strict=True) if not is_seen)


def _lacking(track: Tracks, seen: Sequence[TrackFrame]) -> int:
    """Points of an answer at its rate. A track that takes only times that agree is asked for the nearest ones too."""
    reach = track.snap if track.snap > 0 else 0.5 / track.fps
    answered = {round(frame.time * track.fps) for frame in on_grid(seen, track.fps)}
    wanted = wanted_frames(track, reach)
    return visible_points(frame for frame in wanted if round(frame.time * track.fps) not in answered)


def _objects(frames: Iterable[TrackFrame]) -> set[str]:
    """Those that are visible at some time."""
    return {name for frame in frames for name, entry in frame.points.items() if not entry.occluded}


def moved_points(points: Sequence[Point], size: Size) -> int:
    """Points outside the picture, which are written as on its edge."""
    if not points:
        return 0
    thousandths = np.rint(1000 * np.asarray(points, np.float64) / np.asarray(size, np.float64))
    return int(((thousandths < 0) | (thousandths > 1000)).any(axis=1).sum())


def _visible(frame: TrackFrame) -> list[Point]:
    return [entry.point for entry in frame.points.values() if not entry.occluded]


def _shown(
    entry: TurnAnnotation, image_sizes: Sequence[Size], video_size: Size | None
) -> Iterable[tuple[Sequence[Point], Size]]:
    """Lists of points that the texts have, with what they are divided by."""
    answer = getattr(entry, "answer", None)
    for inline in answer.inline_points if isinstance(answer, Answer) else ():
        yield inline.points, (100, 100)
    if isinstance(entry, Points) and (unit := entry.scale or (image_sizes[0] if image_sizes else None)):
        yield entry.points, unit
    if isinstance(entry, MultiImagePoints):
        for points, size in zip(entry.points, image_sizes, strict=False):
            yield points, entry.scale or size
    if isinstance(entry, VideoPoints) and (unit := entry.scale or video_size):
        yield from ((points, unit) for points in entry.points)
    if isinstance(entry, Tracks) and (unit := entry.scale or video_size):
        yield [point for frame in entry.frames for point in _visible(frame)], unit
