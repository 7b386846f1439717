"""Points and tracks as text, both ways.

    <points coords="1 1 031 625 2 156 104">red cars</points>
    <tracks coords="0.0 1 156 208 2 469 208;0.5 1 172 208">people</tracks>

A group is `FRAME IDX X Y IDX X Y ...`: the image's number from 1, or seconds of a video; coordinates are thousandths
of the width and height. Formats `html-v1` and `html-v2` differ only in what separates groups (TAB, semicolon).
Points outside the image are moved to its edge, so that everything written can be read back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from molmo2_nemo.data.annotations import TrackFrame, TrackPoint, Tracks
from molmo2_nemo.errors import DataError, UserError

SEPARATORS = {"html-v1": "\t", "html-v2": ";"}
NONE_TEXT = "There are none."
NO_TRACKS_TEXT = "No tracks available."
SAME_TIME = 0.01  # seconds; annotated and sampled frames closer than this are the same

NumberedPoint = tuple[int, int, int]  # number, x, y in thousandths


@dataclass(frozen=True)
class PointGroup:
    """The points of one image or frame. `frame` is as in the text: an image number `1`, or seconds such as `12.2`."""

    frame: str
    points: tuple[NumberedPoint, ...]


@dataclass(frozen=True)
class PointTag:
    """One `<points>` or `<tracks>` element."""

    groups: tuple[PointGroup, ...]
    label: str
    alt: str | None = None
    kind: str = "points"

    @property
    def count(self) -> int:
        return sum(len(group.points) for group in self.groups)


def scale_point(point: Sequence[float], size: tuple[float, float]) -> tuple[int, int]:
    """Thousandths of `size` (width, height), rounded half to even and kept inside the image.

    Raises:
        DataError: not two finite numbers, or a size that is not positive.
    """
    if len(point) != 2 or not all(math.isfinite(v) for v in point):
        raise DataError(f"a point must be two finite numbers, got {point!r}")
    if not all(side > 0 for side in size):
        raise DataError(f"points need a positive scale or image size, got {size!r}")
    x, y = (min(max(round(1000 * value / side), 0), 1000) for value, side in zip(point, size, strict=True))
    return x, y


def seconds_text(seconds: float) -> str:
    """Seconds with one decimal, as Python prints them: `0.0`, `12.2`."""
    return str(round(float(seconds), 1))


def number_points(groups: Iterable[tuple[str, Iterable[tuple[int, int]]]]) -> tuple[PointGroup, ...]:
    """Number scaled points 1, 2, 3, ... across all groups, in (x, y) order within each; empty groups are dropped."""
    numbered: list[PointGroup] = []
    count = 0
    for frame, points in groups:
        ordered = sorted(points)
        if ordered:
            numbered.append(PointGroup(frame, tuple((count + i, x, y) for i, (x, y) in enumerate(ordered, start=1))))
            count += len(ordered)
    return tuple(numbered)


def render(tag: PointTag, point_format: str) -> str:
    """The text of a tag. A label or alternative text that would break the tag is made harmless.

    Raises:
        UserError: unknown format.
    """
    if point_format not in SEPARATORS:
        raise UserError(f"unknown text.point_format {point_format!r}; known: {', '.join(SEPARATORS)}")
    groups = SEPARATORS[point_format].join(
        " ".join([group.frame, *(f"{number} {x:03d} {y:03d}" for number, x, y in group.points)]) for group in tag.groups
    )
    alt = "" if tag.alt is None else f' alt="{clean_alt(tag.alt)}"'
    return f'<{tag.kind}{alt} coords="{groups}">{clean_label(tag.label)}</{tag.kind}>'


def clean_label(label: str) -> str:
    """A label that cannot close its own tag."""
    return re.sub(r"</(points|tracks)>", r"< /\1>", label)


def clean_alt(alt: str) -> str:
    """An alternative text without double quotes."""
    return alt.replace('"', "'")


def count_text(mode: str, tag: PointTag, point_format: str) -> str:
    """The answer of a pointing or counting task.

    Modes: `point` (the tag), `point_count` (point, then the number), `count_point` (the number first), `count`.
    """
    if tag.count == 0:
        return NONE_TEXT
    if mode == "count":
        return str(tag.count)
    text = render(tag, point_format)
    if mode == "point":
        return text
    if mode == "point_count":
        return f"Counting the {text} shows a total of {tag.count}."
    if mode == "count_point":
        return f"There are {tag.count} {text}."
    raise AssertionError(f"unknown counting mode {mode!r}; known: point, point_count, count_point, count")


_TAG = re.compile(
    r'<(?P<kind>points|tracks)(?: alt="(?P<alt>[^"]*)")? coords="(?P<coords>[^"]*)">(?P<label>.*?)</(?P=kind)>',
    re.DOTALL,
)
_GROUP = re.compile(r"(?:^|[\t:,;])\s*(\d+(?:\.\d+)?)((?:\s+\d+\s+\d{3,4}\s+\d{3,4})+)\s*(?=$|[\t:,;])")
_POINT = re.compile(r"(\d+)\s+(\d{3,4})\s+(\d{3,4})")


def parse(text: str) -> list[PointTag]:
    """Every well-formed tag in a text, in order. Malformed groups and points outside the image are left out."""
    tags = []
    for match in _TAG.finditer(text):
        groups = []
        for group in _GROUP.finditer(match["coords"]):
            points = [tuple(int(v) for v in point.groups()) for point in _POINT.finditer(group[2])]
            inside = tuple((number, x, y) for number, x, y in points if x <= 1000 and y <= 1000)
            if inside:
                groups.append(PointGroup(group[1], inside))
        tags.append(PointTag(tuple(groups), match["label"], match["alt"], match["kind"]))
    return tags


# --- tracks ---------------------------------------------------------------------------------------------------------


def _visible(frame: TrackFrame) -> dict[str, Sequence[float]]:
    return {key: entry.point for key, entry in frame.points.items() if not entry.occluded}


def seen_track_frames(frames: Iterable[TrackFrame], frame_times: np.ndarray) -> list[TrackFrame]:
    """Annotated frames that the model sees, in the order given."""
    times = np.asarray(frame_times)
    return [frame for frame in frames if bool(np.any(np.abs(times - frame.time) <= SAME_TIME))]


def nearest_track_frames(frames: Sequence[TrackFrame], marks: np.ndarray, reach: float) -> list[TrackFrame]:
    """For each mark the annotated frames at the time nearest to it, as being at the mark.

    Args:
        marks: ascending times, seconds [n].
        reach: seconds from a mark to the frame taken for it, at most. No frame is taken for two marks.
    """
    return _at(frames, _taken(frames, np.asarray(marks, dtype=np.float64), reach))


def _at(frames: Sequence[TrackFrame], taken: Mapping[float, float]) -> list[TrackFrame]:
    return [TrackFrame(taken[frame.time], frame.points) for frame in frames if frame.time in taken]


def _taken(frames: Sequence[TrackFrame], marks: np.ndarray, reach: float) -> dict[float, float]:
    """Tracked time -> the mark that it is taken for; see `nearest_track_frames`."""
    if not frames or not len(marks):
        return {}
    times = np.unique([frame.time for frame in frames])
    place = np.searchsorted((marks[1:] + marks[:-1]) / 2, times)
    away = np.abs(times - marks[place])
    taken: dict[float, float] = {}
    last = -1
    for i in np.lexsort((times, away, place)).tolist():
        if place[i] != last and _reaches(away[i], reach):
            taken[float(times[i])] = float(marks[place[i]])
        last = place[i]
    return taken


def _reaches(away: float, reach: float) -> bool:
    return away <= max(reach, SAME_TIME) + 1e-9


def shown_track_frames(track: Tracks, frame_times: np.ndarray) -> list[TrackFrame]:
    """The frames of a track that the model sees at `frame_times`, seconds [n]."""
    if track.snap > 0:
        marks = np.asarray(frame_times, dtype=np.float64)
        taken = _taken(track.frames, marks, track.snap)
        return _at(track.frames, taken | _before_the_end(track, marks, taken))
    return seen_track_frames(track.frames, frame_times)


def _before_the_end(track: Tracks, marks: np.ndarray, taken: Mapping[float, float]) -> dict[float, float]:
    """What is taken for the last multiple of 1 / fps seconds that is shown, {tracked time: that mark}, if nothing else
    is: of the times nearest to the end of the film, which is shown but in no answer at a rate, the first."""
    task, fps = track.style.track, track.fps
    if task is None or not task.on_grid or len(marks) < 2:
        return {}
    last = float(marks[-2])
    if _between(last, fps) or not _between(float(marks[-1]), fps) or last in taken.values():
        return {}
    later = [frame.time for frame in track.frames if frame.time > (last + marks[-1]) / 2]
    if not later or not _reaches(min(later) - last, track.snap) or not _all_shown(marks, last, fps):
        return {}
    return {min(later): last}


def _between(time: float, fps: float) -> bool:
    """Whether a time is none of the multiples of 1 / fps seconds."""
    return abs(time * fps - round(time * fps)) / fps > SAME_TIME


def _all_shown(marks: np.ndarray, last: float, fps: float) -> bool:
    """Whether all multiples of 1 / fps seconds up to `last` are among the marks."""
    count = round(last * fps) + 1
    wanted = np.arange(count) / fps
    return count <= len(marks) and bool((np.abs(wanted[:, None] - marks[None]).min(1) <= SAME_TIME).all())


def unanswered_frames(track: Tracks, seen: Sequence[TrackFrame]) -> list[TrackFrame]:
    """Those of `wanted_frames` that are not among the frames seen."""
    fps = track.fps
    answered = {round(frame.time * fps) for frame in on_grid(seen, fps)}
    return [frame for frame in wanted_frames(track, track.snap) if round(frame.time * fps) not in answered]


def wanted_frames(track: Tracks, reach: float) -> list[TrackFrame]:
    """The frames at multiples of 1 / fps seconds inside a track, or nearest to these and at most `reach` seconds away,
    as being there: what an answer at this rate asks for."""
    if not track.frames:
        return []
    times, fps = np.array([frame.time for frame in track.frames]), track.fps
    marks = np.unique(np.round(times * fps)) / fps
    inside = (marks >= times.min() - SAME_TIME) & (marks <= times.max() + SAME_TIME)
    return nearest_track_frames(track.frames, marks[inside], reach)


def marks_in_reach(track: Tracks, frame_times: np.ndarray) -> tuple[int, int]:
    """How many shown frames have a tracked position; and how many would have one, if `snap` were half the time from one
    tracked frame to the next.

    Args:
        frame_times: float64 [n], of the sampled frames, seconds.
    """
    times = np.unique([frame.time for frame in track.frames])
    reach = max(track.snap, float(np.median(np.diff(times))) / 2) if len(times) > 1 else track.snap
    now, wider = (
        len({f.time for f in nearest_track_frames(track.frames, frame_times, r)}) for r in (track.snap, reach)
    )
    return now, wider


def at_rate(track: Tracks, seen: Sequence[TrackFrame]) -> bool:
    """Whether a task's answer is at its rate: always, but where frames taken for the nearest shown ones are too few."""
    if track.snap <= 0 or not seen:
        return True
    first, last = min(frame.time for frame in seen), max(frame.time for frame in seen)
    return not any(first < frame.time < last for frame in unanswered_frames(track, seen))


def answer_frames(track: Tracks, seen: Sequence[TrackFrame]) -> list[TrackFrame]:
    """The frames of a track's answer among those that are shown (of a single object also those before its start)."""
    task = track.style.track
    to_grid = task is not None and task.on_grid and at_rate(track, seen)
    kept = on_grid(seen, track.fps) if to_grid else list(seen)
    return first_and_last(kept) if task is not None and task.ends_only else kept


def visible_points(frames: Iterable[TrackFrame]) -> int:
    return sum(len(_visible(frame)) for frame in frames)


def on_grid(frames: Iterable[TrackFrame], fps: float) -> list[TrackFrame]:
    """The frames at multiples of 1/fps seconds."""
    return [f for f in frames if not _between(f.time, fps)]


def first_and_last(frames: Sequence[TrackFrame]) -> list[TrackFrame]:
    """Only the first and last frame of every object. An object hidden there contributes no point, and frames of one
    time are one, as published."""
    found: dict[str, list[int]] = {}
    for i, frame in enumerate(frames):
        for key in frame.points:
            found.setdefault(key, []).append(i)
    merged: dict[float, dict[str, TrackPoint]] = {}
    for i, frame in enumerate(frames):
        points = {k: p for k, p in frame.points.items() if i in (found[k][0], found[k][-1])}
        if points:
            merged.setdefault(frame.time, {}).update(points)
    return [TrackFrame(time, points) for time, points in merged.items()]


def track_groups(frames: Iterable[TrackFrame], size: tuple[float, float]) -> tuple[PointGroup, ...]:
    """Groups in order of time. Objects keep their number: 1, 2, ... by first appearance, then by (x, y)."""
    numbers: dict[str, int] = {}
    groups = []
    for frame in sorted(frames, key=lambda f: f.time):
        scaled = {key: scale_point(point, size) for key, point in _visible(frame).items()}
        for key in sorted(scaled, key=lambda k: (scaled[k], k)):
            numbers.setdefault(key, len(numbers) + 1)
        points = sorted((numbers[key], x, y) for key, (x, y) in scaled.items())
        if points:
            groups.append(PointGroup(seconds_text(frame.time), tuple(points)))
    return tuple(groups)


def track_text(frames: Sequence[TrackFrame], size: tuple[float, float], label: str, point_format: str) -> str:
    """The answer of a tracking task. No frames: a sentence; all points hidden: the empty text."""
    if not frames:
        return NO_TRACKS_TEXT
    groups = track_groups(frames, size)
    return render(PointTag(groups, label, kind="tracks"), point_format) if groups else ""
