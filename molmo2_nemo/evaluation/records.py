"""The records of a data set as items of a task: every turn of every annotation is a question.

A question is worded as training words it, but the same way at every time: the first wording is drawn from one seed,
options keep their order, the first of alternative forms is taken. A later turn comes with the turns before it, answered
as the annotation says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from molmo2_nemo.data.annotations import (
    Alternatives,
    Annotation,
    Messages,
    QuestionAnswer,
    TurnAlternatives,
    TurnAnnotation,
)
from molmo2_nemo.data.annotations import Answer as AnnotatedAnswer
from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.raw_text import RawText
from molmo2_nemo.data.record import Record, parse_record
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.data.video.read import plan_video
from molmo2_nemo.errors import DataError
from molmo2_nemo.evaluation.references import Size, expected
from molmo2_nemo.evaluation.task import Question
from molmo2_nemo.inference.prompt import Prompt


class RecordItems:
    """The records of a data set, in its order.

    Args:
        path: a folder of shards with a manifest, or an address (s3://bucket/set).
        scorers: names; empty: each question's are those that go with its style.

    Raises:
        ShardError: no such data set, or a damaged one.
    """

    def __init__(self, path: str | Path, name: str, scorers: tuple[str, ...] = ()) -> None:
        self.dataset = ShardDataset(path, name)
        self.scorers = scorers

    def __len__(self) -> int:
        return len(self.dataset)

    def questions(self, number: int, builder: ExampleBuilder) -> list[Question]:
        """See `Items`.

        Raises:
            BadRecord: the record cannot be used, or is raw text, which asks nothing.
        """
        key, members = self.dataset.read(number)
        limits: LimitsConfig = builder.config.limits
        return questions_of(parse_record(key, members, max_json_bytes=limits.json_bytes), builder, self.scorers)


def questions_of(record: Record, builder: ExampleBuilder, scorers: tuple[str, ...] = ()) -> list[Question]:
    """The questions of a record.

    Args:
        scorers: names; empty: each question's are those that go with its style.

    Raises:
        BadRecord: the record cannot be used.
        DataError: it is raw text, which asks nothing.
    """
    key, record = record.key, settled(record)
    if any(isinstance(a.content, RawText) for a in record.annotations if isinstance(a, Annotation)):
        raise DataError(f"record {key}: raw text asks nothing")
    plan = builder.plan(record, np.random.default_rng(0))
    sizes = sizes_of(record, plan.info.get("images", []), builder)
    found = []
    for place, (annotation, turns) in enumerate(zip(record.annotations, plan.info["conversations"], strict=True)):
        assert isinstance(annotation, Annotation)
        for turn, ((asked, answer), entry) in enumerate(zip(turns, entries(annotation), strict=True)):
            names, references = expected(entry, answer, sizes)
            found.append(
                Question(
                    f"{key}/{place}" + (f"/{turn}" if len(turns) > 1 else ""),
                    prompt_of(record, asked, turns[:turn]),
                    references,
                    scorers or names,
                    {"style": entry.style.name},
                )
            )
    return found


def settled(record: Record) -> Record:
    """The record with one form of whatever it has several of: always the first."""
    tree = record.variants[0] if record.variants else record.annotations
    return replace(record, annotations=[_settled(a) for a in tree], variants=[], variant_weights=None)


def _settled(annotation: Annotation | Alternatives) -> Annotation:
    if isinstance(annotation, Alternatives):
        annotation = annotation.forms[0]
    if isinstance(annotation.content, tuple):
        turns = tuple(p.forms[0] if isinstance(p, TurnAlternatives) else p for p in annotation.content)
        return replace(annotation, content=turns)
    return annotation


def entries(annotation: Annotation) -> Sequence[TurnAnnotation]:
    """The turns of an annotation of a settled record."""
    content = annotation.content
    if isinstance(content, Messages):
        return [QuestionAnswer(content.style, asked, AnnotatedAnswer((said,))) for asked, said in content.turns]
    assert not isinstance(content, RawText)
    turns = content if isinstance(content, tuple) else (content,)
    return [turn for turn in turns if not isinstance(turn, TurnAlternatives)]


def sizes_of(record: Record, images: Sequence[dict[str, list[int]]], builder: ExampleBuilder) -> list[Size]:
    """Width and height in pixels of each image, or of the video."""
    if record.video is None:
        return [(image["size"][0], image["size"][1]) for image in images]
    config = builder.config
    plan = plan_video(record.video, config.video, clip=record.clip, sampling=record.sampling, limits=config.limits)
    return [plan.size]


def prompt_of(record: Record, question: str, history: Sequence[tuple[str, str]]) -> Prompt:
    """A question about a record's media, worded already."""
    return Prompt(
        question,
        record.images,
        record.video,
        style=None,
        subtitles=record.subtitles,
        clip=record.clip,
        history=tuple(history),
        sampling=record.sampling,
    )
