"""Pictures made smaller on the way (`--max-image-side`), never below what the model reads.

Training stretches a picture to a canvas of tiles and to one overview (molmo2_nemo/data/image.py). A smaller copy serves
as well if every tiling that training may choose stays the same and no canvas is larger than the copy: the model then
sees the same crops, from pixels that were resampled once more.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from data_prep.media_kinds import StillImage
from molmo2_nemo.data.config import DataConfig, ImageConfig
from molmo2_nemo.data.image import TileGeometry, select_tiling
from molmo2_nemo.data.styles import Kind, style_of

QUALITY = 95  # of JPEG, all colours kept
LOSSLESS = ("png", "gif", "bmp", "tif", "ppm")  # these become PNG, others JPEG
TRIES = 64  # sizes that are looked at, before the neighbours of the first that serves
MADE = "made smaller (--max-image-side)"
RAISED = "made smaller, but not to --max-image-side: the model reads more of it"
NEEDED = "larger than --max-image-side kept as it is: the model reads all of it"
LARGER = "larger than --max-image-side kept as it is: its file is smaller than that of the smaller picture"
IN_PIXELS = "larger than --max-image-side kept as it is: points of several images are in its pixels"


def tile_limits(config: DataConfig) -> tuple[int, ...]:
    """The largest numbers of tiles that training may use; that of high resolution unless no data set of it has any."""
    image = config.image
    chances = [image.p_high_res if s.p_high_res is None else s.p_high_res for s in config.sources.values()]
    high = [image.high_res_max_crops] if not chances or max(chances) > 0 else []
    return tuple(sorted({image.max_crops, image.max_multi_image_crops, *high}))


def smaller_size(size: tuple[int, int], side: int, image: ImageConfig, limits: Sequence[int]) -> tuple[int, int]:
    """The width and height of the smallest copy whose longer side is at least `side` and which the model reads alike.

    Args:
        size: width and height, pixels.
        limits: of tiles.
    """
    longer, geometry = max(size), TileGeometry.of(image)
    wanted = [_tiling(size, geometry, limit) for limit in limits]
    canvas = [geometry.canvas(tiling) for tiling in wanted]
    height, width = (max(one[axis] for one in canvas) for axis in (0, 1))

    def serves(longest: int) -> bool:
        made = _scaled(size, longest)
        enough = made[0] >= width and made[1] >= height
        return enough and [_tiling(made, geometry, limit) for limit in limits] == wanted

    rounding = math.ceil(longer / min(size))  # half a pixel of the shorter side, in pixels of the longer
    least = max(side, math.floor(longer * max(width / size[0], height / size[1])) - rounding, 1)
    step = max((longer - least) // TRIES, 1)
    for longest in range(least, longer, step):
        if serves(longest):
            first = next(near for near in range(max(longest - step + 1, least), longest + 1) if serves(near))
            return _scaled(size, first)
    return size


def _scaled(size: tuple[int, int], longest: int) -> tuple[int, int]:
    return round(size[0] * longest / max(size)), round(size[1] * longest / max(size))


def _tiling(size: tuple[int, int], geometry: TileGeometry, limit: int) -> tuple[int, int]:
    width, height = (max(value - geometry.overlap, 1) for value in size)
    return select_tiling(height, width, geometry.window, limit)


def smaller(picture: StillImage, side: int, config: DataConfig) -> StillImage:
    """The picture as it is to be stored; its notes say what was done. JPEG of quality 95, or PNG of lossless kinds.

    Args:
        side: the longer side, pixels, of larger pictures.
    """
    size = picture.width, picture.height
    if max(size) <= side:
        return picture
    made = smaller_size(size, side, config.image, tile_limits(config))
    if made == size:
        return replace(picture, notes=(*picture.notes, NEEDED))
    data, suffix = _encoded(picture, made, config)
    if len(data) >= len(picture.data):
        return replace(picture, notes=(*picture.notes, LARGER))
    note = MADE if max(made) == side else RAISED
    return replace(picture, data=data, suffix=suffix, width=made[0], height=made[1], notes=(*picture.notes, note))


def _encoded(picture: StillImage, size: tuple[int, int], config: DataConfig) -> tuple[bytes, str]:
    """Upright RGB pixels, resampled with Lanczos' filter."""
    from PIL import Image

    from molmo2_nemo.data.pictures import decode_image

    pixels = decode_image(picture.data, limits=config.limits, truncated=config.image.truncated)
    made, file = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS), io.BytesIO()
    if picture.suffix in LOSSLESS:
        made.save(file, "PNG", optimize=False)
        return file.getvalue(), "png"
    made.save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue(), "jpg"


# --- annotations -----------------------------------------------------------------------------------------------------


def all_smaller(
    pictures: Sequence[StillImage], trees: Sequence[Sequence[Mapping[str, Any]]], side: int, config: DataConfig
) -> list[StillImage]:
    """The pictures of a record as they are to be stored. Points of several images have one unit; where that is the
    pixels of each, all stay as they are."""
    if any(_in_pixels(fields, "", Kind.MULTI_IMAGE_POINTS) for tree in trees for fields in tree):
        large = [max(picture.width, picture.height) > side for picture in pictures]
        return [
            replace(picture, notes=(*picture.notes, IN_PIXELS)) if more else picture
            for picture, more in zip(pictures, large, strict=True)
        ]
    return [smaller(picture, side, config) for picture in pictures]


def in_size(tree: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> list[dict[str, Any]]:
    """The annotations of a record, whose points in pixels of its first image get the width and height of these."""
    return [_sized(fields, "", size) for fields in tree]


def _in_pixels(fields: Mapping[str, Any], style: str, kind: Kind, unit: bool = False) -> bool:
    """Whether an annotation, a turn or an alternative of it has points of that kind without a unit.

    Args:
        unit: whether the annotation that an alternative stands in has one.
    """
    style, unit = fields.get("style", style), unit or _unit(fields)
    own = "points" in fields and not unit and style_of(style).kind is kind
    turns = any(_in_pixels(turn, style, kind) for turn in fields.get("turns", ()))
    return own or turns or any(_in_pixels(form, style, kind, unit) for form in fields.get("either", ()))


def _sized(fields: Mapping[str, Any], style: str, size: tuple[int, int], unit: bool = False) -> dict[str, Any]:
    style, unit, made = fields.get("style", style), unit or _unit(fields), dict(fields)
    if "turns" in fields:
        made["turns"] = [_sized(turn, style, size) for turn in fields["turns"]]
    if "either" in fields:
        made["either"] = [_sized(form, style, size, unit) for form in fields["either"]]
    if "points" in fields and not unit and style_of(style).kind is Kind.POINTS:
        made["width"], made["height"] = size
    return made


def _unit(fields: Mapping[str, Any]) -> bool:
    return bool(fields.get("point_scale") or (fields.get("width") and fields.get("height")))
