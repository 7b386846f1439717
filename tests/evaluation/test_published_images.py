"""Tasks on published lists of questions with images: files of that form, the right answer and a wrong one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.scorers import find_scorer
from molmo2_nemo.evaluation.task import TaskSettings
from molmo2_nemo.evaluation.tasks import find_task

WIDTH, HEIGHT = 200, 100
SPOT = {"img_filename": "a.png", "instruction": "the close button", "bbox": [100, 20, 40, 10], "data_type": "icon"}
PRO = {**SPOT, "bbox": [100, 20, 140, 30], "group": "Office", "application": "word"}
BENCH = {"image_filename": "a.png", "category": "spatial", "user_input": "Point left.", "mask_filename": "a_mask.png"}
TASKS: dict[str, tuple[str, str, Any, dict[str, str], str]] = {  # folder, list, entry, tags, question
    "screenspot_v2": (
        *("ScreenSpot-v2", "screenspot_web_v2.json", SPOT),
        {"screen": "web", "target": "web-icon"},
        "Find the close button",
    ),
    "screenspot_pro": (
        *("ScreenSpotPro", "annotations/word.json", PRO),
        {"group": "Office", "program": "Office-word"},
        "Find the close button",
    ),
    "point_bench": ("point_arena", "data.json", BENCH, {"category": "spatial"}, "Point left."),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("published")
    for folder, name, entry, *_ in TASKS.values():
        path = root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        first = next(iter(entry))
        absent = {**entry, first: "absent.png"}
        broken = {key: value for key, value in entry.items() if key != first}
        path.write_text(json.dumps([entry, absent, broken]))
    shown = Image.new("RGB", (WIDTH, HEIGHT), "grey")
    mask = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    mask[20:30, 100:140, 1] = 255
    for path, image in (
        ("ScreenSpot-v2/screenspotv2_image/a.png", shown),
        ("ScreenSpotPro/images/a.png", shown),
        ("point_arena/selected_images/spatial/a.png", shown),
        ("point_arena/selected_masks/spatial/a_mask.png", Image.fromarray(mask)),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / path)
    return root


@pytest.fixture(scope="module")
def builder() -> ExampleBuilder:
    return ExampleBuilder(DataConfig(), Molmo2Tokenizer.load("tiny"), training=False)


@pytest.mark.parametrize("name", TASKS)
def test_published_lists_are_questions(root, builder, name):
    _, _, _, tags, text = TASKS[name]
    task = find_task(name)
    items = task.open(TaskSettings(root))
    assert len(items) == 3
    (question,) = items.questions(0, builder)
    assert (question.prompt.question, question.tags) == (text, tags)
    assert question.prompt.example(builder).info["images"][0]["size"] == [WIDTH, HEIGHT]
    (scorer,) = map(find_scorer, task.scorers)
    for point, right in (
        ("600 250", 1),
        ("690 290", 1),
        ("480 250", 0),
        ("600 310", 0),
    ):  # x 120, 138, 96; y 25, 29, 31
        answer = f'<points coords="1 1 {point}">it</points>'
        assert scorer.score(answer, question.references).value == right
    with pytest.raises(UserError, match="absent.png: no such file"):
        items.questions(1, builder)
    with pytest.raises(UserError, match=f":2: not as {task.dataset} is published"):
        items.questions(2, builder)


@pytest.mark.parametrize("name", TASKS)
def test_what_is_missing_is_named(name, tmp_path):
    folder, listed, *_ = TASKS[name]
    with pytest.raises(UserError, match=f"task {name}: no .*{folder}.*; download the data set"):
        find_task(name).open(TaskSettings(tmp_path))
    path = tmp_path / folder / listed
    path.parent.mkdir(parents=True)
    for text, says in (("{", "is not JSON"), ('{"a": 1}', "is no list of objects")):
        path.write_text(text)
        with pytest.raises(UserError, match=says):
            find_task(name).open(TaskSettings(tmp_path))
