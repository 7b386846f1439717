"""Fields that are known, but that nothing reads where they stand: options of a caption, points of a plain question.

Which style reads which field is decided in one place, the parser (annotations.py), so the parser is asked: a field
that can have another value without a change of what is parsed is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from typing import Any

from molmo2_nemo.data.annotation_json import read_annotation
from molmo2_nemo.data.annotations import Alternatives, Annotation
from molmo2_nemo.data.json_values import Fault, FieldError, is_number, show
from molmo2_nemo.data.video.sampling import unread_keys

SKELETON = ("style", "either", "turns")
# What other tools say twice or say of the picture: counted. Any other field that is not read can only be a mistake.
HARMLESS = frozenset({"answer", "answers", "explanation", "label", "width", "height"})

Parsed = Annotation | Alternatives
Trail = tuple[str | int, ...]  # names and indices from the top


def check_read(fields: Mapping[str, Any], path: str, num_images: int, has_video: bool) -> list[str]:
    """Check that every field of an annotation is read.

    Args:
        fields: the annotation's JSON, which `read_annotation` has accepted.
        path: where it stands, for errors.
    Returns:
        Notes on fields that are not read, but may well stand there.
    Raises:
        FieldError: a field that is not read, and that can only be a mistake.
    """

    def read(changed: dict[str, Any]) -> Parsed:
        return read_annotation(changed, num_images, has_video)

    whole = dict(fields)
    parsed = read(whole)
    unread = [(where, trail) for where, trail in _places(whole, path, ()) if not _is_read(whole, trail, parsed, read)]
    for where, trail in unread:
        holder = _holder(whole, trail[:-1])
        if trail[-1] not in HARMLESS or _half_a_size(holder):
            raise _unread(where, holder, str(trail[-1]), str(whole["style"]))
    return sorted({f"fields {trail[-1]} that the style does not read where they stand" for _, trail in unread})


def check_sampling_read(sampling: Mapping[str, Any]) -> None:
    """Check that every key of a record's `sampling` is read.

    Raises:
        FieldError: one is not, by the mode that there is.
    """
    for name, why in unread_keys(sampling).items():
        fault = Fault(f"sampling.{name}", show(sampling[name]), why)
        raise FieldError(fault, f"is not read: {why}")


def _places(fields: Mapping[str, Any], path: str, trail: Trail) -> Iterator[tuple[str, Trail]]:
    """Path and trail of every field of an annotation, of its forms and of its turns."""
    for name in fields:
        if name not in SKELETON:
            yield f"{path}.{name}", (*trail, name)
    for name in ("either", "turns"):
        for i, below in enumerate(fields.get(name, ())):
            yield from _places(below, f"{path}.{name}[{i}]", (*trail, name, i))


def _is_read(whole: dict[str, Any], trail: Trail, parsed: Parsed, read: Callable[[dict[str, Any]], Parsed]) -> bool:
    changed = _copied(whole, trail[:-1])
    _holder(changed, trail[:-1])[trail[-1]] = _another(_holder(whole, trail))
    try:
        return read(changed) != parsed
    except FieldError:  # its value is looked at
        return True


def _another(value: Any) -> Any:
    """Another value of the same type, as good as the one there where that is possible."""
    if isinstance(value, bool):
        return not value
    if is_number(value):
        return value + 1 if value + 1 != value else value / 2  # to a large float one more is nothing
    if isinstance(value, str):
        return value + " x"
    return [*value, *(value[:1] or ["x"])] if isinstance(value, list) else {}


def _holder(whole: Any, trail: Trail) -> Any:
    for step in trail:
        whole = whole[step]
    return whole


def _copied(whole: Any, trail: Trail) -> Any:
    """A copy of `whole` in which what lies on the way along `trail` may be changed."""
    made = copy(whole)
    if trail:
        made[trail[0]] = _copied(whole[trail[0]], trail[1:])
    return made


def _half_a_size(holder: Mapping[str, Any]) -> bool:
    """Whether points have a width or a height, but not both, and so would be read as pixels."""
    return "points" in holder and "point_scale" not in holder and ("width" in holder) != ("height" in holder)


def _unread(where: str, holder: Mapping[str, Any], name: str, style: str) -> FieldError:
    beside = ", ".join(other for other in holder if other not in (*SKELETON, name))
    style = str(holder.get("style", style))
    expected = f"only fields that the style {style} reads" + (f" beside {beside}" if beside else "")
    says = f"is not read by the style {style}" + (f" beside {beside}" if beside else "")
    return FieldError(Fault(where, show(holder[name]), expected), f"{says}; leave it out, or name another style")
