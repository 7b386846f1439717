"""Academic image sets of the Hub: rows in their published schema -> samples."""

import math

import pytest

from data_prep.sources.base import File, Inline
from tests.support.source_rows import conversations, only, png, prepare, reasons

COCO = "images/coco/train2014/COCO_train2014_000000000009.jpg"
IMAGE = {"bytes": png(), "path": None}


@pytest.mark.parametrize(("name", "style"), [("coco_2014_vqa_multi", "vqa2"), ("text_vqa", "text_vqa")])
def test_several_answers(name, style):
    row = {
        "image": COCO,
        "metadata/image_id": 9,
        "message_list": [
            {"question": "What is it?", "answers": ["cake"] * 3 + ["bread", ""], "question_id": 1, "style": style},
            {"question": "Where?", "answers": ["", None], "question_id": 2, "style": style},
        ],
    }
    samples, skips = prepare(name, [row, {**row, "message_list": row["message_list"][1:]}])
    sample = only(samples)
    assert list(sample.images) == [
        File(COCO, COCO.removeprefix("images/"), "train2014/COCO_train2014_000000000009.jpg")
    ]
    assert sample.annotations == [
        {"style": style, "question": "What is it?", "answers": ["cake", "cake", "cake", "bread"]}
    ]
    assert reasons(skips) == {"00000000#1": "empty answer", "00000001#0": "empty answer"}
    assert conversations(sample) == [[(f"{style}: What is it?", "cake")]]


def test_tally_qa_answers_with_a_number():
    row = {
        "image": "images/vg/VG_100K/2.jpg",
        "message_list": [
            {"question": "How many dogs?", "answer": 0},
            {"question": "How many cats?", "answer": "3", "answers": None},
        ],
    }
    sample = only(prepare("tally_qa", [row])[0])
    assert sample.annotations[0] == {"style": "tally_qa", "question": "How many dogs?", "answer": "0"}
    assert [("tally_qa: How many cats?", "3")] in conversations(sample)


def test_okvqa_has_a_sample_per_question():
    asked = {"question": "Which sport?", "question_id": 51, "answers": [{"raw_answer": "race"}, {"raw_answer": "race"}]}
    row = {"image": COCO, "image_id": 5, "qas": [asked, {**asked, "question_id": 52, "answers": []}]}
    samples, skips = prepare("okvqa", [row])
    assert only(samples).key == "51" and only(samples).annotations[0]["answers"] == ["race", "race"]
    assert reasons(skips) == {"52#0": "empty answer"}
    assert conversations(only(samples)) == [[("okvqa: Which sport?", "race")]]


A_OKVQA = {
    "image": "images/coco/train2017/000000299207.jpg",
    "message_list": [
        {
            "question": "What is the man by the bags awaiting?",
            "question_id": "22MexNkBPpdZGX6sxbxVBH",
            "choices": ["skateboarder", "train", "delivery", "cab"],
            "answer_idx": 3,
            "direct_answers": ["ride", "ride", "bus", "cab"],
            "difficult_direct_answer": False,
        },
        {"question": "And?", "choices": ["a"], "answer_idx": None, "direct_answers": None},
    ],
}


def test_a_okvqa_multiple_choice():
    samples, skips = prepare("a_okvqa_mc", [A_OKVQA])
    assert only(samples).annotations == [
        {
            "style": "a_okvqa_mc",
            "question": "What is the man by the bags awaiting?",
            "options": ["skateboarder", "train", "delivery", "cab"],
            "answer_idx": 3,
        }
    ]
    assert reasons(skips) == {"00000000#1": "no such option"}
    ((asked, _),) = only(conversations(only(samples)))
    assert all(option in asked for option in ("skateboarder", "train", "delivery", "cab"))


def test_a_okvqa_direct_answers():
    samples, skips = prepare("a_okvqa_da", [A_OKVQA])
    ((asked, answer),) = only(conversations(only(samples)))
    assert asked == "a_okvqa_da: What is the man by the bags awaiting?" and answer == "ride"
    assert reasons(skips) == {"00000000#1": "empty answer"}


def test_chart_qa_weighs_people_and_programs_alike():
    row = {"image": IMAGE, "query": "What is the value?", "label": ["14"], "human_or_machine": 0}
    samples, skips = prepare("chart_qa_weighted", [row, {**row, "human_or_machine": 1}, {**row, "label": []}])
    human, machine = samples
    assert human.annotations == [{"style": "chart_qa", "question": "What is the value?", "answers": ["14"]}]
    assert human.weight_factor == pytest.approx(1.4772, abs=1e-4)
    assert machine.weight_factor == pytest.approx(0.5228, abs=1e-4)
    assert math.isclose(7398 * human.weight_factor, 20901 * machine.weight_factor)
    assert only(skips).reason == "empty answer" and human.weight is None
    assert conversations(human) == [[("chart_qa: What is the value?", "14")]]


def test_science_qa_needs_an_image_and_puts_the_hint_first():
    row = {"image": IMAGE, "question": "Which?", "hint": "Look.", "choices": ["yes", "no"], "answer": 1}
    samples, skips = prepare("science_qa_img", [row, {**row, "hint": ""}, {**row, "image": None}])
    assert [sample.annotations[0]["question"] for sample in samples] == ["Look.\nWhich?", "Which?"]
    assert samples[0].annotations[0]["answer_idx"] == 1 and list(samples[0].images) == [Inline(png())]
    assert reasons(skips) == {"00000002": "no image"}
