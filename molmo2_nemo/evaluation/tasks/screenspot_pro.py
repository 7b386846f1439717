"""ScreenSpot-Pro (arXiv 2504.07981): point at a part of a professional program's screen of high resolution.

Data: likaixin/ScreenSpot-Pro of huggingface.co in ScreenSpotPro/: annotations/*.json and images/.
Score: point_in_box, asked in one of the released wordings, `Find <instruction>`. Broken down by group and program.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from molmo2_nemo.evaluation.published_images import Entry, PublishedImages


class ScreenSpotPro(PublishedImages):
    name = "screenspot_pro"
    title = "point at a part of a professional program's screen (ScreenSpot-Pro)"
    scorers = ("point_in_box",)
    max_new_tokens = 128
    dataset = "likaixin/ScreenSpot-Pro"
    folders = ("ScreenSpotPro", "ScreenSpot-Pro")
    lists = "annotations/*.json"
    style = "user_qa"

    def image(self, entry: Entry) -> str:
        return f"images/{entry['img_filename']}"

    def text(self, entry: Entry) -> str:
        return f"Find {entry['instruction']}"

    def reference(self, entry: Entry, folder: Path, size: tuple[int, int]) -> Any:
        return {"box": [entry["bbox"][i] for i in range(4)], "size": list(size)}

    def tags(self, entry: Entry) -> dict[str, str]:
        return {"group": str(entry["group"]), "program": f"{entry['group']}-{entry['application']}"}


TASK = ScreenSpotPro()
