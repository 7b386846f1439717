"""COCO's object: images, categories and boxes, or captions -> a record per image, with all that the file says of it.

Molmo2 writes points, not boxes: a box becomes the point at its centre, in pixels of the size that the file gives.
Groups (`iscrowd`) have no single centre and are left out, and so are masks and key points; all of it is counted.
An annotation that cannot be used (of no image or category that the file has, without a box, of a box without width or
outside the size of its image) is left out by itself, and named. Captions, of which a file without categories consists,
are one sentence each in COCO and so short captions here.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from data_prep.sources.base import Row
from data_prep.sources.own_boxes import BOXES, Box, Boxes
from data_prep.sources.own_shapes import not_read
from molmo2_nemo.data.json_values import Fault, FieldError, is_number, show
from molmo2_nemo.errors import UserError

FIELDS = {"images", "annotations", "categories"}
GROUPS = "boxes of groups (iscrowd), left out"
KEYPOINTS = "key points, not read"
LEFT_OUT = "annotation left out"
STYLE, CAPTION = "pointing", "short_caption"


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
    categories = _by_id(path, data, "categories") if "categories" in data else {}
    names = {number: str(one.get("name", "")) for number, one in categories.items()}
    images = _by_id(path, data, "images")
    boxes: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for i, annotation in enumerate(_listed(path, data, "annotations")):
        fault = _fault(annotation, f"annotations[{i}]", images, names)
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


def is_coco(data: dict[str, Any]) -> bool:
    """Whether an object has COCO's fields. Images are objects with an id, unlike those of a record."""
    images = data.get("images")
    if set(data) >= FIELDS:
        return True
    described = isinstance(images, list) and images and isinstance(images[0], dict) and "id" in images[0]
    return bool(described) and "annotations" in data


def _fault(annotation: Any, where: str, images: dict[Any, dict[str, Any]], names: Collection[Any]) -> Fault | None:
    """Why an annotation cannot be used, apart from the others."""
    if not isinstance(annotation, dict):
        return Fault(where, show(annotation), "an object with image_id, category_id and bbox, or with a caption")
    said = f" (of annotation {annotation['id']})" if "id" in annotation else ""
    known = [("image_id", images, "images")] + (
        [] if _is_caption(annotation) else [("category_id", names, "categories")]
    )
    for name, numbers, what in known:
        number = annotation.get(name)
        if not isinstance(number, (int, str)) or number not in numbers:
            return Fault(
                f"{where}.{name}", show(number), f"the id of one of the {len(numbers):,} {what} of the file{said}"
            )
    if _is_caption(annotation):
        text = annotation["caption"]
        ok = isinstance(text, str) and text.strip()
        return None if ok else Fault(f"{where}.caption", show(text), f"a text{said}")
    return None if annotation.get("iscrowd") else _box_fault(annotation, where, images[annotation["image_id"]], said)


def _is_caption(annotation: dict[str, Any]) -> bool:
    return "caption" in annotation and "category_id" not in annotation


def _box_fault(annotation: dict[str, Any], where: str, image: dict[str, Any], said: str) -> Fault | None:
    """Why a box has no centre in its image."""
    box, where = annotation.get("bbox"), f"{where}.bbox"
    if not isinstance(box, list) or len(box) != 4 or not all(is_number(v) for v in box):
        return Fault(where, show(box), f"[x, y, width, height]{said}")
    if box[2] <= 0 or box[3] <= 0:
        return Fault(where, show(box), f"a positive width and height{said}")
    size: list[Any] = [image.get("width"), image.get("height")]
    if all(is_number(side) and side > 0 for side in size):
        try:
            Box.of(box, "xywh", where).point(size, set())
        except FieldError as error:
            return Fault(where, error.fault.seen, f"{error.fault.expected}{said}")
    return None


def _image(image: dict[str, Any], boxes: list[dict[str, Any]], names: dict[Any, str]) -> dict[str, Any]:
    """The entry of an image, and what is to be counted of it; without a box, nothing is to be learned from it."""
    found: dict[str, list[Box]] = {}
    captions: list[dict[str, Any]] = []
    notes: set[str] = set()
    for box in boxes:
        if _is_caption(box):
            captions.append({"style": CAPTION, "text": box["caption"].strip()})
            continue
        notes |= {KEYPOINTS} if "keypoints" in box else set()
        notes |= {not_read("caption")} if "caption" in box else set()
        if box.get("iscrowd"):
            notes.add(GROUPS)
            continue
        made = Box.of(box["bbox"], "xywh", f"{box['']}.bbox")
        found.setdefault(names[box["category_id"]], []).append(made)
        notes.add(BOXES)
    if not found and not captions:
        seen = f"no box of image {show(image['id'])}"
        fault = Fault("annotations", seen, "one with its image_id that is no group and is not left out, or a caption")
        raise FieldError(fault, f"hold {fault.seen}")
    size: dict[str, Any] = {name: image[name] for name in ("width", "height") if name in image}
    annotations: list[dict[str, Any]] = [
        {"style": STYLE, "label": label, "points": [box.centre for box in one], **size} for label, one in found.items()
    ]
    entry = {"key": str(image["id"]), "image": image.get("file_name"), "annotations": annotations + captions}
    if found:
        entry["boxes"] = Boxes(dict(enumerate(found.values())))
    return {"entry": entry, "notes": tuple(sorted(notes))}
