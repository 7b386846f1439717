"""ScreenSpot-v2 (arXiv 2410.23218): point at a part of a desktop, web or mobile screen.

Data: OS-Copilot/ScreenSpot-v2 of huggingface.co in ScreenSpot-v2/: screenspot_*_v2.json, and screenspotv2_image.zip
unpacked there (screenspotv2_image/).
Score: point_in_box, asked in one of the released wordings, `Find <instruction>`.
Broken down by kind of screen and of target.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from molmo2_nemo.evaluation.published_images import Entry, PublishedImages


class ScreenSpot(PublishedImages):
    name = "screenspot_v2"
    title = "point at a part of a screen (ScreenSpot-v2)"
    scorers = ("point_in_box",)
    max_new_tokens = 128
    dataset = "OS-Copilot/ScreenSpot-v2"
    folders = ("ScreenSpot-v2",)
    lists = "screenspot_*_v2.json"
    style = "user_qa"

    def image(self, entry: Entry) -> str:
        return f"screenspotv2_image/{entry['img_filename']}"

    def text(self, entry: Entry) -> str:
        return f"Find {entry['instruction']}"

    def reference(self, entry: Entry, folder: Path, size: tuple[int, int]) -> Any:
        left, top, width, height = (entry["bbox"][i] for i in range(4))
        return {"box": [left, top, left + width, top + height], "size": list(size)}

    def tags(self, entry: Entry) -> dict[str, str]:
        screen = entry["file"].removeprefix("screenspot_").removesuffix("_v2")
        return {"screen": screen, "target": f"{screen}-{entry['data_type']}"}


TASK = ScreenSpot()
