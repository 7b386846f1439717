"""Points of an answer and of what was right, drawn on the picture that they are in."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

ANSWERED = "#d1495b"  # crosses
RIGHT = "#1f9d55"  # rings
RIM = "white"
Mark = tuple[float, float, str]  # x, y, a name written beside it or ""


def draw_answer(
    picture: Image.Image, answered: Sequence[Mark], right: Sequence[Mark], size: tuple[float, float]
) -> Image.Image:
    """The picture with a ring around each right point and a cross on each answered one; the original stays as it is.

    Args:
        picture: of any size; it may be stretched.
        size: width and height that the marks' coordinates are measured in. Marks outside are drawn at the edge.
    """
    drawn = picture.convert("RGB")
    pen, reach = ImageDraw.Draw(drawn), max(3, round(min(drawn.size) / 40))
    for x, y, name in right:
        at = _pixel(x, y, size, drawn.size)
        for width, colour in ((4, RIM), (2, RIGHT)):
            pen.ellipse((at[0] - reach, at[1] - reach, at[0] + reach, at[1] + reach), outline=colour, width=width)
        _name(pen, at, -reach, name, RIGHT)
    for x, y, name in answered:
        at = _pixel(x, y, size, drawn.size)
        for width, colour in ((4, RIM), (2, ANSWERED)):
            for turn in (-1, 1):
                ends = (at[0] - reach, at[1] - turn * reach, at[0] + reach, at[1] + turn * reach)
                pen.line(ends, fill=colour, width=width)
        _name(pen, at, reach, name, ANSWERED)
    return drawn


def _pixel(x: float, y: float, size: tuple[float, float], shown: tuple[int, int]) -> tuple[int, int]:
    across, down = (min(max(v / full, 0.0), 1.0) for v, full in zip((x, y), size, strict=True))
    return round(across * (shown[0] - 1)), round(down * (shown[1] - 1))


def _name(pen: ImageDraw.ImageDraw, at: tuple[int, int], reach: int, name: str, colour: str) -> None:
    """The name right of a mark, answered ones below and right ones above, so that both can be read."""
    if name:
        place = (at[0] + abs(reach) + 2, at[1] + (2 if reach > 0 else -14))
        pen.text(place, name[:12], fill=colour, font=ImageFont.load_default(12), stroke_width=1, stroke_fill=RIM)
