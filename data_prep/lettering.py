"""Letters drawn on or beside the text boxes of an image, for AI2D's questions that refer to letters.

The published builder draws in Arial; this module uses the font that comes with Pillow, so that every machine draws the
same. Colors, sizes and positions are the published ones.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from molmo2_nemo.data.pictures import decode_image

FILL = (25, 249, 255)
ALPHA = 127  # opacity of a translucent box, 0 to 255
LARGEST_INSIDE = 22  # font size of a letter in its box
SMALLEST_BESIDE, LARGEST_BESIDE = 16, 32
BESIDE_SHARE = 50  # of the shorter side: the font size of letters beside boxes
BESIDE_OFFSET = (12, 10)

Box = tuple[str, float, float, float, float]  # letter, left, top, right, bottom in pixels


def draw_letters(content: bytes, boxes: Sequence[Box], *, beside: bool = False) -> bytes:
    """The image with a letter on every box, as PNG.

    Args:
        content: the encoded image.
        boxes: boxes without height are skipped.
        beside: a translucent box with the letter at its upper left, instead of an opaque box with the letter inside.
    Raises:
        ValueError: the image cannot be decoded, or a box cannot be drawn.
    """
    image = Image.fromarray(decode_image(content))
    draw = ImageDraw.Draw(image, "RGBA" if beside else "RGB")
    for letter, left, top, right, bottom in boxes:
        if top == bottom:
            continue
        edges = (min(left, right), min(top, bottom), max(left, right), max(top, bottom))
        draw.rectangle(edges, fill=(*FILL, ALPHA) if beside else FILL)
        if beside:
            _draw_beside(draw, letter, edges, min(image.size))
        else:
            _draw_inside(draw, letter, edges)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _draw_inside(draw: ImageDraw.ImageDraw, letter: str, edges: tuple[float, float, float, float]) -> None:
    left, top, right, bottom = edges
    size = LARGEST_INSIDE
    height = bottom - top
    while height > 4 and size > 1 and _extent(draw, letter, size)[1] > height:
        size -= 1
    width, tall = _extent(draw, letter, size)
    x0, y0, _, _ = draw.textbbox((0, 0), letter, font=ImageFont.load_default(size))
    place = ((left + right - width) / 2 - x0, (top + bottom - tall) / 2 - y0)
    draw.text(place, letter, fill="black", font=ImageFont.load_default(size))


def _draw_beside(
    draw: ImageDraw.ImageDraw, letter: str, edges: tuple[float, float, float, float], shorter_side: int
) -> None:
    size = min(max(SMALLEST_BESIDE, shorter_side // BESIDE_SHARE), LARGEST_BESIDE)
    font = ImageFont.load_default(size)
    place = (max(edges[0] - BESIDE_OFFSET[0], 0), max(edges[1] - BESIDE_OFFSET[1], 0))
    draw.rectangle(draw.textbbox(place, letter, font=font), fill="white")
    draw.text(place, letter, fill="black", font=font)


def _extent(draw: ImageDraw.ImageDraw, letter: str, size: int) -> tuple[float, float]:
    left, top, right, bottom = draw.textbbox((0, 0), letter, font=ImageFont.load_default(size))
    return right - left, bottom - top
