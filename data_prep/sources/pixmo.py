"""PixMo: captions, pointing, counting, questions about web images (Deitke et al. 2024).

Images are fetched by URL unless they are below --source as stored by the official downloader (pixmo_images/HASH).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from data_prep.sources import shapes
from data_prep.sources.base import AnnotationJson, Context, FirstOf, Hub, Row, Sample, Skip, Source, maybe
from data_prep.sources.common import COORDINATES, coordinates, hold_out, questions, tree, web_image
from molmo2_nemo.errors import DataError

HELD_OUT = 2048  # images of each data set that the published loader holds out for validation
MAX_POINTS = 60  # per label, and for all labels of one sample together
MODES = ("point_count", "pointing")
LICENCE = "ODC-BY 1.0; each image has the licence of its site"
HELD_OUT_NOTE = (
    "2,048 images are held out for validation, as published; which ones depends on the seed (the published split"
    " depends on which images could be fetched)."
)
MODE_NOTE = (
    "The published set counts twice: even entries ask for points and a count, odd ones for points only. Here every"
    " access draws one of the two."
)
NO_POINTING_NOTE = "Questions that ask for a number carry one of training's requests not to point."

Records = Callable[[Iterable[Row], Context], Iterator[Sample | Skip]]


def _numbered(rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """Rows with their position as key: an image may occur twice, and the published loader keeps both."""
    return ((f"{place:08d}", row) for place, row in enumerate(rows))


def _checked_image(rows: Sequence[Row]) -> FirstOf:
    """The image of these rows; when fetched, it must have the published hash."""
    return web_image(rows[0]["image_url"], rows[0].get("image_sha256"))


# --- captions --------------------------------------------------------------------------------------------------------


def _captions(rows: Iterable[Row], ctx: Context, transcripts: bool) -> Iterator[Sample | Skip]:
    for entry in hold_out(_numbered(rows), ctx, "pixmo-cap", HELD_OUT):
        if isinstance(entry, Skip):
            yield entry
            continue
        key, row = entry
        if not row["caption"].strip():
            yield Skip(key, "empty caption", row["image_url"])
            continue
        images = [web_image(row["image_url"])]
        caption = shapes.caption(row["caption"], "long_caption")
        spoken = [text for text in row.get("transcripts") or () if text and text.strip()] if transcripts else []
        if transcripts and not spoken:
            yield Skip(f"{key}#transcript", "no transcript", row["image_url"])
        if len(spoken) > 1:
            variants = [[caption, shapes.caption(text, "transcript")] for text in spoken]
            yield Sample(key, images=images, variants=variants)
        else:
            yield Sample(key, [caption, *(shapes.caption(text, "transcript") for text in spoken)], images=images)


def _captions_with_transcripts(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    return _captions(rows, ctx, transcripts=True)


def _only_captions(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    return _captions(rows, ctx, transcripts=False)


# --- points ----------------------------------------------------------------------------------------------------------

POINTS_EVAL = Hub("allenai/pixmo-points-eval", split="test", columns=("image_url",))


def _points(method: str) -> Records:
    """Rows of one collection method, grouped by image and cut into parts of at most MAX_POINTS points."""

    def records(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
        evaluated = {row["image_url"] for row in ctx.rows(POINTS_EVAL)}
        left_out: dict[str, None] = {}

        def wanted(row: Row) -> bool:
            if row["collection_method"] == method and row["image_url"] in evaluated:
                left_out[row["image_url"]] = None
            return row["collection_method"] == method and row["image_url"] not in evaluated

        images = ctx.grouped(filter(wanted, rows), "image_url")
        for entry in hold_out(images, ctx, f"pixmo-points {method}", HELD_OUT):
            if isinstance(entry, Skip):
                yield entry
            else:
                yield from _point_samples(*entry)
        for url in left_out:
            yield Skip(url, "image of pixmo-points-eval")

    return records


def _point_samples(url: str, rows: Sequence[Row]) -> Iterator[Sample | Skip]:
    kept = []
    for i, row in enumerate(rows):
        if row["count"] > MAX_POINTS:
            yield Skip(f"{url}#{i}", f"more than {MAX_POINTS} points", row["label"])
        else:
            kept.append(row)
    for number, part in enumerate(_parts(kept)):
        variants = [[shapes.points(row["label"], coordinates(row["points"]), mode) for row in part] for mode in MODES]
        yield Sample(f"{url}#part{number}", images=[_checked_image(rows)], variants=variants)


def _parts(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Runs of labels, in order, of at most MAX_POINTS points together."""
    part: list[Row] = []
    total = 0
    for row in rows:
        if part and total + row["count"] > MAX_POINTS:
            yield part
            part, total = [], 0
        part.append(row)
        total += row["count"]
    if part:
        yield part


def _counts(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    for key, row in _numbered(rows):
        if row["points"] is None:
            yield Skip(key, "no points", row["image_url"])
            continue
        where = coordinates(row["points"])
        variants = [[shapes.points(row["label"], where, mode, scale=None)] for mode in MODES]
        yield Sample(key, images=[web_image(row["image_url"])], variants=variants)


# --- questions -------------------------------------------------------------------------------------------------------


def _ask_model_anything(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    images = ctx.grouped(rows, "image_url")
    for entry in hold_out(images, ctx, "pixmo-ask-model-anything", HELD_OUT):
        if isinstance(entry, Skip):
            yield entry
            continue
        url, asked = entry
        texts, answers = [row["question"].strip() for row in asked], [row["answer"] for row in asked]
        yield from tree(url, questions(url, texts, answers, "user_qa", no_pointing=True), [_checked_image(asked)])


_SPEAKER = re.compile(r"\s*(\[USER\]|\[ASSISTANT\])\s*")


def conversation_turns(question: str, answer: str) -> list[str]:
    """Turns of a PixMo-CapQA row: `[USER] .. [ASSISTANT] .. [USER] .. [ASSISTANT]` and the last answer.

    Raises:
        DataError: the marks do not alternate, or a turn is empty.
    """
    before, *rest = _SPEAKER.split(question)
    speakers, said = rest[::2], rest[1::2]
    if before or not said or said[-1]:
        raise DataError("it must start with [USER] and end with [ASSISTANT]")
    if speakers != ["[USER]", "[ASSISTANT]"] * (len(speakers) // 2):
        raise DataError("[USER] and [ASSISTANT] do not alternate")
    turns = [*said[:-1], answer]
    if not all(turn.strip() for turn in turns):
        raise DataError("a turn is empty")
    return turns


def _caption_questions(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    for entry in hold_out(ctx.grouped(rows, "image_url"), ctx, "pixmo-cap-qa", HELD_OUT):
        if isinstance(entry, Skip):
            yield entry
        else:
            url, asked = entry
            yield from tree(url, _conversations(url, asked), [web_image(url)])


def _conversations(url: str, rows: Sequence[Row]) -> Iterator[AnnotationJson | Skip]:
    for i, row in enumerate(rows):
        try:
            turns = conversation_turns(row["question"], row["answer"])
        except DataError as error:
            yield Skip(f"{url}#{i}", "not a conversation", str(error))
            continue
        yield shapes.no_pointing(shapes.conversation(turns, "user_qa"))


SOURCES = (
    Source(
        name="pixmo_cap_with_transcripts",
        mixes={"pretrain": "captions"},
        kind="image, caption and transcript",
        origin=Hub("allenai/pixmo-cap"),
        licence=LICENCE,
        fields={"image_url": str, "caption": str, "transcripts": maybe([maybe(str)])},
        records=_captions_with_transcripts,
        notes=f"Every access draws one of the image's transcripts, as published. {HELD_OUT_NOTE}",
    ),
    Source(
        name="pixmo_cap",
        mixes={"sft": "demo"},
        kind="image, caption",
        origin=Hub("allenai/pixmo-cap"),
        licence=LICENCE,
        fields={"image_url": str, "caption": str},
        records=_only_captions,
        notes=HELD_OUT_NOTE,
    ),
    *(
        Source(
            name=name,
            mixes={"pretrain": "pointing", "sft": "image_pointing"},
            kind="image, points",
            origin=Hub("allenai/pixmo-points"),
            licence=LICENCE,
            fields={
                "image_url": str,
                "image_sha256": maybe(str),
                "points": COORDINATES,
                "count": int,
                "label": str,
                "collection_method": str,
            },
            records=_points(method),
            counts_as=2,
            notes=f"Rows of the collection method {method!r}. Labels of more than {MAX_POINTS} points are left out, and"
            f" an image's labels are split so that a sample has at most {MAX_POINTS}. Images of pixmo-points-eval are"
            f" left out. {MODE_NOTE} {HELD_OUT_NOTE}",
        )
        for name, method in (("pixmo_points_train", "pointing"), ("pixmo_points_high_freq_train", "counting"))
    ),
    Source(
        name="pixmo_count_train",
        mixes={"pretrain": "pointing", "sft": "image_pointing"},
        kind="image, points",
        origin=Hub("allenai/pixmo-count"),
        licence=LICENCE,
        fields={"image_url": str, "points": maybe(COORDINATES), "label": str},
        records=_counts,
        counts_as=2,
        notes=f"Points are in pixels; the set has its own validation split. {MODE_NOTE}",
    ),
    Source(
        name="pixmo_ask_model_anything",
        mixes={"sft": "demo"},
        kind="image, question and answer",
        origin=Hub("allenai/pixmo-ask-model-anything"),
        licence=LICENCE,
        fields={"image_url": str, "image_sha256": maybe(str), "question": str, "answer": str},
        records=_ask_model_anything,
        notes=f"{NO_POINTING_NOTE} {HELD_OUT_NOTE}",
    ),
    Source(
        name="pixmo_cap_qa_as_user_qa",
        mixes={"sft": "demo"},
        kind="image, conversation",
        origin=Hub("allenai/pixmo-cap-qa"),
        licence=LICENCE,
        fields={"image_url": str, "question": str, "answer": str},
        records=_caption_questions,
        notes=f"Questions may hold several turns, marked [USER] and [ASSISTANT]. {NO_POINTING_NOTE} {HELD_OUT_NOTE}",
    ),
)
