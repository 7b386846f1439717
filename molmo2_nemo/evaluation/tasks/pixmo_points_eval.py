"""PixMo-Points-Eval (arXiv 2409.17146): point at everything of a name in an image, with masks; 436 questions.

Data: allenai/pixmo-points-eval of huggingface.co in pixmo-points-eval/: data/test-*.parquet, and beside data/ the
images, fetched from their `image_url`, as images/<image_sha256> or images/<SHA-256 of the URL's text> (so the released
downloader names them), with or without an ending. Columns read: image_url, image_sha256, label, points (x and y in
percent), masks (one of the image's size for each point).
Asked as "Point to <label>." (released: in a wording that is drawn). Score: pointing, as released.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from molmo2_nemo.data.media import read_media
from molmo2_nemo.errors import DataError
from molmo2_nemo.evaluation.hub_tables import HubTask, Row
from molmo2_nemo.evaluation.masks import write_mask
from molmo2_nemo.evaluation.task import Question
from molmo2_nemo.inference.prompt import Prompt


class PixmoPointsEval(HubTask):
    name = "pixmo_points_eval"
    title = "point at everything of a name in an image, with masks (PixMo-Points-Eval)"
    group = "point"
    scorers = ("pointing",)
    max_new_tokens = 192
    dataset = "allenai/pixmo-points-eval"
    tables = "data/test-*.parquet"
    columns = ("image_url", "image_sha256", "label", "points", "masks")

    def question(self, row: Row, key: str, folder: Path) -> Question:
        shown = read_media(image_file(row, folder / "images"), "image")
        masks = np.asarray(row["masks"], dtype=bool)
        height, width = masks.shape[1:]
        points = [[point["x"] / 100 * width, point["y"] / 100 * height] for point in row["points"]]
        reference = {"points": points, "size": [width, height], "masks": [write_mask(mask) for mask in masks]}
        return Question(key, Prompt(f"Point to {row['label'].lower()}.", [shown], style="pointing"), (reference,))


def image_file(row: Row, folder: Path) -> Path:
    """The file of a row's image.

    Raises:
        DataError: there is none; names its URL.
    """
    names = (row["image_sha256"], hashlib.sha256(row["image_url"].encode()).hexdigest())
    found = [path for name in names for path in sorted(folder.glob(f"{name}*"))]
    if not found:
        raise DataError(f"no {folder / names[0]}; fetch {row['image_url']}")
    return found[0]


TASK = PixmoPointsEval()
