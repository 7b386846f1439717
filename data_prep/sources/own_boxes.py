"""Boxes of a user's own data -> points: Molmo2 writes points, not boxes, so a box becomes the point at its centre."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molmo2_nemo.data.json_values import Fault, FieldError, is_number, show
from molmo2_nemo.data.places import OUTSIDE
from molmo2_nemo.errors import UserError

BOXES = "boxes, each taken as the point at its centre"
ONE_BOX = "a row with one box: all boxes of a picture belong in one row, or training takes it for the only one"
CUT = (
    "boxes that reach more than 1 % outside their picture, cut to it: is box_format what the four numbers are, and "
    "width and height the size that they are measured in?"
)
OTHER_SIZE = (
    "boxes measured in a width and height that are not the picture's, and scaled to it: is it the right picture?"
)
FORMATS = {
    "xywh": "left, top, width, height",
    "xyxy": "left, top, right, bottom",
    "cxcywh": "centre, width and height",
}
CORNER, SIZES = (("x", "y"), ("left", "top")), (("w", "h"), ("width", "height"))
NAMED: tuple[tuple[str, tuple[str, ...]], ...] = (  # format, names of its four numbers in an object
    *(("xywh", (*corner, *size)) for corner in CORNER for size in SIZES),
    *(("xyxy", names) for names in (("x1", "y1", "x2", "y2"), ("left", "top", "right", "bottom"))),
    *(("xyxy", names) for names in (("xmin", "ymin", "xmax", "ymax"), ("x_min", "y_min", "x_max", "y_max"))),
    *(("cxcywh", ("cx", "cy", *size)) for size in SIZES),
)
INNER = ("bbox", "box")  # of an object that has a label beside its box
LABELS = ("label", "category", "class", "name")  # of a box that is an object
NUMBERS = re.compile(r"[^\s,;]+")


@dataclass(frozen=True, slots=True)
class Box:
    """A box, in the unit of its numbers."""

    where: str  # it stands in the user's data, for messages
    centre: list[float]  # x, y
    edges: tuple[float, float, float, float]  # left, top, right, bottom

    @classmethod
    def of(cls, numbers: Sequence[float], form: str, where: str) -> Box:
        """The box that four numbers of a format mean.

        Raises:
            FieldError: a box of negative width or height.
        """
        x, y, a, b = numbers
        width, height = (a - x, b - y) if form == "xyxy" else (a, b)
        if width < 0 or height < 0:
            raise FieldError.wrong(where, f"a box ({FORMATS[form]}) of positive width and height", list(numbers))
        if form == "cxcywh":
            return cls(where, [x, y], (x - a / 2, y - b / 2, x + a / 2, y + b / 2))
        return cls(where, [x + width / 2, y + height / 2], (x, y, x + width, y + height))

    def point(self, size: Sequence[float], notes: set[str]) -> list[float]:
        """The centre; of a box that reaches more than 1 % outside, that of the part inside, counted in `notes`.

        Args:
            size: of the picture, width and height in the unit of the box.
        Raises:
            FieldError: nothing of it is inside.
        """
        if all(-OUTSIDE <= edge / size[i % 2] <= 1 + OUTSIDE for i, edge in enumerate(self.edges)):
            return self.centre
        left, top, right, bottom = (min(max(edge, 0.0), size[i % 2]) for i, edge in enumerate(self.edges))
        if left >= right or top >= bottom:
            seen = f"left, top, right, bottom {show([*self.edges])}"
            fault = Fault(self.where, seen, f"a box inside the picture, {size[0]:g} x {size[1]:g}")
            raise FieldError(fault, f"is {seen}, not {fault.expected}")
        notes.add(CUT)
        return [(left + right) / 2, (top + bottom) / 2]


@dataclass(frozen=True, slots=True)
class Boxes:
    """The boxes that a record's points are the centres of.

    Args:
        of: number of the annotation -> a box for each of its points, in their order.
    """

    of: Mapping[int, Sequence[Box]]

    def points_inside(
        self, tree: Sequence[dict[str, Any]], picture: Sequence[float], notes: set[str]
    ) -> list[dict[str, Any]]:
        """The annotations with points that lie in the picture.

        Args:
            picture: its width and height in pixels, the unit of boxes without one of their own.
        Raises:
            FieldError: a box of which nothing is inside.
        """
        made = list(tree)
        for number, boxes in self.of.items():
            fields = made[number]
            scale = fields.get("point_scale")
            size = (scale, scale) if scale else (fields.get("width") or picture[0], fields.get("height") or picture[1])
            if not scale and tuple(size) != tuple(picture):
                notes.add(OTHER_SIZE)
            if all(is_number(side) and side > 0 for side in size):  # else Placing says what is wrong with it
                made[number] = {**fields, "points": [box.point(size, notes) for box in boxes]}
        return made


def labelled_boxes(boxes: Any, labels: Any, form: str, notes: list[str]) -> dict[str, list[Box]]:
    """Label -> its boxes, in their order.

    Args:
        boxes: a list of boxes, or one: four numbers, or an object of four named numbers.
        labels: one for all boxes, or a list; None where the boxes have their own.
        form: what four numbers are (one of FORMATS); "" where nothing says it.
    Raises:
        FieldError: something else, or another number of labels.
        UserError: four numbers of which nothing says what they are.

    No boxes with one label are a label without boxes.
    """
    single = isinstance(boxes, Mapping) or _four(boxes)
    several = [boxes] if single else boxes
    if not isinstance(several, list):
        raise FieldError.wrong("boxes", "a list of boxes", boxes)
    if isinstance(labels, list) and len(labels) != len(several):
        fault = Fault("label", f"{len(labels)} labels", f"{len(several)}, one for each box")
        raise FieldError(fault, f"has {fault.seen} for {len(several)} boxes")
    found: dict[str, list[Box]] = {labels: []} if isinstance(labels, str) and labels and not several else {}
    for i, box in enumerate(several):
        where = "boxes" if single else f"boxes[{i}]"
        label = labels[i] if isinstance(labels, list) else labels
        if label is None and isinstance(box, Mapping):
            label = next((box[name] for name in LABELS if box.get(name) is not None), None)
        if not isinstance(label, str) or not label:
            raise FieldError.wrong("label", "a text for each box (numbers of classes have no words)", label)
        found.setdefault(label, []).append(_box(box, form, where))
    notes += [BOXES] if several else []
    notes += [ONE_BOX] if single else []
    return found


def of_text(text: str) -> Any:
    """Four numbers in the cell of a CSV, as a list; any other text as it is."""
    try:
        numbers = [float(number) for number in NUMBERS.findall(text)]
    except ValueError:
        return text
    return numbers if len(numbers) == 4 else text


def _four(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(is_number(number) for number in box)


def _box(box: Any, form: str, where: str) -> Box:
    if isinstance(box, Mapping):
        inner = next((box[name] for name in INNER if name in box), None)
        if inner is not None:
            return _box(inner, form, where)
        for named, names in NAMED:
            if all(is_number(box.get(name)) for name in names):
                return Box.of([box[name] for name in names], named, where)
    if not _four(box):
        raise FieldError.wrong(where, "four numbers, or an object such as {x, y, width, height}", box)
    if not form:
        lines = ", ".join(f"box_format: {name} ({words})" for name, words in FORMATS.items())
        raise UserError(
            f"a box is {show(box)}, and nothing says what the four numbers are: write one of these lines into a file "
            f"for --map: {lines}"
        )
    return Box.of(box, form, where)
