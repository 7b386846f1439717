"""Tasks on images whose records `molmo2 prepare NAME --split validation` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.sources import validation
from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.scorers import find_scorer
from molmo2_nemo.evaluation.shard_task import ShardTask
from molmo2_nemo.evaluation.task import Question, TaskSettings
from molmo2_nemo.evaluation.tasks import find_task, task_names
from tests.evaluation.test_point_tasks import png

HUMANS = ["red"] * 7 + ["blue"] * 3
ANNOTATIONS: dict[str, dict[str, Any]] = {  # task -> what the record of its data set asks
    "chartqa": {"style": "chart_qa", "question": "How many?", "answers": ["20"]},
    "docvqa": {"style": "doc_qa", "question": "Which year?", "answers": ["1998", "in 1998"]},
    "infoqa": {"style": "info_qa", "question": "Which year?", "answer": "1998"},
    "stvqa": {"style": "st_qa", "question": "Which word?", "answers": ["stop"]},
    "textvqa": {"style": "text_vqa", "question": "Which colour?", "answers": HUMANS},
    "vqa2": {"style": "vqa2", "question": "Which colour?", "answers": HUMANS},
    "okvqa": {"style": "okvqa", "question": "Which colour?", "answers": HUMANS},
    "aokvqa_da": {"style": "a_okvqa_da", "question": "Which colour?", "answers": HUMANS},
    "aokvqa": {"style": "a_okvqa_mc", "question": "Which?", "options": ["red", "blue"], "answer_idx": 1},
    "ai2d": {"style": "ai2_diagram", "question": "Which?", "options": ["A", "C", "B"], "answer_idx": 2},
    "scienceqa": {"style": "science_qa", "question": "Which?", "options": ["red", "blue"], "answer_idx": 1},
    "tabwmp": {"style": "tabwmp_da", "question": "How many?", "answer": "20"},
    "dvqa": {"style": "dv_qa", "question": "How many?", "answer": "20"},
}
RIGHT = {"chartqa": "21", "docvqa": "1998", "infoqa": "1998", "stvqa": "STOP", "tabwmp": "20", "dvqa": "20"}


@pytest.fixture(scope="module")
def builder() -> ExampleBuilder:
    return ExampleBuilder(DataConfig(), Molmo2Tokenizer.load("tiny"), training=False)


def asked(name: str, annotation: dict[str, Any], root: Path, builder: ExampleBuilder) -> Question:
    """The question of a data set of one record."""
    task = find_task(name)
    assert isinstance(task, ShardTask)
    record = {"images": ["png"], "annotations": [annotation]}
    write_shards(root / task.folder, [("one", {"json": json.dumps(record).encode(), "png": png()})])
    items = task.open(TaskSettings(root))
    assert len(items) == 1
    (question,) = items.questions(0, builder)
    return question


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_a_task_asks_what_its_records_ask(name, tmp_path, builder):
    question = asked(name, ANNOTATIONS[name], tmp_path, builder)
    scorer = find_scorer(find_task(name).scorers[0])
    assert question.scorers == find_task(name).scorers
    scorer.check(question.references)
    choice = "options" in ANNOTATIONS[name]
    right = RIGHT.get(name, "B. blue" if name in ("aokvqa", "scienceqa") else "C. B" if choice else "red")
    wrong = "A. red" if choice else "purple"
    assert scorer.score(right, question.references).value == 1
    assert scorer.score(wrong, question.references).value == 0
    assert ANNOTATIONS[name]["question"] in question.prompt.question
    assert question.prompt.example(builder).input_ids.size > 3


def test_multiple_choice_is_asked_in_the_layout_of_evaluation(tmp_path, builder):
    question = asked("scienceqa", ANNOTATIONS["scienceqa"], tmp_path, builder)
    assert question.prompt.question == "Which?\nOnly return the correct answer option.\nA. red\nB. blue"
    assert question.references == ({"option": "B", "options": ["red", "blue"], "unlabelled": False},)


def test_options_that_are_labels_are_asked_without_letters(tmp_path, builder):
    question = asked("ai2d", ANNOTATIONS["ai2d"] | {"unlabelled_options": True}, tmp_path, builder)
    assert question.prompt.question.endswith("\nA\nC\nB")
    assert find_scorer("nearest_option").score("B", question.references).value == 1
    assert find_scorer("nearest_option").score("C", question.references).value == 0


def test_the_validation_split_of_each_can_be_written():
    tasks = [find_task(name) for name in task_names()]
    for task in tasks:
        if isinstance(task, ShardTask) and "--split validation" in task.prepare:
            source = task.folder.removesuffix("-validation")
            assert source in validation.names() and task.prepare == f"molmo2 prepare {source} --split validation"


def test_records_without_multiple_choice_are_said(tmp_path, builder):
    with pytest.raises(Exception, match="no question of multiple choice"):
        asked("scienceqa", ANNOTATIONS["tabwmp"], tmp_path, builder)


def test_data_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="molmo2 prepare science_qa_img --split validation"):
        find_task("scienceqa").open(TaskSettings(tmp_path))
