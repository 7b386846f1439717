"""Clocks in photographs: tables and images in the published layout."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.scorers import find_scorer
from molmo2_nemo.evaluation.task import TaskSettings
from molmo2_nemo.evaluation.tasks import find_task

TABLES = {
    "coco": ('img_id,file_name,bbox_gt,hour,minute,bbox_det\n64,64.jpg,"[[1, 2, 3]]",6,9,"[1, 2, 3, 4]"\n', "64.jpg"),
    "openimg": ('img_id,file_name,bbox_gt,hour,minute,bbox_det\n0a,0a.jpg,"[]",12,60,"[]"\n', "0a.jpg"),
    "movies": ('img_id,file_name,hour,minute,bbox_det\n0,Amélie 10.42 p.m.png,10,42,"[]"\n', "Amélie 10.42 p.m.png"),
}
IMAGES = {"coco": "coco/trainval_images", "openimg": "openimg/data", "movies": "movies/ClockMovies/images"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for source, (table, name) in TABLES.items():
        folder = tmp_path / "ClockBench" / IMAGES[source]
        folder.mkdir(parents=True)
        (tmp_path / "ClockBench" / f"{source}_final.csv").write_text(table)
        with (folder / unicodedata.normalize("NFD", name)).open("wb") as out:
            Image.new("RGB", (64, 48)).save(out, "PNG")
    return tmp_path


def test_clocks_are_asked_and_scored(root):
    builder = ExampleBuilder(DataConfig(), Molmo2Tokenizer.load("tiny"), training=False)
    items = find_task("clock_bench").open(TaskSettings(root))
    asked = [question for number in range(len(items)) for question in items.questions(number, builder)]
    assert [question.key for question in asked] == ["coco:64", "openimg:0a", "movies:0"]
    assert {question.prompt.example(builder).info["images"][0]["size"][0] for question in asked} == {64}
    scorer = find_scorer("clock")
    for question, right, wrong in zip(asked, ("6:09", "12:00", "10:42 PM"), ("6:10", "11:00", "42:10"), strict=True):
        scores = [scorer.score(answer, question.references) for answer in (right, wrong)]
        assert [score.value for score in scores] == [1, 0]


def test_an_image_that_is_not_there_is_said_when_it_is_asked_about(root):
    builder = ExampleBuilder(DataConfig(), Molmo2Tokenizer.load("tiny"), training=False)
    (root / "ClockBench/coco/trainval_images/64.jpg").unlink()
    (question,) = find_task("clock_bench").open(TaskSettings(root)).questions(0, builder)
    with pytest.raises(UserError, match=r"64\.jpg: no such file"):
        question.prompt.example(builder)


def test_tables_that_are_missing_or_not_as_published(root):
    table = root / "ClockBench" / "movies_final.csv"
    table.write_text("img_id,file_name,hour,minute\n0,a.png,ten,42\n")
    with pytest.raises(UserError, match=r"movies_final\.csv, line 2: expected img_id, file_name, hour and minute"):
        find_task("clock_bench").open(TaskSettings(root))
    table.unlink()
    with pytest.raises(UserError, match=r"no .*movies_final\.csv; put there data/\*\.csv of .*itsabouttime"):
        find_task("clock_bench").open(TaskSettings(root))
