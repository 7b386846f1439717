"""OSWorld-G (arXiv 2505.13227): point at a part of a desktop's screen; 564 instructions.

Data: MMInstruction/OSWorld-G of huggingface.co in OSWorld-G/: data/test-*.parquet. Columns read: image, instruction,
box_type (bbox, polygon or refusal), box_coordinates (left, top, width, height, or corner after corner).
Asked as the released loader asks by default: the instruction alone. Score: point_in_box; by kind of target. The
released evaluation takes all targets for boxes, so that polygons and refusals are nearly always wrong there: what
compares is the figure of `bbox`. Here a polygon is one, and a refusal is right if the answer has no point.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import DataError
from molmo2_nemo.evaluation.hub_tables import HubTask, Row, picture
from molmo2_nemo.evaluation.task import Question
from molmo2_nemo.inference.prompt import Prompt


class OsWorldG(HubTask):
    name = "osworld_g"
    title = "point at a part of a desktop's screen (OSWorld-G)"
    group = "point"
    scorers = ("point_in_box",)
    max_new_tokens = 128
    dataset = "MMInstruction/OSWorld-G"
    tables = "data/test-*.parquet"
    columns = ("image", "instruction", "box_type", "box_coordinates")

    def question(self, row: Row, key: str, folder: Path) -> Question:
        from PIL import Image

        shown, kind = picture(row["image"]), row["box_type"]
        size = list(Image.open(io.BytesIO(shown)).size)
        reference = {**target(kind, row["box_coordinates"]), "size": size}
        return Question(key, Prompt(row["instruction"], [shown]), (reference,), tags={"target": kind})


def target(kind: str, at: list[float]) -> dict[str, Any]:
    """What is to be pointed at, as point_in_box wants it.

    Raises:
        DataError: a kind that is not published.
        ValueError: coordinates of another number.
    """
    if kind == "bbox":
        left, top, width, height = at
        return {"box": [left, top, left + width, top + height]}
    if kind == "polygon":
        return {"polygon": [[x, y] for x, y in zip(at[::2], at[1::2], strict=True)]}
    if kind == "refusal":
        return {"absent": True}
    raise DataError(f"box_type is {kind!r}; expected bbox, polygon or refusal")


TASK = OsWorldG()
