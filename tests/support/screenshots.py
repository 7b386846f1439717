"""Pictures of a report or a preview for the documentation, on a wide screen and on a phone; or of a page before a
change beside the page after it.

molmo2 report RUN --out report.html
python -m tests.support.screenshots report.html docs/report       # docs/report.png, docs/report_phone.png
python -m tests.support.screenshots old.html new.html pages       # pages.png, pages_phone.png: "before" and "after"
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tests.support.browser import Page, browser, missing

DESK, PHONE = 1400, 390  # pixels wide
SHOWN = {DESK: 1.42, PHONE: 2.0}  # heights of its width that a picture of a page has at most
WIDE = 1000  # pixels of a picture at most
LARGEST = 160_000  # bytes
COMPARED = {DESK: (660, 3.2), PHONE: (450, 7.0)}  # pixels and heights of its width that each of two pages has
LARGEST_PAIR = 400_000  # bytes
GAP, LABEL = 24, 40  # pixels


def picture(page: Page, width: int) -> bytes:
    """The top of the page that is open in a window of that width, as a PNG of at most LARGEST bytes."""
    return written(shot(page, WIDE, SHOWN[width]), LARGEST)


def shot(page: Page, wide: int, heights: float) -> Image.Image:
    """What the window shows of the page that is open, scrolled down only.

    Args:
        wide: pixels at most.
        heights: of the window's width, at most.
    """
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "page.png"
        page.picture(whole)
        shown = Image.open(whole).convert("RGB")
    window = page.run("return document.documentElement.clientWidth * window.devicePixelRatio")
    width = min(shown.width, round(window))
    shown = shown.crop((0, 0, width, min(shown.height, round(heights * width))))
    shown.thumbnail((wide, shown.height), Image.Resampling.LANCZOS)
    return shown


def beside(before: Image.Image, after: Image.Image) -> Image.Image:
    """Two pictures side by side, each under its name."""
    both = Image.new("RGB", (before.width + GAP + after.width, LABEL + max(before.height, after.height)), "white")
    pen, font = ImageDraw.Draw(both), ImageFont.load_default(24)
    for name, image, left in (("before", before, 0), ("after", after, before.width + GAP)):
        pen.text((left + 8, 4), name, fill="#c8102e", font=font)
        both.paste(image, (left, LABEL))
    pen.line([(before.width + GAP // 2, 0), (before.width + GAP // 2, both.height)], fill="#8c96a3", width=2)
    return both


def written(image: Image.Image, largest: int) -> bytes:
    """A PNG of at most `largest` bytes, with as many colours as that allows."""
    for colours in (256, 128, 64, 32, 16, 8):
        file = io.BytesIO()
        image.quantize(colours, Image.Quantize.MAXCOVERAGE).save(file, "PNG", optimize=True)
        if file.tell() <= largest:
            return file.getvalue()
    raise AssertionError(f"{file.tell():,} bytes, more than {largest:,}, with {colours} colours")


def main(*names: str) -> None:
    *pages, start = names
    for width, end in ((DESK, ".png"), (PHONE, "_phone.png")):
        with browser(width) as page:
            shots = []
            for file in pages:
                page.open(Path(file))
                shots.append(shot(page, *COMPARED[width]))
            shown = picture(page, width) if len(shots) == 1 else written(beside(*shots), LARGEST_PAIR)
        Path(start + end).write_bytes(shown)


if __name__ == "__main__":
    if missing() or len(sys.argv) not in (3, 4):
        sys.exit(missing() or __doc__)
    main(*sys.argv[1:])
