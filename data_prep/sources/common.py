"""Helpers for several source modules: collecting branches, holding out images, naming files, reading coordinates."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from data_prep.sources import shapes
from data_prep.sources.base import AnnotationJson, Context, File, FirstOf, Media, Sample, Skip, Url
from data_prep.sources.schema import AnyOf, maybe, number, one_of

T = TypeVar("T")
# Points as parquet readers return them: a list of points, or (older `datasets` sequences) a list of x and one of y.
COORDINATES = one_of([{"x": number, "y": number}], {"x": [number], "y": [number]})
DIFFERENT_LENGTHS = "lists of different lengths"


def tree(key: str, branches: Iterable[AnnotationJson | Skip], images: Sequence[Media]) -> Iterator[Sample | Skip]:
    """The skips among the branches, then one sample with the annotations; no sample if there is no annotation."""
    kept: list[AnnotationJson] = []
    for branch in branches:
        if isinstance(branch, Skip):
            yield branch
        else:
            kept.append(branch)
    if kept:
        yield Sample(key, kept, images=images)


def questions(
    key: str,
    asked: Sequence[str],
    answers: Sequence[Any],
    style: str,
    *,
    explanations: Sequence[str] | None = None,
    no_pointing: bool = False,
) -> Iterator[AnnotationJson | Skip]:
    """Question-and-answer branches from parallel lists; an entry of `answers` may be a list of answers.

    With `no_pointing`, questions that ask for a number are marked, so that training adds a request not to point.
    """
    if len(asked) != len(answers) or (explanations is not None and len(explanations) != len(asked)):
        yield Skip(key, DIFFERENT_LENGTHS)
        return
    for i, (question, answer) in enumerate(zip(asked, answers, strict=True)):
        found = answer_text(answer)
        if not found:
            yield Skip(f"{key}#{i}", "empty answer")
            continue
        explanation = explanations[i] if explanations is not None else ""
        made = shapes.qa(question, found, style, explanation=explanation)
        yield shapes.no_pointing(made) if no_pointing else made


def answer_text(answer: Any) -> str | list[str]:
    """An answer as training takes it: a text, or a list of the non-empty ones of several; "" if none is left."""
    if isinstance(answer, (list, tuple)):
        return [text for text in map(_text, answer) if text.strip()] or ""
    text = _text(answer)
    return text if text.strip() else ""


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def hold_out(
    entries: Iterable[tuple[str, T]], ctx: Context, name: str, count: int, *, smallest_share: int = 10
) -> Iterator[tuple[str, T] | Skip]:
    """All but `count` of the (key, value) pairs; those become Skips at the end. Of a validation split, only those.

    Which ones depends on the seed, `name` and the keys only, not on their order: data sets that share images hold out
    the same ones by using the same name. Of fewer than `count * smallest_share` pairs, one in `smallest_share` is held
    out. At most `count` pairs are kept in memory.
    """
    from molmo2_nemo.data.mixture import stable_key

    heap: list[tuple[int, int, str, T]] = []  # the `count` smallest hashes seen; the largest of them is on top
    total = 0
    for key, value in entries:
        entry = (-stable_key("held out", ctx.seed, name, key), total, key, value)
        total += 1
        if len(heap) < count:
            heapq.heappush(heap, entry)
        else:
            _, _, freed, freed_value = heapq.heappushpop(heap, entry)
            if not ctx.validation:
                yield freed, freed_value
    by_hash = sorted(heap, reverse=True)
    held = min(count, total // smallest_share)
    wanted = by_hash[:held] if ctx.validation else by_hash[held:]
    for _, _, key, value in sorted(wanted, key=lambda entry: entry[1]):
        yield key, value
    for _, _, key, _ in by_hash[:held] if not ctx.validation else ():
        yield Skip(key, "held out for validation")


def url_hash(url: str) -> str:
    """The name of a file in `pixmo_images/`, where the official downloader puts web images: SHA-256 of the URL, hex."""
    return hashlib.sha256(url.encode()).hexdigest()


def pairs(*names: str) -> AnyOf:
    """The type of question-and-answer columns: an object of parallel lists, or a list of objects."""
    return one_of({name: [maybe(str)] for name in names}, [{name: maybe(str) for name in names}])


def parallel(value: Any, *names: str) -> list[list[Any]]:
    """The lists of a column of type `pairs`, in the order of `names`; None becomes ""."""
    columns = [value[name] if isinstance(value, Mapping) else [entry[name] for entry in value] for name in names]
    return [["" if text is None else text for text in column] for column in columns]


def web_image(url: str, sha256: str | None = None) -> FirstOf:
    """An image from the web: `pixmo_images/HASH` below --source, in case the link is dead, else downloaded."""
    return FirstOf(File(f"pixmo_images/{url_hash(url)}"), Url(url, sha256))


def local(path: str) -> File:
    """A file below --source: the published relative path, or any tail of it that still has a folder.

    `images/coco/train2014/x.jpg` is also found as `coco/train2014/x.jpg` and `train2014/x.jpg`.
    """
    parts = path.split("/")
    return File(*("/".join(parts[i:]) for i in range(max(1, len(parts) - 1))))


def coordinates(points: Any) -> list[tuple[float, float]]:
    """(x, y) pairs of a column of type COORDINATES."""
    if isinstance(points, Mapping):
        return list(zip(points["x"], points["y"], strict=True))
    return [(point["x"], point["y"]) for point in points]
