"""COCO's object: images, categories and boxes -> a record per image, with the points of each category in it.

Molmo2 writes points, not boxes: a box becomes the point at its centre, in pixels of the size that the file gives.
Groups (`iscrowd`) have no single centre and are left out, and so are masks and key points; all of it is counted.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.sources.base import Row
from data_prep.sources.own_boxes import BOXES, centre
from molmo2_nemo.data.json_values import FieldError, is_number, show
from molmo2_nemo.errors import UserError

GROUPS = "boxes of groups (iscrowd), left out"
KEYPOINTS = "key points, not read"
STYLE = "pointing"


def coco_rows(path: Path) -> Iterator[Row]:
    """A row per image, in the file's order: {"line", "entry", "notes"}. The file is read whole.

    Raises:
        UserError: it is not as COCO has it; the message names the place.
    """
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} cannot be parsed: {error}") from None
    names = {
        _field(path, c, f"categories[{i}]", "id"): str(c.get("name", "")) for i, c in _objects(path, data, "categories")
    }
    boxes: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for i, annotation in _objects(path, data, "annotations"):
        where = f"annotations[{i}]"
        if _field(path, annotation, where, "category_id") not in names:
            raise UserError(f"{path}: {where}.category_id is {show(annotation['category_id'])}, which no category has")
        boxes[_field(path, annotation, where, "image_id")].append(annotation | {"": where})
    images = {_field(path, image, f"images[{i}]", "id"): image for i, image in _objects(path, data, "images")}
    for number in boxes:
        if number not in images:
            where = boxes[number][0][""]
            raise UserError(f"{path}: {where}.image_id is {show(number)}, which no image has")
    for i, (number, image) in enumerate(images.items()):
        try:
            yield {"line": i + 1, **_image(image, boxes.get(number, []), names)}
        except FieldError as error:
            yield {"line": i + 1, "fault": error.fault}


def _objects(path: Path, data: dict[str, Any], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    entries = data.get(name)
    if not isinstance(entries, list):
        raise UserError(f"{path}: {name} must be a list, not {show(entries)}")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: {name}[{i}] must be an object, not {show(entry)}")
        yield i, entry


def _field(path: Path, entry: dict[str, Any], where: str, name: str) -> Any:
    if not isinstance(entry.get(name), (int, str)):
        raise UserError(f"{path}: {where}.{name} must be a number, not {show(entry.get(name))}")
    return entry[name]


def _image(image: dict[str, Any], boxes: list[dict[str, Any]], names: dict[Any, str]) -> dict[str, Any]:
    """The entry of an image, and what is to be counted of it; without a box, nothing is to be learned from it."""
    found: dict[str, list[list[float]]] = {}
    notes = set()
    for box in boxes:
        if "keypoints" in box:
            notes.add(KEYPOINTS)
        if box.get("iscrowd"):
            notes.add(GROUPS)
            continue
        corner = box.get("bbox")
        if not isinstance(corner, list) or len(corner) != 4 or not all(is_number(v) for v in corner):
            raise FieldError.wrong(f"{box['']}.bbox", "[x, y, width, height]", corner)
        point = centre(corner, "xywh", f"{box['']}.bbox")
        found.setdefault(names[box["category_id"]], []).append(point)
        notes.add(BOXES)
    size = {name: image[name] for name in ("width", "height") if name in image}
    annotations = [{"style": STYLE, "label": label, "points": points, **size} for label, points in found.items()]
    entry = {"key": str(image["id"]), "image": image.get("file_name"), "annotations": annotations}
    return {"entry": entry, "notes": tuple(sorted(notes))}
