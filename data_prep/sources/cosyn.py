"""CoSyn and Molmo2-SynMultiImageQA: images rendered by code, with questions, explanations and points."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from data_prep.sources import shapes
from data_prep.sources.base import AnnotationJson, Context, Hub, Row, Sample, Skip, Source, column_media, maybe
from data_prep.sources.common import COORDINATES, DIFFERENT_LENGTHS, coordinates, pairs, parallel, questions, tree
from data_prep.sources.schema import image

LICENCE = "ODC-BY 1.0; images are synthetic"
MAX_IMAGES = 5
# The published mixture omits circuit and graphic for their quality, and keeps nutrition for evaluation.
EXPLAINED = ("chart", "chemical", "diagram", "math", "music", "table")
MULTIDOC = ("chart", "chemical", "diagram", "doc", "music", "table")

Records = Callable[[Iterable[Row], Context], Iterator[Sample | Skip]]


def _questions(key: str, row: Row, style: str, explained: bool) -> Iterator[AnnotationJson | Skip]:
    asked, answers = parallel(row["qa_pairs"], "question", "answer")
    explanations = parallel(row["qa_pairs"], "explanation")[0] if explained else None
    return questions(key, asked, answers, style, explanations=explanations)


def _single(style: str, explained: bool) -> Records:
    def records(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
        for row in rows:
            yield from tree(row["id"], _questions(row["id"], row, style, explained), [column_media(row["image"])])

    return records


def _several(style: str) -> Records:
    def records(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
        for row in rows:
            if row["metadata"]["num_images"] > MAX_IMAGES:
                yield Skip(row["id"], f"more than {MAX_IMAGES} images", str(row["metadata"]["num_images"]))
                continue
            images = [column_media(value) for value in row["images"]]
            yield from tree(row["id"], _questions(row["id"], row, style, explained=True), images)

    return records


def _points(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    for row in rows:
        yield from tree(row["id"], _pointed(row), [column_media(row["image"])])


def _pointed(row: Row) -> Iterator[AnnotationJson | Skip]:
    names = row.get("names") or row["questions"]  # early versions of the set have no names
    if not len(row["questions"]) == len(row["answer_points"]) == len(names):
        yield Skip(row["id"], DIFFERENT_LENGTHS)
        return
    for i, (question, where, name) in enumerate(zip(row["questions"], row["answer_points"], names, strict=True)):
        found = coordinates(where)
        if found:
            yield shapes.points(name, found, "cosyn_point", question=question)
        else:
            yield Skip(f"{row['id']}#{i}", "no points")


EXPLAINED_PAIRS = pairs("question", "explanation", "answer")
PLAIN_PAIRS = pairs("question", "answer")


def _cosyn(name: str, config: str, style: str, explained: bool) -> Source:
    return Source(
        name=name,
        mixes={"sft": "image_academic"},
        kind="image, question and answer" + (" with explanation" if explained else ""),
        origin=Hub("allenai/CoSyn-400K", configs=(config,)),
        licence=LICENCE,
        fields={"id": str, "image": image, "qa_pairs": EXPLAINED_PAIRS if explained else PLAIN_PAIRS},
        records=_single(style, explained),
    )


SOURCES = (
    *(_cosyn(f"cosyn_{kind}_exp", kind, f"cosyn_{kind}_exp", explained=True) for kind in EXPLAINED),
    _cosyn("cosyn_document", "document", "cosyn_document", explained=False),
    Source(
        name="cosyn_point",
        mixes={"pretrain": "pointing", "sft": "image_pointing"},
        kind="image, points",
        origin=Hub("allenai/CoSyn-point"),
        licence=LICENCE,
        fields={
            "id": str,
            "image": image,
            "questions": [str],
            "answer_points": [COORDINATES],
            "names": maybe([str]),
        },
        records=_points,
        notes="A version of the set without `names` uses the question as the label.",
    ),
    *(
        Source(
            name=f"cosyn_multidoc_{kind}_exp",
            mixes={"sft": "image_academic"},
            kind="several images, question and answer with explanation",
            origin=Hub("allenai/Molmo2-SynMultiImageQA", configs=(kind,)),
            licence=LICENCE,
            fields={"id": str, "images": [image], "qa_pairs": EXPLAINED_PAIRS, "metadata": {"num_images": int}},
            records=_several(f"cosyn_{kind}_exp"),
            notes=f"Rows of more than {MAX_IMAGES} images are left out.",
        )
        for kind in MULTIDOC
    ),
)
