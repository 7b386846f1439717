"""Academic image sets with annotations on the Hugging Face Hub; most of their images are COCO's or Visual Genome's.

Image paths of the allenai/molmo2-* sets are relative to the folder that the official downloader fills, so a --source
made by it works as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from data_prep.sources import shapes
from data_prep.sources.base import AnnotationJson, Context, Hub, Row, Sample, Skip, Source, column_media, maybe
from data_prep.sources.common import answer_text, local, questions, tree
from data_prep.sources.schema import image, one_of

Records = Callable[[Iterable[Row], Context], Iterator[Sample | Skip]]

COCO_2014 = "COCO 2014 train and val images as images/coco/train2014/ and images/coco/val2014/ (cocodataset.org)"
COCO_2017 = "COCO 2017 train images as images/coco/train2017/ (cocodataset.org)"
GENOME = "Visual Genome images as images/vg/VG_100K/ and images/vg/VG_100K_2/ (visualgenome.org)"
COCO_LICENCE = "CC BY 4.0; images under the licences of Flickr's users"


# --- message lists: one row is one image with its questions ---------------------------------------------------------


def _message_list(style: str) -> Records:
    def records(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
        for place, row in enumerate(rows):
            key = f"{place:08d}"
            asked = [message["question"] for message in row["message_list"]]
            answers = [_answers(message) for message in row["message_list"]]
            yield from tree(key, questions(key, asked, answers, style), [local(row["image"])])

    return records


def _answers(message: Mapping[str, Any]) -> Any:
    """The answers of several annotators, or the single answer."""
    several = message.get("answers")
    return several if several is not None else message.get("answer")


def _flat_okvqa(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    for row in rows:
        for asked in row["qas"]:
            key = str(asked["question_id"])
            answers = [[answer["raw_answer"] for answer in asked["answers"]]]
            yield from tree(key, questions(key, [asked["question"]], answers, "okvqa"), [local(row["image"])])


def _a_okvqa(branch: Callable[[str, Row], AnnotationJson | Skip]) -> Records:
    def records(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
        for place, row in enumerate(rows):
            key = f"{place:08d}"
            branches = (branch(f"{key}#{i}", message) for i, message in enumerate(row["message_list"]))
            yield from tree(key, branches, [local(row["image"])])

    return records


def _direct_answer(key: str, message: Row) -> AnnotationJson | Skip:
    answers = answer_text(message["direct_answers"] or [])
    return shapes.qa(message["question"], answers, "a_okvqa_da") if answers else Skip(key, "empty answer")


def _one_of_the_choices(key: str, message: Row) -> AnnotationJson | Skip:
    if message["answer_idx"] is None:
        return Skip(key, "no such option", "no answer_idx")
    return shapes.choice(message["question"], message["choices"], message["answer_idx"], "a_okvqa_mc")


# --- one row, one question -------------------------------------------------------------------------------------------

# Questions by people and by programs, of 28,299; the weights make both kinds contribute equally in sum.
HUMAN, MACHINE = 7398, 20901
CHART_WEIGHTS = {0: 2 * MACHINE / (HUMAN + MACHINE), 1: 2 * HUMAN / (HUMAN + MACHINE)}


def _chart_qa(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    for place, row in enumerate(rows):
        key, answers = f"{place:08d}", answer_text(row["label"])
        if not answers:
            yield Skip(key, "empty answer", row["query"])
            continue
        made = shapes.qa(row["query"], answers, "chart_qa")
        factor = CHART_WEIGHTS[row["human_or_machine"]]
        yield Sample(key, [made], images=[column_media(row["image"])], weight_factor=factor)


def _science_qa(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    for place, row in enumerate(rows):
        key = f"{place:08d}"
        if row["image"] is None:
            yield Skip(key, "no image")
            continue
        question = f"{row['hint']}\n{row['question']}" if row.get("hint") else row["question"]
        made = shapes.choice(question, row["choices"], row["answer"], "science_qa")
        yield Sample(key, [made], images=[column_media(row["image"])])


def _message_source(name: str, repo: str, style: str, media: str, licence: str) -> Source:
    """A data set of allenai with a `message_list`; its training part is the configuration `train`."""
    messages = [{"question": str, "answers": maybe([maybe(str)]), "answer": maybe(one_of(str, int))}]
    return Source(
        name=name,
        mixes={"sft": "image_academic"},
        kind="image, question and answer",
        origin=Hub(repo, configs=("train",), media=media),
        licence=licence,
        fields={"image": str, "message_list": messages},
        records=_message_list(style),
        notes="The most frequent of several answers is learned (of equally frequent ones a random one per access).",
    )


A_OKVQA = Hub("allenai/molmo2-a-ok-vqa", configs=("train",), media=COCO_2017)

SOURCES = (
    _message_source("coco_2014_vqa_multi", "allenai/molmo2-vqa2-2014", "vqa2", COCO_2014, COCO_LICENCE),
    _message_source(
        "text_vqa",
        "allenai/molmo2-text-vqa",
        "text_vqa",
        "TextVQA images as text_vqa/train_images/ (textvqa.org, train_val_images.zip)",
        "CC BY 4.0; images of Open Images, CC BY 2.0",
    ),
    Source(
        name="okvqa",
        mixes={"sft": "image_academic"},
        kind="image, question and answer",
        origin=Hub("allenai/molmo2-okvqa", configs=("train",), media=COCO_2014),
        licence=COCO_LICENCE,
        fields={
            "image": str,
            "qas": [{"question": str, "question_id": one_of(str, int), "answers": [{"raw_answer": maybe(str)}]}],
        },
        records=_flat_okvqa,
        notes="One sample per question, as published, not one per image.",
    ),
    Source(
        name="chart_qa_weighted",
        mixes={"sft": "image_academic"},
        kind="image, question and answer",
        origin=Hub("HuggingFaceM4/ChartQA"),
        licence="GPL 3.0",
        fields={"image": image, "query": str, "label": [str], "human_or_machine": int},
        records=_chart_qa,
        notes="Loss weights are multiplied by 1.4772 (questions by people) or 0.5228 (by programs), so that both count"
        " alike.",
    ),
    Source(
        name="a_okvqa_mc",
        mixes={"sft": "image_academic"},
        kind="image, multiple choice",
        origin=A_OKVQA,
        licence=f"Apache 2.0; {COCO_LICENCE}",
        fields={
            "image": str,
            "message_list": [{"question": str, "choices": [str], "answer_idx": maybe(int)}],
        },
        records=_a_okvqa(_one_of_the_choices),
    ),
    Source(
        name="a_okvqa_da",
        mixes={"sft": "image_academic"},
        kind="image, question and answer",
        origin=A_OKVQA,
        licence=f"Apache 2.0; {COCO_LICENCE}",
        fields={"image": str, "message_list": [{"question": str, "direct_answers": maybe([maybe(str)])}]},
        records=_a_okvqa(_direct_answer),
    ),
    Source(
        name="science_qa_img",
        mixes={"sft": "image_academic"},
        kind="image, multiple choice",
        origin=Hub("derek-thomas/ScienceQA"),
        licence="CC BY-SA 4.0",
        fields={"image": maybe(image), "question": str, "hint": maybe(str), "choices": [str], "answer": int},
        records=_science_qa,
        notes="Rows without an image are left out; the hint, if there is one, goes before the question.",
    ),
    _message_source(
        "tally_qa",
        "allenai/molmo2-tally-qa",
        "tally_qa",
        f"{COCO_2014}; {GENOME}",
        "Apache 2.0; images of COCO and Visual Genome (CC BY 4.0)",
    ),
)
