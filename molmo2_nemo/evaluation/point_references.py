"""References of the scorers on points, read from JSON, and when a point of an answer is at a point of the reference.

    {"points": [[x, y], ...], "size": [width, height], "masks": [mask, ...]}                 one image
    {"images": [the same of each image, ...]}                                                several images
    {"timestamps": [s, ...], "points": [[[x, y], ...], ...], "size": [w, h], "duration": s,
     "masks": [[[{"time": s, "mask": mask}, ...], ...], ...]}                                a video
    {"frames": [{"time": s, "points": {"id": [x, y], ...}}, ...], "size": [w, h], "fps": n,
     "masks": {"id": [mask or null, ...], ...}}                                              tracks

Coordinates are pixels of `size`, times seconds. Masks (see `masks`) may be left out: one for each point of an image;
for each point of a video, at each time at which it may be pointed at; for each tracked object, at each frame. Where
there are masks a point is right if its pixel is of the mask, as published. Without masks a rule of this repository
holds: it is right within `NEAR` of the longer side of the image from the reference's point (PCK of pose estimation,
arXiv 1312.4659), in a video also within `NEAR_TIME` seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from molmo2_nemo.data.json_values import is_number, show
from molmo2_nemo.data.points import seconds_text
from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.answer_points import Point, Size
from molmo2_nemo.evaluation.masks import Mask, covers_point, read_mask

NEAR = 0.05  # of the longer side of an image
NEAR_TIME = 0.5  # seconds

T = TypeVar("T")


@dataclass(frozen=True)
class ImagePoints:
    """The points of one image."""

    points: tuple[Point, ...]
    size: Size
    masks: tuple[Mask, ...] | None  # of each point

    def right(self, answered: Sequence[float], index: int) -> bool:
        """Whether a point of an answer is at point `index`."""
        if self.masks is not None:
            return covers_point(self.masks[index], answered[0], answered[1])
        return near(answered, self.points[index], self.size)


@dataclass(frozen=True)
class VideoPoints:
    """The points of a video, one after the other."""

    points: tuple[tuple[float, float, float], ...]  # seconds, x, y
    size: Size
    duration: float  # seconds
    masks: tuple[Mapping[str, Mask], ...] | None  # of each point, by time with one decimal

    def right(self, answered: tuple[float, float, float], index: int) -> bool:
        """Whether a point of an answer, (seconds, x, y), is at point `index`."""
        if self.masks is not None:
            mask = self.masks[index].get(seconds_text(answered[0]))
            return mask is not None and covers_point(mask, *answered[1:])
        time, *point = self.points[index]
        return abs(answered[0] - time) <= NEAR_TIME + 1e-9 and near(answered[1:], point, self.size)


@dataclass(frozen=True)
class TrackReference:
    """The positions of objects in some frames of a video."""

    frames: Mapping[float | str, Mapping[str, Point]]  # by `key` of the frame's time, in order of time
    size: Size
    fps: float | None
    masks: Mapping[tuple[float | str, str], Mask] | None  # by frame and object; where one is not, nothing is right

    def key(self, time: float) -> float | str:
        """Which frame a time is: the nearest multiple of 1 / fps seconds, else the time with one decimal."""
        return seconds_text(time) if self.fps is None else round(time * self.fps)

    def right(self, answered: Point, frame: float | str, name: str) -> bool:
        """Whether a point of an answer is at object `name` of a frame."""
        if self.masks is not None:
            mask = self.masks.get((frame, name))
            return mask is not None and covers_point(mask, *answered)
        return near(answered, self.frames[frame][name], self.size)


def near(a: Sequence[float], b: Sequence[float], size: Size) -> bool:
    """Whether two points are at most NEAR of the longer side apart."""
    return math.dist(a, b) <= NEAR * max(size) * (1 + 1e-9)


def read_image_points(value: Any) -> list[ImagePoints]:
    """The reference of each image.

    Raises:
        UserError: not a reference of points in images; says what is wrong.
    """
    if isinstance(value, Mapping) and "images" in value:
        return [_image(entry) for entry in _list(value["images"], "images")]
    return [_image(value)]


def read_video_points(value: Any) -> VideoPoints:
    """Raises UserError: not a reference of points in a video; says what is wrong."""
    fields = _fields(value, ("timestamps", "points", "size"), ("duration", "masks"))
    times = [_number(time, "timestamps") for time in _list(fields["timestamps"], "timestamps")]
    groups = [_points(group) for group in _list(fields["points"], "points")]
    if len(times) != len(groups):
        raise UserError(f"the reference has {len(times)} timestamps, but points of {len(groups)}")
    points = tuple((time, *point) for time, group in zip(times, groups, strict=True) for point in group)
    masks = None
    if fields.get("masks") is not None:
        entries = [entry for group in _list(fields["masks"], "masks") for entry in _list(group, "masks")]
        masks = tuple(_tublet(entry) for entry in _as_many(entries, points))
    longest = max([1.0, *times])
    duration = fields.get("duration")
    return VideoPoints(points, read_size(fields), longest if duration is None else _number(duration, "duration"), masks)


def read_tracks(value: Any) -> TrackReference:
    """Raises UserError: not a reference of tracks; says what is wrong."""
    fields = _fields(value, ("frames", "size"), ("fps", "masks"))
    fps = fields.get("fps")
    empty = TrackReference({}, read_size(fields), None if fps is None else _number(fps, "fps"), None)
    entries = [_fields(entry, ("time", "points"), ()) for entry in _list(fields["frames"], "frames")]
    times = [_number(entry["time"], "frames[].time") for entry in entries]
    frames: dict[float | str, dict[str, Point]] = {}
    for time, entry in sorted(zip(times, entries, strict=True), key=lambda pair: pair[0]):
        points = _mapping(entry["points"], "frames[].points")
        frames.setdefault(empty.key(time), {}).update({name: _point(point) for name, point in points.items()})
    masks: dict[tuple[float | str, str], Mask] | None = None
    if fields.get("masks") is not None:
        masks = {}
        for name, listed in _mapping(fields["masks"], "masks").items():
            for time, mask in zip(times, _as_many(_list(listed, f"masks[{name!r}]"), times), strict=True):
                if mask is not None:
                    masks[empty.key(time), name] = read_mask(mask)
    return TrackReference(frames, empty.size, empty.fps, masks)


def read_each(scorer: str, references: Sequence[Any], read: Callable[[Any], T]) -> Iterator[T]:
    """The references of an answer, read.

    Raises:
        UserError: one is wrong; names the scorer.
    """
    for reference in references:
        try:
            yield read(reference)
        except UserError as error:
            raise UserError(f"{scorer}: {error}") from None


def _image(value: Any) -> ImagePoints:
    fields = _fields(value, ("points", "size"), ("masks",))
    points = _points(fields["points"])
    masks = None
    if fields.get("masks") is not None:
        masks = tuple(read_mask(mask) for mask in _as_many(_list(fields["masks"], "masks"), points))
    return ImagePoints(points, read_size(fields), masks)


def _tublet(entry: Any) -> dict[str, Mask]:
    shown = [_fields(part, ("time", "mask"), ()) for part in _list(entry, "masks")]
    return {seconds_text(_number(part["time"], "masks[].time")): read_mask(part["mask"]) for part in shown}


def _fields(value: Any, needed: Sequence[str], others: Sequence[str]) -> Mapping[str, Any]:
    expected = ", ".join(needed) + (f" and perhaps {', '.join(others)}" if others else "")
    if not isinstance(value, Mapping) or not set(needed) <= set(value) or set(value) - {*needed, *others}:
        raise UserError(f"the reference has {show(value)}; expected an object with {expected}")
    return value


def read_size(fields: Mapping[str, Any]) -> Size:
    """The `size` of a reference. Raises UserError: it is not one."""
    size = fields["size"]
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(is_number(n) and n > 0 for n in size):
        raise UserError(f"the reference's size is {show(size)}; expected [width, height] in pixels")
    return float(size[0]), float(size[1])


def _points(value: Any) -> tuple[Point, ...]:
    return tuple(_point(point) for point in _list(value, "points"))


def _point(value: Any) -> Point:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(is_number(n) for n in value):
        raise UserError(f"the reference has a point {show(value)}; expected [x, y] in pixels")
    return float(value[0]), float(value[1])


def _number(value: Any, name: str) -> float:
    if not is_number(value) or value < 0 or (value == 0 and name in ("fps", "duration")):
        raise UserError(f"the reference's {name} has {show(value)}; expected a positive number")
    return float(value)


def _list(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise UserError(f"the reference's {name} is {show(value)}; expected a list")
    return value


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(
            f"the reference's {name} is {show(value)}; expected an object by the name of the tracked objects"
        )
    return value


def _as_many(masks: Sequence[Any], things: Sequence[Any]) -> Sequence[Any]:
    if len(masks) != len(things):
        raise UserError(
            f"the reference has {len(masks)} masks where {len(things)} are needed; null for the whole if none"
        )
    return masks
