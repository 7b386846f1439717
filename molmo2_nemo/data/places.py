"""Points and times of a record, held against what is shown of its media: one set of rules for all who prepare or check.

`molmo2 prepare` mends what it can in a user's own data, counts that, and writes what training reads. Stored records
(`molmo2 shards check`, `molmo2 shards index`) are read as they are: what would have to be rewritten is refused.
Published data sets are not asked; their converters follow their publishers.

In a user's own data every time counts from the start of the film. In a stored record the times of annotations and
subtitles count from the start of its clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from molmo2_nemo.data.annotation_json import read_tracks
from molmo2_nemo.data.annotations import POINT_KINDS, TRACK_FPS, Tracks
from molmo2_nemo.data.check import View
from molmo2_nemo.data.config import VideoConfig
from molmo2_nemo.data.json_values import Fault, FieldError, is_number, show
from molmo2_nemo.data.points import SAME_TIME, answer_frames, shown_track_frames, visible_points
from molmo2_nemo.data.styles import Kind, style_of
from molmo2_nemo.data.video.sampling import TimeSampler

OUTSIDE = 0.01  # of the scale: points at most this far outside the picture are moved to its edge
SNAP = 0.25  # seconds; a tracked time is at most this far from the sampled one that it means
SAME = 1e-6  # seconds
TINY = 2  # pixels; points of so small a picture may all lie between 0 and 1
CORNER = 0.05  # of width and height; of a picture whose points all lie in it the unit may be another
PAST = 1.0  # seconds; how far past the film's end a clip may end
CLAMPED = "points slightly outside the picture (up to 1 %), moved to its edge"
CORNERED = "points that all lie in the first twentieth of width and height: is the unit right (point_scale)?"
SORTED = "times that were not in order, sorted"
TWICE = "points that come twice in a picture or at a time: each counts, as published"
REPEATED = "times that come twice: each keeps its own group of points, as published"
TO_EDGE = "times up to one frame outside what is shown, moved to its edge"
CLIP_CUT = "clips that end up to 1 s after the film, cut to its end"
LINES_CUT = "subtitles that end after the film, cut to its end"
LINES_OUT = "subtitles outside the clip, left out"
LINES_BLANK = "subtitles without text, left out"


@dataclass
class Placing:
    """Checks the points and times of one record, and converts those of a user's own; `notes` says what was mended."""

    view: View  # what is shown, as the annotations mean it
    sampling: Mapping[str, Any] = field(default_factory=dict)  # the record's
    start: float = 0.0  # of what is shown, seconds of the film; times count from 0 of the film
    stored: bool = False  # a record in a shard: its times count from what is shown, and nothing can be rewritten
    write_size: bool = False  # the film is stored in another size: points in its pixels get its width and height
    video: VideoConfig = field(default_factory=VideoConfig)  # of training
    notes: set[str] = field(default_factory=set)
    _reach: float = 0.0  # of the points of one annotation: the largest share of width or height

    @property
    def end(self) -> float:
        return self.start + self.view.duration

    def record(self, data: dict[str, Any]) -> dict[str, Any]:
        """The record's JSON with its annotations placed. The record has been parsed before, so its types are right.

        Raises:
            FieldError: a point or a time that cannot be meant.
        """
        placed = dict(data)
        if "variants" in data:
            placed["variants"] = [self._tree(tree, f"variants[{n}]") for n, tree in enumerate(data["variants"])]
        else:
            placed["annotations"] = self._tree(data["annotations"], "annotations")
        subtitles = data.get("subtitles")
        if self.stored and isinstance(subtitles, list):
            for i, line in enumerate(subtitles):
                self._time(line["start"], f"subtitles[{i}].start")
        return placed

    def _tree(self, tree: Sequence[dict[str, Any]], path: str) -> list[dict[str, Any]]:
        return [_inside(f"{path}[{i}]", self._forms, fields) for i, fields in enumerate(tree)]

    def _forms(self, fields: dict[str, Any]) -> dict[str, Any]:
        """An annotation or a turn with all of its alternatives placed, each with the fields that it shares."""
        if "either" not in fields:
            return self._form(fields)
        base = {name: value for name, value in fields.items() if name != "either"}
        made = []
        for i, form in enumerate(fields["either"]):
            try:
                made.append(self._form({**base, **form}))
            except FieldError as error:
                own = error.fault.field.partition(".")[0].partition("[")[0] in form
                raise error.inside(f"either[{i}]") if own else error from None
        return _shared(base, fields["either"], made)

    def _form(self, fields: dict[str, Any]) -> dict[str, Any]:
        if "messages" in fields:
            return fields
        if "turns" not in fields:
            return self._placed(fields)
        style, turns = fields["style"], []
        for i, turn in enumerate(fields["turns"]):
            made = _inside(f"turns[{i}]", self._forms, {"style": style, **turn})
            turns.append({name: value for name, value in made.items() if name != "style" or name in turn})
        return {**fields, "turns": turns}

    def _placed(self, fields: dict[str, Any]) -> dict[str, Any]:
        """One turn without alternatives."""
        kind, made = style_of(fields["style"]).kind, dict(fields)
        self._reach = 0.0
        if kind is Kind.TRACKS or (kind in POINT_KINDS and "points" in fields):
            self._unit(made, kind)
            _no_shares(fields, kind)
        if kind is Kind.TRACKS:
            self._track(made)
        elif kind is Kind.VIDEO_POINTS and "points" in fields:
            self._video_points(made)
        elif kind is Kind.MULTI_IMAGE_POINTS and "points" in fields:
            for i, group in enumerate(fields["points"]):
                self._points(group, f"points[{i}]", fields, self._image(i))
        elif kind is Kind.POINTS and "points" in fields:
            self._points(fields["points"], "points", fields, self._image(0))
        else:
            self._inline_points(fields)
            if kind is Kind.TIMED_CAPTION:
                self._caption(made)
        self.notes.update({CORNERED} if 0 < self._reach < CORNER else ())
        return made

    # --- points -----------------------------------------------------------------------------------------------------

    def _image(self, number: int) -> tuple[int, int] | None:
        sizes = self.view.image_sizes
        return sizes[number] if number < len(sizes) else None

    def _unit(self, made: dict[str, Any], kind: Kind) -> None:
        for name in ("point_scale", "width", "height"):
            if name in made and not (is_number(made[name]) and made[name] > 0):
                raise FieldError.wrong(name, "a number above 0", made[name])
        for name, other in (("width", "height"), ("height", "width")):
            if name in made and other not in made and "point_scale" not in made:
                raise FieldError.missing(other, f"it belongs to {name}")
        size = self.view.video_size if kind in (Kind.TRACKS, Kind.VIDEO_POINTS) else None
        if size is not None and self.write_size and not {"point_scale", "width"} & set(made):
            made["width"], made["height"] = size

    def _points(
        self, points: Sequence[Sequence[float]], path: str, fields: Mapping[str, Any], size: tuple[int, int] | None
    ) -> None:
        self._twice(points)
        for i, point in enumerate(points):
            self._point(point, f"{path}[{i}]", fields, size)

    def _twice(self, points: Sequence[Sequence[float]]) -> None:
        self.notes.update({TWICE} if len(set(map(tuple, points))) < len(points) else ())

    def _point(
        self, point: Sequence[float], path: str, fields: Mapping[str, Any], size: tuple[int, int] | None
    ) -> None:
        percent = fields.get("point_scale")
        unit = (percent, percent) if percent else (fields.get("width"), fields.get("height"))
        if not all(unit):
            unit = size or (None, None)
        shares = [value / side for value, side in zip(point, unit, strict=True) if side]
        self._reach = max([self._reach, *shares])
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

    def _inline_points(self, fields: Mapping[str, Any]) -> None:
        """Points in the text of an answer, which are always in percent."""
        if "answer" not in fields or fields.get("answers") or "options" in fields or "answer_idx" in fields:
            return  # not read
        for i, entry in enumerate(fields.get("answer_annotations", ())):
            self._twice(entry["points"])
            for j, point in enumerate(entry["points"]):
                if not all(-100 * OUTSIDE <= value <= 100 * (1 + OUTSIDE) for value in point):
                    expected = "[x, y] in percent of the picture, 0 to 100"
                    where, seen = f"answer_annotations[{i}].points[{j}]", show(list(point))
                    raise FieldError(Fault(where, seen, expected), f"is {seen}, not {expected}")
                if not all(0 <= value <= 100 for value in point):
                    self.notes.add(CLAMPED)

    # --- times ------------------------------------------------------------------------------------------------------

    def _time(self, time: float, path: str) -> float:
        """Seconds from the start of what is shown."""
        fps, end = self.view.fps, self.end
        frame = 1 / fps if fps > 0 else SAME
        if self.start - SAME <= time <= end + SAME:
            return round(min(max(time - self.start, 0.0), self.view.duration), 6)
        if self.start - frame <= time <= end + frame:
            self.notes.add(TO_EDGE)
            return round(min(max(time - self.start, 0.0), self.view.duration), 6)
        what = "from the start of what is shown" if self.stored else "of the film that are shown"
        expected = f"seconds {what}, {self.start:g} to {end:g}"
        hint = "; times count from the start of the film, not of the clip" if self.start and time < end else ""
        if time > end + 1 and float(time).is_integer() and fps > 0 and time / fps <= end + frame:
            hint = f"; if it is the number of a frame, it is {time / fps:g} s at {fps:g} frames per second"
        hint = in_lost_part(time, end, self.view.lost) or hint
        raise FieldError(Fault(path, show(time), expected), f"is {time:g}, not {expected}{hint}")

    def _caption(self, made: dict[str, Any]) -> None:
        named = style_of(made["style"]).time_fields
        if not all(is_number(made.get(name)) for name in named):
            return  # a question with options, whose times are not read
        written = dict(made)
        for name in named:
            made[name] = self._time(made[name], name)
        if "start" in named and "end" in named and not made["start"] < made["end"]:
            raise FieldError.wrong("end", "after start", written["end"])

    def _ordered(self, times: Sequence[float], name: str) -> list[int]:
        """The places of `times` in order of time; equal ones stay in their order."""
        order = sorted(range(len(times)), key=lambda i: times[i])
        if order != list(range(len(times))):
            if self.stored and name == "timestamps":
                raise FieldError.wrong(name, "in ascending order", list(times))
            self.notes.add(SORTED)
        if len(set(times)) < len(times):
            self.notes.add(REPEATED)
        return order

    def _video_points(self, made: dict[str, Any]) -> None:
        groups = made["points"]
        for i, group in enumerate(groups):
            self._points(group, f"points[{i}]", made, self.view.video_size)
        times = [self._time(t, f"timestamps[{i}]") for i, t in enumerate(made["timestamps"])]
        order = self._ordered(times, "timestamps")
        made["timestamps"], made["points"] = [times[i] for i in order], [groups[i] for i in order]

    # --- tracks -----------------------------------------------------------------------------------------------------

    def _track(self, made: dict[str, Any]) -> None:
        if made.get("points"):
            times = [self._time(f["time"], f"points[{i}].time") for i, f in enumerate(made["points"])]
            placed: set[tuple[float, str]] = set()
            for i, frame in enumerate(made["points"]):
                self._tracked(frame["points"], f"points[{i}].points", made, times[i], placed)
            made["points"] = [{**made["points"][i], "time": times[i]} for i in self._ordered(times, "points")]
        if not self.stored:
            made.setdefault("snap", SNAP)
        sampler = TimeSampler.of(self.video, self.sampling, self.view.fps)
        shown = sampler(self.view.duration)
        task = style_of(made["style"]).track
        assert task is not None
        if task.on_grid and len(shown) > 2:
            rate = 1 / float(shown[1] - shown[0])
            if sampler.mode == "fps" or abs(rate - sampler.max_fps) < SAME:  # not spread over a long film
                self._rate(made, rate)
        track = read_tracks(made)
        seen = shown_track_frames(track, shown)
        if track.frames and not visible_points(answer_frames(track, seen) if task.on_grid else seen):
            self._nothing_shown(track, len(shown) == sampler.max_frames)

    def _nothing_shown(self, track: Tracks, full: bool) -> None:
        """`full`: as many frames are shown as training allows."""
        expected = f"a visible point within {max(track.snap, SAME_TIME):g} s of a frame that is shown"
        if track.style.track is not None and track.style.track.on_grid:
            expected += f" and at a multiple of 1/{track.fps} s"
        hint = '; "snap" sets how far' if self.stored else ""
        if full:
            hint = '; sampling {"mode": "fps", "sampling_fps": 1} shows one frame per second, from the start'
        fault = Fault("points", f"times {show([frame.time for frame in track.frames])}", expected)
        raise FieldError(fault, f"hold nothing to track: there must be {expected}{hint}")

    def _tracked(
        self,
        points: Mapping[str, Any],
        path: str,
        fields: Mapping[str, Any],
        time: float,
        placed: set[tuple[float, str]],
    ) -> None:
        for name, entry in points.items():
            if (time, name) in placed:
                expected = "one position for each object at a time"
                fault = Fault(f"{path}.{name}", f"another one at {time + self.start:g} s", expected)
                raise FieldError(fault, f"is another position of the object at {time + self.start:g} s")
            placed.add((time, name))
            if not entry.get("occluded"):
                self._point(entry["point"], f"{path}.{name}.point", fields, self.view.video_size)

    def _rate(self, made: dict[str, Any], rate: float) -> None:
        """The frames per second that the prompt names must divide those that are shown."""
        given = made.get("sampling_fps")
        if given is not None and given != int(given):
            raise FieldError.wrong("sampling_fps", "a whole number of frames per second", given)
        fitting = [fps for fps in range(1, int(rate + SAME) + 1) if abs(rate / fps - round(rate / fps)) < SAME]
        fps = int(given or TRACK_FPS)
        if fps in fitting:
            return
        if given is None and fitting and not self.stored:
            made["sampling_fps"] = max(fps for fps in fitting if fps <= TRACK_FPS)
            return
        expected = f"a divisor of the {rate:g} frames per second that are shown (sampling.max_fps, or mode fps)"
        raise FieldError(Fault("sampling_fps", show(fps), expected), f"is {fps}, not {expected}")


def _no_shares(fields: Mapping[str, Any], kind: Kind) -> None:
    """Points that all lie in the corner pixel are shares of the width and height; on its corners they may be either."""
    size = (fields["width"], fields["height"]) if {"width", "height"} <= set(fields) else (math.inf, math.inf)
    values = list(_coordinates(fields.get("points", ()), kind))
    if "point_scale" in fields or min(size) <= TINY or not values or not all(0 <= value <= 1 for value in values):
        return
    if any(value != int(value) for value in values):
        raise FieldError.wrong("points", "pixels, or shares of width and height with point_scale: 1", fields["points"])
    if "width" not in fields:
        expected = "pixels with width and height, or shares with point_scale: 1 (0 and 1 may be either)"
        raise FieldError.wrong("points", expected, fields["points"])


def _coordinates(points: Iterable[Any], kind: Kind) -> Iterator[float]:
    """Every x and y of an annotation's `points`, but for those that are not visible."""
    if kind is Kind.POINTS:
        yield from chain.from_iterable(points)
    elif kind is Kind.TRACKS:
        for frame in points:
            for entry in frame["points"].values():
                yield from () if entry.get("occluded") else entry["point"]
    else:
        yield from chain.from_iterable(chain.from_iterable(points))


def early_times(data: Mapping[str, Any], fps: float, notes: set[str]) -> dict[str, Any]:
    """A record's JSON whose `timestamps` begin at 0: those up to one frame before it are moved there.

    Args:
        data: not parsed yet, as the parser takes no timestamp below 0.
        fps: frames per second of the film.
    """
    frame = 1 / fps if fps > 0 else SAME

    def moved(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {name: moved(entry, name) for name, entry in value.items()}
        if not isinstance(value, list):
            return value
        if name in ("annotations", "variants", "either", "turns", ""):
            return [moved(entry) for entry in value]
        early = [is_number(time) and -frame <= time < 0 for time in value] if name == "timestamps" else []
        notes.update({TO_EDGE} if any(early) else ())
        return [0.0 if is_early else time for is_early, time in zip(early, value, strict=True)] if early else value

    return dict(data) | {name: moved(data[name], name) for name in ("annotations", "variants") if name in data}


def _inside(path: str, place: Callable[[dict[str, Any]], dict[str, Any]], fields: dict[str, Any]) -> dict[str, Any]:
    try:
        return place(fields)
    except FieldError as error:
        raise error.inside(path) from None


def _shared(base: dict[str, Any], forms: Sequence[dict[str, Any]], made: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """An annotation with `either` again from its placed alternatives: what all share stays with the base."""
    whole = dict(base)
    for name in base:
        placed = [form[name] for form, own in zip(made, forms, strict=True) if name not in own]
        if placed and all(value == placed[0] for value in placed):
            whole[name] = placed[0]
    either = [
        {name: value for name, value in form.items() if name in own or name not in whole or value != whole[name]}
        for form, own in zip(made, forms, strict=True)
    ]
    return {**whole, "either": either}


# --- clips and subtitles of a user's own film -------------------------------------------------------------------------


def in_lost_part(time: float, end: float, lost: float) -> str:
    """A hint where a time lies after the `end` of a film whose header states `lost` seconds more; else nothing."""
    if not end < time <= end + lost + PAST or not lost:
        return ""
    return f"; the film's header states {end + lost:.3f} s: it is cut off, download it again"


def place_clip(
    clip: Sequence[float], duration: float, notes: set[str] | None = None, *, lost: float = 0.0
) -> tuple[float, float]:
    """A clip, in seconds of a film of `duration` seconds, with its end moved to the film's where it is just past it.

    Args:
        lost: further seconds that the film's header states.
    Raises:
        FieldError: the clip does not lie in the film.
    """
    start, end = float(clip[0]), float(clip[1])
    if not (0 <= start < end and start < duration and end <= duration + PAST):
        expected = f"[start, end] in seconds, inside the film of {duration:.3f} s"
        says = f"must be {expected}, not {show([start, end])}{in_lost_part(end, duration, lost)}"
        raise FieldError(Fault("clip", show([start, end]), expected), says)
    if end > duration and notes is not None:
        notes.add(CLIP_CUT)
    return start, min(end, duration)


def place_subtitles(
    lines: Sequence[tuple[float, float, str]], film: View, clip: tuple[float, float] | None, notes: set[str]
) -> list[tuple[float, float, str]]:
    """Subtitle lines (start, end, text) in seconds of a film, none of them past its end.

    Args:
        film: the whole film.
    Raises:
        FieldError: a line that does not lie in the film.
    """
    made = []
    frame = 1 / film.fps if film.fps > 0 else SAME
    for i, (start, end, text) in enumerate(lines):
        if not 0 <= start <= end:
            raise FieldError.wrong(f"subtitles[{i}]", "0 <= start <= end, in seconds", [start, end])
        if start > film.duration + frame:
            expected = f"seconds of the film, 0 to {film.duration:g}"
            hint = "; milliseconds are divided by 1000" if start / 1000 <= film.duration else ""
            hint = in_lost_part(start, film.duration, film.lost) or hint
            fault = Fault(f"subtitles[{i}].start", show(start), expected)
            raise FieldError(fault, f"is {start:g}, not {expected}{hint}")
        if end > film.duration:
            notes.add(LINES_CUT)
        made.append((min(start, film.duration), min(end, film.duration), text))
        if not text.strip():
            notes.add(LINES_BLANK)
        elif clip is not None and not (start < clip[1] and (end > clip[0] or start >= clip[0])):
            notes.add(LINES_OUT)
    if [line[:2] for line in made] != sorted(line[:2] for line in made):
        notes.add(SORTED)
    return made


def check_places(
    data: Mapping[str, Any],
    view: View,
    clip: tuple[float, float] | None,
    film: float,
    video: VideoConfig | None = None,
    *,
    lost: float = 0.0,
) -> None:
    """Check the points and times of a stored record that a user made.

    Args:
        data: its JSON, which `parse_record` has accepted, without nulls.
        clip: seconds of the film, as stored; `film`: seconds of the whole film.
        lost: further seconds that the film's header states.
        video: settings of training.
    Raises:
        FieldError: a point or a time that cannot be meant.
    """
    if clip is not None:
        place_clip(clip, film, lost=lost)
    Placing(view, data.get("sampling", {}), stored=True, video=video or VideoConfig()).record(dict(data))
