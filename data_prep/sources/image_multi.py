"""Several images in one sample: Molmo2-MultiImageQA, points in several images, Mantis-Instruct."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath

from data_prep.sources import shapes
from data_prep.sources.base import (
    AnnotationJson,
    ArchiveMember,
    Context,
    File,
    FirstOf,
    Hub,
    HubFile,
    Media,
    Row,
    Sample,
    Skip,
    Source,
    maybe,
)
from data_prep.sources.common import (
    COORDINATES,
    DIFFERENT_LENGTHS,
    coordinates,
    pairs,
    parallel,
    questions,
    tree,
    url_hash,
    web_image,
)
from data_prep.sources.pixmo import NO_POINTING_NOTE

Records = Callable[[Iterable[Row], Context], Iterator[Sample | Skip]]

MAX_IMAGES = 5
SEES_FIVE = f"Training reads the first {MAX_IMAGES} images of a sample."

# --- Molmo2-MultiImageQA ---------------------------------------------------------------------------------------------


def _human_questions(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    for place, row in enumerate(rows):
        key, urls = f"{place:08d}", row["image_urls"]
        if not 2 <= len(urls) <= MAX_IMAGES:
            yield Skip(key, f"not 2 to {MAX_IMAGES} images", str(len(urls)))
            continue
        asked, answers = parallel(row["qa_pairs"], "question", "answer")
        branches = questions(key, asked, answers, "correction_qa", no_pointing=True)
        yield from tree(key, branches, [web_image(url) for url in urls])


# --- points in several images --------------------------------------------------------------------------------------

POINT_STYLES = ("multi_image_pointing", "multi_image_point_then_count")
PIXMO_URLS = Hub("allenai/pixmo-points", columns=("image_url",))


def _multi_points(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    urls = {url_hash(row["image_url"]): row["image_url"] for row in ctx.rows(PIXMO_URLS)}
    for place, row in enumerate(rows):
        key = f"{place:08d}"
        if not len(row["images"]) == len(row["labels"]) == len(row["normalized_labels"]) == len(row["points"]):
            yield Skip(key, DIFFERENT_LENGTHS)
            continue
        images = [_pixmo_image(path, urls) for path in row["images"]]
        variants = [[annotation] for annotation in multi_image_annotations(row)]
        yield Sample(key, images=images, variants=variants)


def _pixmo_image(path: str, urls: dict[str, str]) -> Media:
    """The web image whose file `pixmo_images/HASH` the row names."""
    name = PurePosixPath(path).name
    return web_image(urls[name]) if name in urls else File(path)


def multi_image_annotations(row: Row) -> list[AnnotationJson]:
    """One annotation for each normalized label and style; training draws one per access.

    Every image has one label. Images with the same normalized label count as showing the same thing, which gets the
    label of the first of them.
    """
    found: dict[str, str] = {}
    for normalized, label in zip(row["normalized_labels"], row["labels"], strict=True):
        found.setdefault(normalized, label)
    made = []
    for normalized, label in found.items():
        pairs = zip(row["normalized_labels"], row["points"], strict=True)
        where = [coordinates(points) if name == normalized else [] for name, points in pairs]
        for style in POINT_STYLES:
            made.append({**shapes.image_points(label, where, style), "label_cased": label})
    return made


# --- Mantis-Instruct -------------------------------------------------------------------------------------------------


def _mantis(name: str) -> Records:
    archive = HubFile("TIGER-Lab/Mantis-Instruct", f"{name}/train_images.zip")

    def records(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
        for place, row in enumerate(rows):
            key = f"{place:08d}"
            if len(row["images"]) < 2:
                yield Skip(key, "a single image", str(row["example_id"]))
                continue
            images = [_mantis_image(path, archive) for path in row["images"]]
            yield from tree(key, _mantis_choices(key, row), images)

    return records


def _mantis_image(path: str, archive: HubFile) -> Media:
    """`mantis-instruct/NAME/train_images/REST` below --source, or the member REST of the archive."""
    rest = path.split("train_images/", 1)[-1]
    return FirstOf(File(path), ArchiveMember(archive, rest))


def _mantis_choices(key: str, row: Row) -> Iterator[AnnotationJson | Skip]:
    asked, options, right = row["mc_question"], row["choices"], row["correct_choice_idx"]
    if not len(asked) == len(options) == len(right):
        yield Skip(key, DIFFERENT_LENGTHS)
        return
    for i, (question, choices, answer) in enumerate(zip(asked, options, right, strict=True)):
        if choices and 0 <= answer < len(choices):
            yield shapes.choice(question, choices, answer, "mantis_instruct_mc", shuffle=True)
        else:
            yield Skip(f"{key}#{i}", "no such option", f"{answer} of {len(choices)}")


SOURCES = (
    Source(
        name="pixmo_multi_image_qa_multi_only_max5",
        mixes={"sft": "demo"},
        kind="several images, question and answer",
        origin=Hub("allenai/Molmo2-MultiImageQA"),
        licence="ODC-BY 1.0; each image has the licence of its site",
        fields={
            "image_urls": [str],
            "qa_pairs": pairs("question", "answer"),
        },
        records=_human_questions,
        notes=f"Rows of 2 to {MAX_IMAGES} images; one that cannot be fetched drops the row. {NO_POINTING_NOTE}",
    ),
    Source(
        name="pixmo_multi_points",
        mixes={"sft": "image_pointing"},
        kind="several images, points",
        origin=Hub(
            "allenai/molmo2-pixmo-multi-points",
            copies=("Molmo2-MultiImagePoint",),
            media="images of PixMo-Points as pixmo_images/SHA256-OF-URL; "
            "what is not there is fetched by the URLs of allenai/pixmo-points",
        ),
        licence="ODC-BY 1.0; each image has the licence of its site",
        fields={
            "images": [str],
            "normalized_labels": [str],
            "labels": [str],
            "points": [COORDINATES],
        },
        records=_multi_points,
        notes="Published under the name Molmo2-MultiImagePoint, too; a copy of that name below --source is read. Every "
        "access draws one of the normalized labels and one of two styles, as published. Rows with an image"
        " that cannot be had are left out.",
    ),
    *(
        Source(
            name=f"mantis_instruct_{name}_multi_only",
            mixes={"sft": "image_academic"},
            kind="several images, multiple choice",
            origin=Hub(f"allenai/molmo2-mantis-instruct-{name}"),
            licence="Apache 2.0; images under the licences of their sources",
            fields={
                "example_id": maybe(object),
                "images": [str],
                "mc_question": [str],
                "choices": [[str]],
                "correct_choice_idx": [int],
            },
            records=_mantis(name),
            notes=f"Rows of one image are left out. Every access draws an order of the options. {SEES_FIVE} Images come"
            f" from TIGER-Lab/Mantis-Instruct ({name}/train_images.zip) when they are not below --source.",
        )
        for name in ("llava_665k_multi", "nlvr2", "spot-the-diff")
    ),
)
