"""Points and tracks of an answer, read back in the forms that Molmo models write them in.

    <points coords="1 1 031 625 2 156 104">red cars</points>     image 1, object 1 at (0.031, 0.625), object 2 ...
    <tracks coords="0.0 1 156 208;0.5 1 172 208">people</tracks>  seconds, object, x, y

`data/points.py` writes these. Of older models, where an answer has no such point: `<point x="3.1" y="62.5">`, `<points
x1=... y1=...>`, `1 031 625`, `1 3.1 62.5`, `(3.1, 62.5)`, `Click(3.1, 62.5)`, `p = 031, 625` for images, `<points 0.5
1 3.1 62.5 2 15.6 10.4/>` for times of a video, and for tracks lines `time 0.50` each with a line `{0: [3.1, 62.5], 1:
[15.6, 10.4]}`. What is none of these or lies outside of the image is no point. Of a tag that is cut off, the whole
points of an image are read as that older form; times and tracks in it are not. Nothing here raises: an answer is
whatever a model wrote.

    >>> image_points('<points coords="1 1 031 625 2 156 104">red cars</points>', (1000, 100))
    [(31.0, 62.5), (156.0, 10.4)]
    >>> video_points('<points coords="0.5 1 500 500;12.0 2 250 1000">a cup</points>', (200, 100))
    [(0.5, 100.0, 50.0), (12.0, 50.0, 100.0)]
    >>> tracks('<tracks coords="0.0 1 156 208;0.5 1 172 208 2 500 500">people</tracks>', (100, 100))[1]
    (0.5, {'1': (17.2, 20.8), '2': (50.0, 50.0)})
    >>> image_points('<points coords="1 1 031 625 2 156', (1000, 100))
    [(31.0, 62.5)]
    >>> video_points('<points coords="0.5 1 031 625 2 156', (1000, 100))
    []
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

LARGEST = 1e9  # no time is longer, and no image wider

Size = tuple[float, float]  # width, height in pixels
Point = tuple[float, float]  # x, y in pixels

_COORDS = re.compile(r'<(?:points|tracks)[^\n]*? coords="([0-9\t:;, .]+)"/?>')
_GROUP = re.compile(r"(?:^|[\t:,;])([0-9.]+) ([0-9. ]+)")  # image or seconds, then its points
_POINT = re.compile(r"([0-9]{1,9}) ([0-9]{3,4}) ([0-9]{3,4})")  # object, thousandths of the width and height

_PERCENT = r"([0-9]{1,9}\.[0-9])"
# Older forms of points in an image, (pattern, its numbers' full scale); the first row found in an answer counts.
_OLDER = (
    ((rf"Click\({_PERCENT}, ?{_PERCENT}\)", 100.0),),
    ((r"[0-9]{1,9} ([0-9]{3}) ([0-9]{3})", 1000.0),),
    ((rf"[0-9]{{1,9}} {_PERCENT} {_PERCENT}", 100.0),),
    (
        (rf"\({_PERCENT},? ?{_PERCENT}\)", 100.0),
        (r'x[0-9]*="\s*([0-9]{1,9}(?:\.[0-9]+)?)"\s+y[0-9]*="\s*([0-9]{1,9}(?:\.[0-9]+)?)"', 100.0),
        (r"(?:[0-9]{1,9}|p)\s*=\s*([0-9]{3})\s*,\s*([0-9]{3})", 1000.0),
    ),
)
_OLDER_TIMES = re.compile(r"<points\s+([^/>]*?)\s*/>")
_OLDER_FRAME = re.compile(r"time\s+([0-9]+\.?[0-9]*)\s*\n\s*\{([^}]+)\}")
_NUMBER = r"([+-]?[0-9]+\.?[0-9]*)"
_OLDER_OBJECT = re.compile(rf"\s*([0-9]+)\s*:\s*\[\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\]\s*")


def image_points(text: str, size: Size) -> list[Point]:
    """The points of an answer about one image, whatever number the answer gives that image."""
    width, height = size
    found = [(x * width, y * height) for _, _, x, y in _tagged(text)]
    return found or _older_points(text, size)


def multi_image_points(text: str, sizes: Sequence[Size]) -> tuple[list[list[Point]], int]:
    """The points in each of several images, and the number of points in images that are not there."""
    found: list[list[Point]] = [[] for _ in sizes]
    elsewhere = 0
    for frame, _, x, y in _tagged(text):
        if frame.is_integer() and 1 <= frame <= len(sizes):
            width, height = sizes[int(frame) - 1]
            found[int(frame) - 1].append((x * width, y * height))
        else:
            elsewhere += 1
    return found, elsewhere


def video_points(text: str, size: Size) -> list[tuple[float, float, float]]:
    """(seconds, x, y) of the points of an answer about a video."""
    width, height = size
    found = [(time, x * width, y * height) for time, _, x, y in _tagged(text)]
    return found or _older_video_points(text, size)


def tracks(text: str, size: Size) -> list[tuple[float, dict[str, Point]]]:
    """The frames of an answer to a tracking task: seconds, and the position of each object by its number.

    In order of time. Of two positions of one object at one time the first counts.
    """
    width, height = size
    frames: dict[float, dict[str, Point]] = {}
    for time, number, x, y in _tagged(text):
        frames.setdefault(time, {}).setdefault(number, (x * width, y * height))
    return sorted(frames.items(), key=lambda frame: frame[0]) or _older_tracks(text, size)


def _tagged(text: str) -> Iterator[tuple[float, str, float, float]]:
    """(image or seconds, object, x, y in parts of the width and height) of each point in `coords`."""
    for coords in _COORDS.finditer(text):
        for group in _GROUP.finditer(coords[1]):
            frame = _number(group[1])
            if frame is None:
                continue
            for number, across, down in _POINT.findall(group[2]):
                x, y = float(across) / 1000, float(down) / 1000
                if x <= 1 and y <= 1:
                    yield frame, number, x, y


def _number(text: str) -> float | None:
    """A number of a size that an image, a time or a position can have; None for anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < LARGEST else None


def _older_points(text: str, size: Size) -> list[Point]:
    for row in _OLDER:
        found = [
            (float(x) / scale * size[0], float(y) / scale * size[1])
            for pattern, scale in row
            for x, y in re.findall(pattern, text)
            if max(float(x), float(y)) <= scale
        ]
        if found:
            return found
    return []


def _older_video_points(text: str, size: Size) -> list[tuple[float, float, float]]:
    """Blocks of seconds and (object, x, y) in percent; one malformed block, and the answer counts as none."""
    found = []
    for block in filter(None, map(str.split, _OLDER_TIMES.findall(text))):
        time, rest = _number(block[0]), block[1:]
        points = [(_number(x), _number(y)) for x, y in zip(rest[1::3], rest[2::3], strict=False)]
        if time is None or len(rest) % 3:
            return []
        for x, y in points:
            if x is None or y is None:
                return []
            if max(x, y) <= 100:
                found.append((time, x / 100 * size[0], y / 100 * size[1]))
    return found


def _older_tracks(text: str, size: Size) -> list[tuple[float, dict[str, Point]]]:
    found = []
    for seconds, objects in _OLDER_FRAME.findall(text):
        points = _older_objects(objects, size)
        time = _number(seconds)
        if points and time is not None:
            found.append((time, points))
    return found


def _older_objects(text: str, size: Size) -> dict[str, Point]:
    """`0: [3.1, 62.5], 1: [15.6, 10.4]`, in percent; {} of anything else. Of two of one number the last counts."""
    found: dict[str, Point] = {}
    place = 0
    while place < len(text):
        match = _OLDER_OBJECT.match(text, place)
        if match is None or text[match.end() : match.end() + 1] not in ("", ","):
            return {}
        x, y = _number(match[2]), _number(match[3])
        if x is None or y is None:
            return {}
        if max(x, y) <= 100:
            found[str(int(match[1][:9]))] = (x / 100 * size[0], y / 100 * size[1])
        place = match.end() + 1
    return found
