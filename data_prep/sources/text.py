"""Text without an image: the classified Tulu mixture, and fixed answers about the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_prep.sources import shapes
from data_prep.sources.base import Context, Hub, Media, Prepared, Row, Sample, Skip, Source, column_media, maybe
from data_prep.sources.schema import image
from molmo2_nemo.errors import DataError

if TYPE_CHECKING:
    import numpy as np

# --- Tulu ------------------------------------------------------------------------------------------------------------

LEFT_OUT_SOURCES = {
    "allenai/dino-hardcodes": "fixed answers of another model",
    "allenai/hardcoded-olmo": "fixed answers of another model",
    "allenai/puzzle_data_160k-ngram-filtered": "puzzles",
    "faezeb/verifiable-reasoning-v3-o4-mini-length-filtered-verified": "reasoning",
    "allenai/verifiable-reasoning-filtered-o4-mini-filtered": "reasoning",
}
LEFT_OUT_CATEGORIES = ("code", "non-english")


def chat_turns(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Turns of a chat, user first. A system message goes before the first question; an unanswered last one is dropped.

    Raises:
        DataError: the roles do not alternate, or no question is answered.
    """
    roles, said = [m["role"] for m in messages], [m["content"] for m in messages]
    if roles[:2] == ["system", "user"]:
        roles, said = roles[1:], [f"System: {said[0]}\n{said[1]}", *said[2:]]
    if roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
        raise DataError(f"roles do not alternate from a user: {', '.join(roles[:6])}")
    turns = said[: len(said) // 2 * 2]
    if not turns:
        raise DataError("no question is answered")
    return turns


def left_out(row: Row, max_tokens: int) -> str:
    """The reason why the published mixture leaves the row out; "" if it does not."""
    if row["empty_messages"]:
        return "an empty message"
    if row["has_special_token"]:
        return "special tokens in the text"
    if row["source"] in LEFT_OUT_SOURCES:
        return LEFT_OUT_SOURCES[row["source"]]
    if row["category"] in LEFT_OUT_CATEGORIES:
        return f"category {row['category']}"
    if row["first_message_qwen3_tokens"] > max_tokens:
        return f"first message longer than {max_tokens} tokens"
    return ""


def _tulu(max_tokens: int) -> Callable[[Iterable[Row], Context], Iterator[Sample | Skip]]:
    def records(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
        for place, row in enumerate(rows):
            key = f"{place:08d}"
            reason = left_out(row, max_tokens)
            if reason:
                yield Skip(key, reason, row["id"])
                continue
            try:
                turns = chat_turns(row["messages"])
            except DataError as error:
                yield Skip(key, "not a conversation", f"{row['id']}: {error}")
                continue
            yield Sample(key, [shapes.conversation(turns, "text_sft")])

    return records


# --- fixed answers ---------------------------------------------------------------------------------------------------

COPIES = 5  # records per question without an image of its own, each with another root
ROOTS = {"image": 0.25, "video": 0.25, "several images": 0.15, "none": 0.35}
IMAGE_SETS = ("pixmo_cap", "pixmo_cap_with_transcripts", "pixmo_ask_model_anything", "pixmo_cap_qa_as_user_qa")
VIDEO_SETS = ("molmo2_human_qa", "molmo2_syn_captions_qa")


def _fixed_answers(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    images = {name: ctx.prepared(name) for name in IMAGE_SETS}
    videos = {name: ctx.prepared(name) for name in VIDEO_SETS}
    for place, row in enumerate(rows):
        for number, question in enumerate(row["questions"]):
            key = f"{place:04d}-{number:03d}"
            answer = [shapes.qa(question, row["response"], "user_qa")]
            if row["images"]:
                for i, own in enumerate(row["images"]):
                    yield Sample(f"{key}-image{i}", answer, images=[column_media(own)])
                continue
            for copy in range(COPIES):
                seen, video = _root(ctx.rng(f"{key}-{copy}"), images, videos)
                yield Sample(f"{key}-{copy}", answer, images=seen, video=video)


def _root(
    rng: np.random.Generator, images: Mapping[str, int], videos: Mapping[str, int]
) -> tuple[list[Media], Media | None]:
    """Random images or a random video from the data sets that have been prepared, or nothing."""
    chances = dict(ROOTS)
    if not any(images.values()):
        chances["image"] = chances["several images"] = 0.0
    if not any(videos.values()):
        chances["video"] = 0.0
    total = sum(chances.values())
    kind = list(chances)[int(rng.choice(len(chances), p=[chance / total for chance in chances.values()]))]
    if kind == "video":
        return [], _any_of(rng, videos)
    count = {"image": 1, "several images": int(rng.integers(2, 6)), "none": 0}[kind]
    return [_any_of(rng, images) for _ in range(count)], None


def _any_of(rng: np.random.Generator, sizes: Mapping[str, int]) -> Prepared:
    number = int(rng.integers(sum(sizes.values())))
    for name, size in sizes.items():
        if number < size:
            return Prepared(name, number)
        number -= size
    raise AssertionError("a number below the sum of the sizes")


SOURCES = (
    *(
        Source(
            name=name,
            mixes={stage: group},
            kind="text",
            origin=Hub("allenai/molmo2-tulu4-classified"),
            licence="not stated on its card; its parts have the licences of their sources",
            fields={
                "id": str,
                "source": str,
                "category": maybe(str),
                "messages": [{"role": str, "content": str}],
                "first_message_qwen3_tokens": int,
                "empty_messages": bool,
                "has_special_token": bool,
            },
            records=_tulu(max_tokens),
            notes="Left out as published: empty messages, special tokens, fixed answers, puzzles, reasoning, code,"
            f" other languages, first messages of more than {max_tokens} tokens of Qwen3. A question at the end"
            " that nobody answers is dropped; nothing is learned from it.",
        )
        for name, stage, group, max_tokens in (
            ("tulu4_max_2304", "pretrain", "text", 2304),
            ("tulu4", "sft", "nlp", 4096),
        )
    ),
    Source(
        name="molmo2_hardcodes",
        mixes={"sft": "hardcodes"},
        kind="text, image or video; fixed answers",
        origin=Hub("allenai/molmo2-hardcodes"),
        licence="not stated on its card",
        fields={"questions": [str], "response": str, "images": maybe([image])},
        records=_fixed_answers,
        notes="A question without an image of its own is seen with a random image (25), video (25), several images"
        " (15) or nothing (35) of 100. The published loader draws it at every access, here each question gives"
        f" {COPIES} records with one of their own, from data sets prepared beside this one (prepare"
        f" {IMAGE_SETS[0]} and {VIDEO_SETS[0]} first; what is missing is not drawn). The set is alone in its group, so"
        " that its length does not change the mixture.",
    ),
)
