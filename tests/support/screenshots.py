"""Pictures of a report or a preview for the documentation, on a wide screen and on a phone.

molmo2 report RUN --out report.html
python -m tests.support.screenshots report.html docs/report      # docs/report.png, docs/report_phone.png
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.support.browser import Page, browser, missing

DESK, PHONE = 1400, 390  # pixels wide
SHOWN = 2.0  # heights of a page's width that a picture shows at most
WIDE = 1000  # pixels of a picture at most
LARGEST = 150_000  # bytes


def picture(page: Page) -> bytes:
    """The top of the page that is open, as a PNG of at most LARGEST bytes, with as many colours as that allows."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "page.png"
        page.picture(whole)
        shown = Image.open(whole).convert("RGB")
    shown = shown.crop((0, 0, shown.width, min(shown.height, round(SHOWN * shown.width))))
    shown.thumbnail((WIDE, shown.height), Image.Resampling.LANCZOS)
    for colours in (256, 128, 64, 32, 16, 8):
        written = io.BytesIO()
        shown.quantize(colours).save(written, "PNG", optimize=True)
        if written.tell() <= LARGEST:
            break
    else:
        raise AssertionError(f"{written.tell():,} bytes, more than {LARGEST:,}, with {colours} colours")
    return written.getvalue()


def main(file: str, start: str) -> None:
    for width, end in ((DESK, ".png"), (PHONE, "_phone.png")):
        with browser(width) as page:
            page.open(Path(file))
            Path(start + end).write_bytes(picture(page))


if __name__ == "__main__":
    if missing() or len(sys.argv) != 3:
        sys.exit(missing() or __doc__)
    main(*sys.argv[1:])
