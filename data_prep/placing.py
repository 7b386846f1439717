"""Points and times of a user's own record: checked against its media, and written as training reads them.

In a user's own data every time counts from the start of the film. A stored record counts the times of annotations from
the start of its clip, so they are converted here. Published data sets do this in their own converters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from molmo2_nemo.data.annotations import POINT_KINDS
from molmo2_nemo.data.config import VideoConfig
from molmo2_nemo.data.json_values import Fault, FieldError, is_number, show
from molmo2_nemo.data.styles import Kind, style_of

OUTSIDE = 0.01  # of the scale: points at most this far outside the picture are moved to its edge
SNAP = 0.25  # seconds; a tracked time is at most this far, and half the distance, from the sampled one that it means
SAME = 1e-6  # seconds
CLAMPED = "points slightly outside the picture (up to 1 %), moved to its edge"
SORTED = "times that were not in order, sorted"
MERGED = "times that came twice, their points merged"
TO_EDGE = "times up to one frame outside what is shown, moved to its edge"
SNAPPED = "tracked times moved to the sampled frame that they mean (docs/data.md, Times)"
BETWEEN = "tracked frames between the sampled ones, which training does not show"


@dataclass
class Placing:
    """Checks and converts the annotations of one record; `notes` says what was mended."""

    image_sizes: Sequence[tuple[int, int]] = ()  # pixels, width and height
    video_size: tuple[int, int] | None = None
    start: float = 0.0  # of what is shown, seconds of the film
    end: float = 0.0
    fps: float = 0.0  # of the film
    max_fps: float = VideoConfig.max_fps  # of sampling
    notes: set[str] = field(default_factory=set)

    def record(self, data: dict[str, Any]) -> dict[str, Any]:
        """The record's JSON with its annotations placed. The record has been parsed before, so its types are right.

        Raises:
            FieldError: a point or a time that cannot be meant.
        """
        placed = dict(data)
        for name in ("annotations", "variants"):
            if name in data:
                placed[name] = [
                    self._entry(entry, f"{name}[{i}]", {})
                    if name == "annotations"
                    else [self._entry(one, f"{name}[{i}][{j}]", {}) for j, one in enumerate(entry)]
                    for i, entry in enumerate(data[name])
                ]
        return placed

    def _entry(self, fields: dict[str, Any], path: str, base: dict[str, Any]) -> dict[str, Any]:
        whole = {**base, **fields}
        made = dict(fields)
        for name in ("either", "turns"):
            if name in fields:
                above = {k: v for k, v in whole.items() if k != name}
                above = above if name == "either" else {"style": whole["style"]}
                made[name] = [self._entry(e, f"{path}.{name}[{i}]", above) for i, e in enumerate(fields[name])]
        try:
            self._place(made, whole)
        except FieldError as error:
            raise error.inside(path) from None
        return made

    def _place(self, made: dict[str, Any], whole: dict[str, Any]) -> None:
        kind = style_of(whole["style"]).kind
        if kind is Kind.TIMED_CAPTION:
            self._caption(made, whole)
        if kind is not Kind.TRACKS and kind not in POINT_KINDS:
            return
        for name in ("point_scale", "width", "height"):
            if name in made and not (is_number(made[name]) and made[name] > 0):
                raise FieldError.wrong(name, "a number above 0", made[name])
        if kind is Kind.TRACKS:
            if "points" in made:
                made["points"] = self._track(made["points"], whole)
        elif kind is Kind.VIDEO_POINTS:
            self._video_points(made, whole)
        elif "points" in made:
            several = kind is Kind.MULTI_IMAGE_POINTS
            for i, group in enumerate(made["points"] if several else [made["points"]]):
                size = self.image_sizes[i] if i < len(self.image_sizes) else None
                for j, point in enumerate(group):
                    self._inside(point, f"points[{i}][{j}]" if several else f"points[{j}]", whole, size)

    # --- points -----------------------------------------------------------------------------------------------------

    def _inside(self, point: Sequence[float], path: str, fields: dict[str, Any], size: tuple[int, int] | None) -> None:
        percent = fields.get("point_scale")
        unit = (percent, percent) if percent else (fields.get("width"), fields.get("height"))
        if not all(unit):
            unit = size or (None, None)
        shares = [value / side for value, side in zip(point, unit, strict=True) if side]
        if all(-OUTSIDE <= share <= 1 + OUTSIDE for share in shares):
            if any(not 0 <= share <= 1 for share in shares):
                self.notes.add(CLAMPED)
            return
        expected = f"[x, y] inside the picture, 0 to {unit[0]:g} and 0 to {unit[1]:g}"
        hint = ""
        if percent and size and 0 <= min(point) and point[0] <= size[0] and point[1] <= size[1]:
            hint = f"; pixels of the {size[0]} x {size[1]} picture are written without point_scale"
        if percent == 100 and 0 <= min(point) and max(point) <= 1000:
            hint += "; thousandths (0 to 1000) are written with point_scale 1000"
        raise FieldError(Fault(path, show(list(point)), expected), f"is {show(list(point))}, not {expected}{hint}")

    # --- times ------------------------------------------------------------------------------------------------------

    def _time(self, time: float, path: str) -> float:
        """Seconds from the start of what is shown."""
        frame = 1 / self.fps if self.fps > 0 else SAME
        if self.start - SAME <= time <= self.end + SAME:
            return round(min(max(time - self.start, 0.0), self.end - self.start), 6)
        if self.start - frame <= time <= self.end + frame:
            self.notes.add(TO_EDGE)
            return round(min(max(time, self.start), self.end) - self.start, 6)
        expected = f"seconds of the film that are shown, {self.start:g} to {self.end:g}"
        hint = "; times count from the start of the film, not of the clip" if self.start and time < self.end else ""
        if time > self.end + 1 and float(time).is_integer() and self.fps > 0 and time / self.fps <= self.end + frame:
            hint = f"; if it is the number of a frame, it is {time / self.fps:g} s at {self.fps:g} frames per second"
        raise FieldError(Fault(path, show(time), expected), f"is {time:g}, not {expected}{hint}")

    def _caption(self, made: dict[str, Any], whole: dict[str, Any]) -> None:
        for name in style_of(whole["style"]).time_fields:
            if name in made:
                made[name] = self._time(made[name], name)
        if "start" in made and "end" in made and not made["start"] < made["end"]:
            raise FieldError.wrong("end", "after start", whole["end"])

    def _video_points(self, made: dict[str, Any], whole: dict[str, Any]) -> None:
        for i, group in enumerate(made.get("points", ())):
            for j, point in enumerate(group):
                self._inside(point, f"points[{i}][{j}]", whole, self.video_size)
        if "timestamps" not in made:
            return
        made["timestamps"] = [self._time(t, f"timestamps[{i}]") for i, t in enumerate(made["timestamps"])]
        times = made["timestamps"]
        if all(a < b for a, b in zip(times, times[1:], strict=False)):
            return
        if "points" not in made:  # several forms share the times
            raise FieldError.wrong("timestamps", "in ascending order where several forms share them", times)
        self.notes.add(SORTED if sorted(times) != times else MERGED)
        merged: dict[float, list[Any]] = {}
        for time, group in sorted(zip(times, made["points"], strict=True), key=lambda pair: pair[0]):
            if time in merged:
                self.notes.add(MERGED)
            merged.setdefault(time, []).extend(group)
        made["timestamps"], made["points"] = list(merged), list(merged.values())

    # --- tracks -----------------------------------------------------------------------------------------------------

    def _track(self, frames: list[dict[str, Any]], fields: dict[str, Any]) -> list[dict[str, Any]]:
        found: dict[float, dict[str, Any]] = {}
        times = []
        for i, frame in enumerate(frames):
            time = self._time(frame["time"], f"points[{i}].time")
            for name, entry in frame["points"].items():
                if not entry.get("occluded"):
                    self._inside(entry["point"], f"points[{i}].points.{name}.point", fields, self.video_size)
            times.append(time)
            if time in found:
                self.notes.add(MERGED)
            found[time] = {**found.get(time, {}), **frame["points"]}
        if times != sorted(times):
            self.notes.add(SORTED)
        found = self._snapped(dict(sorted(found.items())))
        visible = [t for t, points in found.items() if any(not p.get("occluded") for p in points.values())]
        if frames and not any(self._sampled(t) for t in visible):
            expected = f"a visible point within {self._reach():g} s of a sampled frame (every {1 / self.max_fps:g} s)"
            raise FieldError(
                Fault("points", f"times {show(times)}", expected), f"hold nothing to track: not {expected}"
            )
        return [{"time": time, "points": points} for time, points in found.items()]

    def _reach(self) -> float:
        return min(SNAP, 0.5 / self.max_fps)

    def _sampled(self, time: float) -> bool:
        on_grid = abs(time - round(time * self.max_fps) / self.max_fps) <= 0.01
        return on_grid or abs(time - (self.end - self.start)) <= 0.01

    def _snapped(self, found: dict[float, dict[str, Any]]) -> dict[float, dict[str, Any]]:
        """The nearest frame of each sampled time that has none of its own is moved there; others stay as they are."""
        taken = {round(t * self.max_fps) for t in found if abs(t - round(t * self.max_fps) / self.max_fps) <= 0.01}
        nearest: dict[int, float] = {}
        for time in found:
            number = round(time * self.max_fps)
            away = abs(time - number / self.max_fps)
            if number in taken or away > self._reach() + SAME or self._sampled(time):
                continue
            if number not in nearest or away < abs(nearest[number] - number / self.max_fps):
                nearest[number] = time
        moved = {time: round(number / self.max_fps, 6) for number, time in nearest.items()}
        moved = {time: to for time, to in moved.items() if to <= self.end - self.start}
        if moved:
            self.notes.add(SNAPPED)
        if any(time not in moved and not self._sampled(time) for time in found):
            self.notes.add(BETWEEN)
        return dict(sorted((moved.get(time, time), points) for time, points in found.items()))
