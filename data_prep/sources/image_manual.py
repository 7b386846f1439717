"""Academic image sets to download by hand: documents, scene text, diagrams, rendered charts and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from data_prep.sources import shapes
from data_prep.sources.base import (
    AnnotationJson,
    Context,
    File,
    Lettered,
    Manual,
    Media,
    Row,
    Sample,
    Skip,
    Source,
    Table,
    maybe,
    number,
)
from data_prep.sources.common import questions, tree
from data_prep.sources.schema import one_of
from molmo2_nemo.errors import DataError

Records = Callable[[Iterable[Row], Context], Iterator[Sample | Skip]]

MIX = {"sft": "image_academic"}
RRC = "https://rrc.cvc.uab.es"


def _numpy_order(count: int, seed: int) -> list[int]:
    """0 .. count-1 as shuffled by NumPy's legacy generator, which the published splits were made with."""
    import numpy as np

    order = list(range(count))
    np.random.RandomState(seed).shuffle(order)
    return order


def _single(key: str, question: str, answers: Any, style: str, media: Media) -> Iterator[Sample | Skip]:
    return tree(key, questions(key, [question], [answers], style), [media])


# --- rrc.cvc.uab.es --------------------------------------------------------------------------------------------------


def _doc_qa(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    for row in rows:
        key = str(row["questionId"])
        if row["data_split"] != ("val" if ctx.validation else "train"):
            yield Skip(key, "of another split", row["data_split"])
        else:
            yield from _single(key, row["question"], row["answers"], "doc_qa", File(row["image"]))


def _info_qa(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    for row in rows:
        media = File(f"images/{row['image_local_name']}")
        yield from _single(str(row["questionId"]), row["question"], row["answers"], "info_qa", media)


ST_HELD_OUT, ST_SEED = 1024, 63069


def _scene_text(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    ordered = sorted(rows, key=lambda row: row["question_id"])
    order = _numpy_order(len(ordered), ST_SEED)
    count = min(ST_HELD_OUT, len(ordered) // 10)
    for place in order[:count] if not ctx.validation else ():
        yield Skip(str(ordered[place]["question_id"]), "held out for validation")
    for place in sorted(order[:count] if ctx.validation else order[count:]):
        row = ordered[place]
        media = File(row["file_path"])
        yield from _single(str(row["question_id"]), row["question"], row["answers"], "st_qa", media)


# --- AI2D ------------------------------------------------------------------------------------------------------------

AI2D_HELD_OUT, AI2D_SEED = 384, 5961
AI2D_LETTERS = Table("annotations/*.json", at=("text",))
AI2D_TEST = Table(
    "ai2d_test_ids.csv",
    header=("image_id",),
    url="https://s3-us-east-2.amazonaws.com/prior-datasets/ai2d_test_ids.csv",
)
Boxes = tuple[tuple[str, float, float, float, float], ...]  # letter, left, top, right, bottom in pixels


def _ai2d(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    test = {int(row["image_id"]) for row in ctx.rows(AI2D_TEST)}
    boxes: dict[str, list[Any]] = {}
    for box in ctx.rows(AI2D_LETTERS):
        boxes.setdefault(_named_after(box["__table__"]), []).append(box)
    by_image: dict[int, list[Row]] = {}
    for row in rows:
        number_ = int(_named_after(row["__table__"]).split(".")[0])
        if number_ in test:
            yield Skip(row["questionId"], "image of the test split")
        else:
            by_image.setdefault(number_, []).append(row)
    images = sorted(by_image)
    order = _numpy_order(len(images), AI2D_SEED)
    held = {images[place] for place in order[: min(AI2D_HELD_OUT, len(images) // 10)]}
    for name in sorted(held) if not ctx.validation else ():
        for row in by_image[name]:
            yield Skip(row["questionId"], "held out for validation")
    for name in sorted(held if ctx.validation else set(by_image) - held):
        for row in by_image[name]:
            yield from _ai2d_samples(row, boxes)


def _named_after(table: str) -> str:
    """`questions/12.png.json` -> `12.png`."""
    return PurePosixPath(table).name.removesuffix(".json")


def _ai2d_samples(row: Row, boxes: dict[str, list[Any]]) -> Iterator[Sample | Skip]:
    name, key = _named_after(row["__table__"]), row["questionId"]
    plain = File(f"images/{name}")
    places = _boxes(boxes.get(name, ()))
    letters = {letter for letter, *_ in places}
    try:
        made = ai2d_choice(row, letters)
    except DataError as error:
        yield Skip(key, "no such option", str(error))
        return
    if not row["abcLabel"]:
        yield Sample(key, [made], images=[plain])
        return
    if not places:
        yield Skip(key, "no boxes for letters", name)
        return
    yield Sample(key, [made], images=[Lettered(plain, places)])
    yield Sample(f"{key}_transparent", [made], images=[Lettered(plain, places, beside=True)])


def _boxes(found: Sequence[Any]) -> Boxes:
    return tuple((box["replacementText"], *(float(v) for corner in box["rectangle"] for v in corner)) for box in found)  # type: ignore[misc]


def ai2d_choice(row: Row, letters: set[str]) -> AnnotationJson:
    """The multiple-choice annotation of a question. Options `{}` are dropped, and equal options are merged.

    Where all options but at most one are letters in the image, they get no further labels.

    Raises:
        DataError: the right answer is not among the options.
    """
    texts = row["answerTexts"]
    if not 0 <= row["correctAnswer"] < len(texts) or texts[row["correctAnswer"]] == "{}":
        raise DataError(f"answer {row['correctAnswer']} of {texts}")
    options = list(dict.fromkeys(text for text in texts if text != "{}"))
    right = options.index(texts[row["correctAnswer"]])
    is_letter = [option.upper() in letters for option in options]
    if row["abcLabel"] and sum(is_letter) >= len(options) - 1:
        named = [option.upper() if letter else option for option, letter in zip(options, is_letter, strict=True)]
        return shapes.choice(row["__key__"], named, right, "ai2_diagram_no_letter", unlabelled=True)
    return shapes.choice(row["__key__"], options, right, "ai2_diagram")


# --- rendered charts and tables --------------------------------------------------------------------------------------


def _tables(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    for row in rows:
        key = row["__key__"]
        if row["split"] != ("dev" if ctx.validation else "train"):
            yield Skip(key, "of another split", row["split"])
        else:
            yield from _single(key, row["question"], row["answer"], "tabwmp_da", File(f"tables/{key}.png"))


def _by_image(image: str, question: str, style: str, path: str) -> Records:
    """Rows of one question each, grouped by the column `image`; `path` has {} where its value goes."""

    def records(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
        for key, group in ctx.grouped(rows, image):
            answers = [None if row["answer"] is None else str(row["answer"]) for row in group]
            branches = questions(key, [row[question] for row in group], answers, style)
            yield from tree(key, branches, [File(path.format(key))])

    return records


def _rrc(
    name: str, fetch: str, table: str, media: str, more: dict[str, Any], records: Records, notes: str = ""
) -> Source:
    """A challenge of the Robust Reading Competition: a JSON file with `data`, and its images."""
    return Source(
        name=name,
        mixes=MIX,
        kind="image, question and answer",
        origin=Manual(fetch, tables=(Table(table, at=("data",)),), media=(media,)),
        licence="terms of the competition (registration)",
        fields={"question": str, "answers": [str], **more},
        records=records,
        notes=notes,
    )


QUESTION_ID = one_of(int, str)
CHART_FIELDS = {"image_index": int, "question_string": str}

SOURCES = (
    _rrc(
        "doc_qa",
        f"Register at {RRC}/?ch=17 and download task 1 (Single Page Document VQA): train_v1.0_withQT.json and the"
        " documents",
        "train_v1.0_withQT.json",
        "documents/NAME.png",
        {"questionId": QUESTION_ID, "image": str, "data_split": str},
        _doc_qa,
    ),
    _rrc(
        "info_qa",
        f"Register at {RRC}/?ch=17 and download task 3 (Infographics VQA): infographicsVQA_train_v1.0.json, images",
        "infographicsVQA_train_v1.0.json",
        "images/NAME.jpeg",
        {"questionId": QUESTION_ID, "image_local_name": str},
        _info_qa,
    ),
    _rrc(
        "st_qa",
        f"Register at {RRC}/?ch=11 and download task 3 of ST-VQA: train_task_3.json and the images",
        "train_task_3.json",
        "the files that `file_path` in the JSON names, e.g. coco-text/COCO_train2014_000000000001.jpg",
        {"question_id": QUESTION_ID, "file_path": str},
        _scene_text,
        "1,024 questions are held out for validation, the same as in the published split.",
    ),
    Source(
        name="ai2_diagram_v2_mix_transparent",
        mixes=MIX,
        kind="image, multiple choice",
        origin=Manual(
            "Download and unpack https://ai2-website.s3.amazonaws.com/data/ai2d-all.zip; --source is the folder ai2d in"
            f" it. The ids of the test images ({AI2D_TEST.path}) are fetched if they are not there",
            tables=(Table("questions/*.json", at=("questions",)),),
            media=("images/ID.png", "annotations/ID.png.json"),
        ),
        licence="CC BY-SA 4.0",
        fields={
            "__key__": str,
            "__table__": str,
            "questionId": str,
            "abcLabel": bool,
            "answerTexts": [str],
            "correctAnswer": int,
        },
        records=_ai2d,
        notes="Questions about letters come twice: with opaque boxes over the texts, and with transparent boxes and the"
        " letter beside. The font differs from the published one. Test images and 384 others are held out, the same as"
        " in the published split.",
    ),
    Source(
        name="tabwmp_da",
        mixes=MIX,
        kind="image, question and answer",
        origin=Manual(
            "Download data/tabmwp of https://github.com/lupantech/PromptPG",
            tables=(Table("problems_train.json"),),
            media=("tables/ID.png",),
        ),
        licence="CC BY-NC-SA 4.0",
        fields={"__key__": str, "question": str, "answer": one_of(str, number), "split": str},
        records=_tables,
        notes="Direct answers: the choices that some questions have are not shown, as published.",
    ),
    Source(
        name="dv_qa",
        mixes=MIX,
        kind="image, question and answer",
        origin=Manual(
            "Download questions and images of DVQA (https://github.com/kushalkafle/DVQA_dataset)",
            tables=(Table("train_qa.json"),),
            media=("images/bar_train_NUMBER.png",),
        ),
        licence="CC BY-NC 4.0",
        fields={"image": str, "question": str, "answer": maybe(one_of(str, number))},
        records=_by_image("image", "question", "dv_qa", "images/{}"),
    ),
    Source(
        name="figure_qa",
        mixes=MIX,
        kind="image, question and answer",
        origin=Manual(
            "Download and unpack figureqa-train1-v1.tar.gz of FigureQA (https://www.microsoft.com/en-us/research/project/"
            "figureqa-dataset); --source is the folder train1 in it",
            tables=(Table("qa_pairs.json", at=("qa_pairs",)),),
            media=("png/NUMBER.png",),
        ),
        licence="Microsoft research licence",
        fields={**CHART_FIELDS, "answer": maybe(int)},
        records=_by_image("image_index", "question_string", "figure_qa", "png/{}.png"),
        notes="Answers are the digits 0 (no) and 1 (yes), as published.",
    ),
    Source(
        name="plot_qa",
        mixes=MIX,
        kind="image, question and answer",
        origin=Manual(
            "Download the training images and annotations of PlotQA (https://github.com/NiteshMethani/PlotQA). The"
            " published builder takes one file of annotations; put qa_pairs_V1.json or qa_pairs_V2.json there as"
            " qa_pairs.json",
            tables=(Table("qa_pairs.json", at=("qa_pairs",)),),
            media=("png/NUMBER.png",),
        ),
        licence="CC BY 4.0",
        fields={**CHART_FIELDS, "answer": one_of(str, number, [one_of(str, number)])},
        records=_by_image("image_index", "question_string", "plot_qa", "png/{}.png"),
        notes="Numbers are learned as Python writes them. Which of the two versions of the questions was used is not"
        " published by name.",
    ),
)
