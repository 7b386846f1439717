"""Questions on records: what the model reads is what training had it read before the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import data_prep
from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.record import Record, parse_record
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.records import questions_of
from molmo2_nemo.evaluation.scorers import find_scorer
from molmo2_nemo.inference.generate import first_turn
from tests.support.films import film

MEDIA = Path(data_prep.__file__).parent / "demo_media"
PICTURES = {"0.jpg": MEDIA / "cat.jpg", "1.jpg": MEDIA / "coffee.jpg"}
LINES = [
    {"start": 0.0, "end": 0.3, "text": "first"},
    {"start": 0.7, "end": 0.7, "text": "no time at all"},
    {"start": 1.1, "end": 9.0, "text": "past the clip"},
]
RECORDS: dict[str, dict[str, Any]] = {
    "text": {"annotations": [{"style": "user_qa", "question": "Why?", "answer": "So."}]},
    "picture": {"images": ["0.jpg"], "annotations": [{"style": "long_caption", "text": "A cat."}]},
    "pictures": {
        "images": ["0.jpg", "1.jpg"],
        "annotations": [{"style": "multi_image_pointing", "label": "eye", "points": [[[1, 2]], []]}],
    },
    "choice": {
        "images": ["1.jpg"],
        "annotations": [{"style": "a_okvqa_mc", "question": "Which?", "options": ["a", "b"], "answer_idx": 1}],
    },
    "points": {
        "images": ["0.jpg"],
        "annotations": [{"style": "point_count", "label": "eyes", "points": [[3, 4], [5, 6]]}],
    },
    "film": {"video": "mp4", "annotations": [{"style": "video_short_answer", "question": "Who?", "answer": "I"}]},
    "clip and subtitles": {
        "video": "mp4",
        "clip": [0.7, 2.6],
        "subtitles": LINES,
        "annotations": [{"style": "user_qa", "question": "Who?", "answer": "I"}],
    },
    "clip and a text": {
        "video": "mp4",
        "clip": [0.7, 2.6],
        "subtitles": "all that is said",
        "annotations": [{"style": "video_multiple_choice", "question": "Q", "options": ["x", "y"], "answer_idx": 0}],
    },
    "sampling": {
        "video": "mp4",
        "sampling": {"max_frames": 3},
        "annotations": [{"style": "video_point", "label": "it", "timestamps": [0.5], "points": [[[1, 1]]]}],
    },
}


def built(content: dict[str, Any]) -> tuple[Record, ExampleBuilder]:
    members = {"json": json.dumps(content).encode(), "mp4": film(90)}
    members |= {name: path.read_bytes() for name, path in PICTURES.items() if name in content.get("images", ())}
    used = {"json", *content.get("images", ()), *([content["video"]] if "video" in content else [])}
    config = DataConfig(vocab_size=1024)
    tokenizer = Molmo2Tokenizer.load("tiny", vocab_size=1024)
    record = parse_record("r", {name: data for name, data in members.items() if name in used})
    return record, ExampleBuilder(config, tokenizer, training=False)


@pytest.mark.parametrize("name", RECORDS)
def test_the_model_reads_what_training_had_it_read(name):
    """But for the wording of points, which is drawn: the same draw is taken."""
    record, builder = built(RECORDS[name])
    (question,) = questions_of(record, builder)
    trained = builder.build(record, np.random.default_rng(0))
    before, _ = first_turn(trained)
    asked = question.prompt.example(builder)
    assert asked.input_ids.tolist() == before.input_ids.tolist()
    assert asked.position_ids.tolist() == before.position_ids.tolist()
    assert np.array_equal(asked.crops, before.crops) and np.array_equal(asked.pooling, before.pooling)


def test_later_turns_follow_the_turns_before_them():
    turns = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(3)]
    record, builder = built({"annotations": [{"style": "user_qa", "turns": turns}]})
    questions = questions_of(record, builder)
    trained = builder.build(record, np.random.default_rng(0))
    ends = np.flatnonzero((trained.loss_weights > 0) & (np.roll(trained.loss_weights, 1) == 0))
    for question, end in zip(questions, ends, strict=True):
        assert question.prompt.example(builder).input_ids.tolist() == trained.input_ids[: end + 1].tolist()


def test_raw_text_asks_nothing():
    record, builder = built({"annotations": [{"style": "raw_text", "text": "A document."}]})
    with pytest.raises(UserError, match="record r: raw text asks nothing"):
        questions_of(record, builder)


CHOICE = {"style": "a_okvqa_mc", "question": "Which?", "options": ["a dog", "a cat"], "answer_idx": 1}


@pytest.mark.parametrize(
    ("more", "right", "wrong"),
    [
        ({}, ("B", "(b)", "B. a cat", "A cat."), ("A", "a dog", "C", "")),
        ({"unlabelled_options": True}, ("a cat",), ("B", "a dog")),
    ],
)
def test_multiple_choice_is_scored_by_letter_and_text(more, right, wrong):
    record, builder = built({"annotations": [CHOICE | more]})
    (question,) = questions_of(record, builder)
    (scorer,) = map(find_scorer, question.scorers)
    assert scorer.name == "multiple_choice"
    assert [scorer.score(answer, question.references).value for answer in right] == [1] * len(right)
    assert [scorer.score(answer, question.references).value for answer in wrong] == [0] * len(wrong)
