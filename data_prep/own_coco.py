"""COCO's object: images, categories and boxes -> a record per image, with the points of each category in it.

Molmo2 writes points, not boxes: a box becomes the point at its centre, in pixels of the size that the file gives.
Groups (`iscrowd`) have no single centre and are left out, and so are masks and key points; all of it is counted.
An annotation of no image or category that the file has is left out by itself, and named.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from data_prep.sources.base import Row
from data_prep.sources.own_boxes import BOXES, Box, Boxes
from molmo2_nemo.data.json_values import Fault, FieldError, is_number, show
from molmo2_nemo.errors import UserError

GROUPS = "boxes of groups (iscrowd), left out"
KEYPOINTS = "key points, not read"
LEFT_OUT = "annotation left out"
STYLE = "pointing"


def coco_rows(path: Path) -> Iterator[Row]:
    """A row per annotation that is left out, {"line", "fault"}, then one per image, {"line", "entry", "notes"}, both in
    the file's order; `line` counts from 1 what `unit` says. The file is read whole.

    Raises:
        UserError: its lists are not as COCO has them; the message names the place.
    """
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} cannot be parsed: {error}") from None
    names = {number: str(one.get("name", "")) for number, one in _by_id(path, data, "categories").items()}
    images = _by_id(path, data, "images")
    boxes: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for i, annotation in enumerate(_listed(path, data, "annotations")):
        fault = _unknown(annotation, f"annotations[{i}]", images, names)
        if fault is None:
            boxes[annotation["image_id"]].append(annotation | {"": f"annotations[{i}]"})
            continue
        said = annotation.get("id") if isinstance(annotation, dict) else None
        key = f"annotations[{i}]" if said is None else f"annotation {said}"
        yield {"line": i + 1, "unit": "annotation", "fault": fault, "reason": LEFT_OUT, "name": key}
    for i, (number, image) in enumerate(images.items()):
        row = {"line": i + 1, "unit": "image"}
        try:
            yield row | _image(image, boxes.get(number, []), names)
        except FieldError as error:
            yield row | {"fault": error.fault}


def _listed(path: Path, data: dict[str, Any], name: str) -> list[Any]:
    entries = data.get(name)
    if not isinstance(entries, list):
        raise UserError(f"{path}: {name} must be a list, not {show(entries)}")
    return entries


def _by_id(path: Path, data: dict[str, Any], name: str) -> dict[Any, dict[str, Any]]:
    """Images or categories by their ids, which nothing else can stand for."""
    found: dict[Any, dict[str, Any]] = {}
    for i, entry in enumerate(_listed(path, data, name)):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: {name}[{i}] must be an object, not {show(entry)}")
        number = entry.get("id")
        if not isinstance(number, (int, str)):
            raise UserError(f"{path}: {name}[{i}].id must be a number, not {show(number)}")
        if found.setdefault(number, entry) != entry:
            raise UserError(
                f"{path}: {name}[{i}].id is {show(number)}, as of another one before it; each needs its own"
            )
    return found


def _unknown(annotation: Any, where: str, images: Collection[Any], names: Collection[Any]) -> Fault | None:
    """What an annotation belongs to that the file does not have."""
    if not isinstance(annotation, dict):
        return Fault(where, show(annotation), "an object with image_id, category_id and bbox")
    for name, known, what in (("image_id", images, "images"), ("category_id", names, "categories")):
        number = annotation.get(name)
        if not isinstance(number, (int, str)) or number not in known:
            said = f" (of annotation {annotation['id']})" if "id" in annotation else ""
            expected = f"the id of one of the {len(known):,} {what} of the file{said}"
            return Fault(f"{where}.{name}", show(number), expected)
    return None


def _image(image: dict[str, Any], boxes: list[dict[str, Any]], names: dict[Any, str]) -> dict[str, Any]:
    """The entry of an image, and what is to be counted of it; without a box, nothing is to be learned from it."""
    found: dict[str, list[Box]] = {}
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
        made = Box.of(corner, "xywh", f"{box['']}.bbox")
        found.setdefault(names[box["category_id"]], []).append(made)
        notes.add(BOXES)
    if not found:
        fault = Fault("annotations", f"no box of image {show(image['id'])}", "one with its image_id that is no group")
        raise FieldError(fault, f"hold {fault.seen}")
    size = {name: image[name] for name in ("width", "height") if name in image}
    annotations = [
        {"style": STYLE, "label": label, "points": [box.centre for box in one], **size} for label, one in found.items()
    ]
    entry = {"key": str(image["id"]), "image": image.get("file_name"), "annotations": annotations}
    entry["boxes"] = Boxes(dict(enumerate(found.values())))
    return {"entry": entry, "notes": tuple(sorted(notes))}
