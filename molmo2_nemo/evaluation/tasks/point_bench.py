"""Point-Bench (PointArena, arXiv 2505.09990): point at what is described, in five categories.

Data: PointArena/pointarena-data of huggingface.co in point_arena/: data.json, and selected_images.zip and
selected_masks.zip unpacked there. Entries without a mask are left out, as released.
Score: point_in_mask. The published figure is the mean over the five categories (`category` of the breakdown).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from molmo2_nemo.data.media import read_media
from molmo2_nemo.evaluation.masks import write_mask
from molmo2_nemo.evaluation.published_images import Entry, PublishedImages


class PointBench(PublishedImages):
    name = "point_bench"
    title = "point at what is described (Point-Bench)"
    scorers = ("point_in_mask",)
    max_new_tokens = 512
    dataset = "PointArena/pointarena-data"
    folders = ("point_arena", "pointarena-data")
    lists = "data.json"
    style = "pointing"

    def kept(self, entry: Entry) -> bool:
        return "mask_filename" in entry

    def image(self, entry: Entry) -> str:
        return f"selected_images/{entry['category']}/{entry['image_filename']}"

    def text(self, entry: Entry) -> str:
        return str(entry["user_input"])

    def reference(self, entry: Entry, folder: Path, size: tuple[int, int]) -> Any:
        path = folder / "selected_masks" / entry["category"] / entry["mask_filename"]
        return {"mask": write_mask(_mask(path)), "size": list(size)}

    def tags(self, entry: Entry) -> dict[str, str]:
        return {"category": str(entry["category"])}


def _mask(path: Path) -> np.ndarray:
    """A mask's file: what is brighter than 127, in any channel. bool [H, W]."""
    import io

    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(read_media(path, "image"))))
    return pixels > 127 if pixels.ndim == 2 else (pixels > 127).any(-1)


TASK = PointBench()
