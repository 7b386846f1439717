"""Helpers for video sources: grouping rows per video or clip, subtitles of a part, locations of YouTube videos.

A source of questions or captions is mostly three small functions: the key that the rows of one record share (`key`),
the annotations of a row (`branches`), and the visual input (`visual`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_prep.sources.base import AnnotationJson, Context, File, Manual, Row, Sample, Skip, Source, Table, number
from data_prep.sources.schema import one_of
from data_prep.sources.shapes import choice, qa

if TYPE_CHECKING:
    import numpy as np

Line = tuple[float, float, str]  # a subtitle: start and end in seconds, text
Records = Callable[[Iterable[Row], Context], Iterator[Sample | Skip]]
Branches = Sequence[AnnotationJson | str] | str

EMPTY_ANSWER = "empty answer"
EMPTY_CLIP = "clip ends before it starts"
NO_SUCH_OPTION = "answer is none of the options"
CORRUPT = "video known to be corrupt"


def per_group(
    key: str | Callable[[Row], str],
    branches: Callable[[Row, np.random.Generator], Branches],
    visual: Callable[[list[Row]], Mapping[str, Any]],
    *,
    at_most: int | None = None,
) -> Records:
    """`Source.records` of a data set whose rows are grouped by `key` into one record each.

    Args:
        key: column, or function of a row.
        branches: annotations of a row. A string in place of the list, or in it, is the reason why there is none, which
            is skipped and counted.
        visual: fields of the `Sample` besides key and annotations, from the group's usable rows.
        at_most: annotations per record; larger groups are split into even parts.
    """

    def records(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
        for name, group in ctx.grouped(rows, key):
            yield from _one(name, group, branches, visual, ctx, at_most)

    return records


def per_row(
    key: str | Callable[[Row], str],
    branches: Callable[[Row, np.random.Generator], Branches],
    visual: Callable[[list[Row]], Mapping[str, Any]],
) -> Records:
    """`Source.records` of a data set whose every row is a record (see `per_group`); repeated keys are made unique."""
    get = by(key) if isinstance(key, str) else key

    def records(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
        unique = UniqueKeys()
        for row in rows:
            yield from _one(unique(get(row)), [row], branches, visual, ctx, None)

    return records


def _one(
    name: str,
    group: list[Row],
    branches: Callable[[Row, np.random.Generator], Branches],
    visual: Callable[[list[Row]], Mapping[str, Any]],
    ctx: Context,
    at_most: int | None,
) -> Iterator[Sample | Skip]:
    """The skips and samples of the rows of one record."""
    rng = ctx.rng(name)
    made: list[AnnotationJson] = []
    used: list[Row] = []
    for i, row in enumerate(group):
        found = branches(row, rng)
        if isinstance(found, str):
            yield Skip(f"{name}#{i}", found)
            continue
        used.append(row)
        for j, branch in enumerate(found):
            if isinstance(branch, str):
                yield Skip(f"{name}#{i}.{j}", branch)
            else:
                made.append(branch)
    if made:
        seen = visual(used)
        for i, part in enumerate(even_parts(made, at_most)):
            yield Sample(f"{name}/{i}" if at_most and len(made) > at_most else name, part, **seen)


def even_parts(items: Sequence[AnnotationJson], at_most: int | None) -> list[Sequence[AnnotationJson]]:
    """The items split, in order, into the fewest parts of at most `at_most` items; sizes differ by at most one."""
    if at_most is None or len(items) <= at_most:
        return [items]
    count = -(-len(items) // at_most)
    size, larger = divmod(len(items), count)
    starts = [i * size + min(i, larger) for i in range(count + 1)]
    return [items[a:b] for a, b in zip(starts, starts[1:], strict=False)]


class UniqueKeys:
    """Makes keys unique where the ids of a data set repeat: the second `a` becomes `a~2`."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def __call__(self, key: str) -> str:
        count = self._seen[key] = self._seen.get(key, 0) + 1
        return key if count == 1 else f"{key}~{count}"


def pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    """One of the items."""
    return items[int(rng.integers(len(items)))]


def text(value: Any) -> str:
    """A cell as text, without the `.0` that integers get in columns with gaps; "" for None and NaN."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def whole(value: Any) -> int | None:
    """An integer that a table may hold as text or float; None if it is not one."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def seconds(value: Any) -> float | None:
    """A time in seconds from a number, its text, or `hours:minutes:seconds`; None if it is none of these, or NaN."""
    try:
        parts = [float(part) for part in value.split(":")] if isinstance(value, str) else [float(value)]
    except (TypeError, ValueError):
        return None
    total = 0.0
    for part in parts:
        total = 60 * total + part
    return total if total == total else None


def option_index(value: Any, options: Sequence[str]) -> int | None:
    """The index of the correct option, from a column that may hold it as text; None if there is no such option."""
    index = whole(value)
    return index if index is not None and 0 <= index < len(options) else None


def cut_lines(recording: str, lines: Iterable[Mapping[str, Any]], start: float, end: float) -> list[Line]:
    """Subtitle lines within a part of a recording, trimmed to it, in seconds from its start.

    For videos that were cut already; for a `Sample` with a `clip` the framework cuts the subtitles. Lines without
    readable times are left out.
    """
    heard = []
    for line in lines:
        begins, ends = seconds(line.get("start")), seconds(line.get("end"))
        if begins is not None and ends is not None and 0 <= begins <= ends and begins < end and ends > start:
            heard.append((begins, ends, text(line.get("text"))))
    if not heard:
        return []
    from data_prep.subtitles import cut, supervisions

    return [(s.start, s.end, s.text) for s in cut(supervisions(recording, heard), start, end)]


def all_lines(lines: Iterable[Mapping[str, Any]]) -> list[Line]:
    """Subtitle lines of a whole video; of lines with the same times the last is used, as in the published loader."""
    by_time = {(float(line["start"]), float(line["end"])): str(line["text"]) for line in lines}
    return [(start, end, words) for (start, end), words in by_time.items() if 0 <= start <= end]


YOUTUBE_CC = ("youtube-cc-exist", "youtube-cc-kw", "youtube-cc-temporal")
YOUTUBE_CC_MEDIA = (
    "YouTube videos (Creative Commons) by id, as youtube-cc/<id>.mp4 or in the published layout "
    "youtube-cc/{youtube-cc-exist,youtube-cc-kw,youtube-cc-temporal}/<id>/<any name>; the data set's card says how to "
    "get them, youtube_id_to_urls_mapping.json of Molmo2-VideoSubtitleQA where they are"
)


def youtube_cc(video_id: str) -> File:
    """A video of the Creative Commons collection, in the published layout or directly in its folder."""
    return File(*(f"youtube-cc/{part}/{video_id}/" for part in YOUTUBE_CC), f"youtube-cc/{video_id}", video_id)


def below(root: str, path: str) -> File:
    """`path` below `root`, or directly below --source."""
    return File(f"{root}/{path}", path)


def clip_name(video: str, start: float, end: float, decimals: int) -> str:
    """The file name that the published scripts give to a clip that was cut in advance."""
    return f"{video}_{start:.{decimals}f}_{end:.{decimals}f}"


def span(value: str) -> tuple[float, float] | None:
    """The two numbers in a text such as `[10.5:20.31]`; None unless there are exactly two."""
    found = re.findall(r"\d+(?:\.\d+)?", value)
    return (float(found[0]), float(found[1])) if len(found) == 2 else None


# --- branches and sources of the academic sets -----------------------------------------------------------------------

MIXES = {"sft": "video_academic"}
SHORT, CHOICE = "video_short_answer", "video_multiple_choice"
OPEN, CHOSEN = "video, question and answer", "video, multiple choice"
CELL = one_of(str, number)  # a column that some readers return as text and others as numbers
UNKNOWN_LICENCE = "see the publisher's terms (not stated here)"
ODC = "ODC-BY 1.0 (annotations as repackaged); the videos keep their publishers' terms"


def open_ended(question: Any, answer: Any, style: str = SHORT) -> AnnotationJson | str:
    """A question with a short answer, or the reason why there is none."""
    words = text(answer)
    return qa(text(question), words, style) if words.strip() else EMPTY_ANSWER


def chosen(question: Any, options: Iterable[Any], index: Any) -> AnnotationJson | str:
    """A multiple-choice annotation, or the reason why there is none."""
    words = [text(option) for option in options]
    place = option_index(index, words)
    return NO_SUCH_OPTION if place is None else choice(text(question), words, place, CHOICE)


def whole_video(*folders: str, column: str = "video") -> Callable[[list[Row]], dict[str, Any]]:
    """`visual` of a data set whose videos are in one of several folders, named by a column."""
    return lambda rows: {"video": File(*(f"{folder}/{text(rows[0][column])}" for folder in folders))}


def by(column: str) -> Callable[[Row], str]:
    """`key` from a column of names, which may be numbers."""
    return lambda row: text(row[column])


def manual(
    name: str,
    kind: str,
    fetch: str,
    tables: Table | tuple[Table, ...],
    media: str | tuple[str, ...],
    fields: dict[str, Any],
    records: Records,
    *,
    licence: str = UNKNOWN_LICENCE,
    notes: str = "",
) -> Source:
    """A source of the academic group whose videos must be downloaded by hand."""
    origin = Manual(
        fetch=fetch,
        tables=tables if isinstance(tables, tuple) else (tables,),
        media=(media,) if isinstance(media, str) else media,
    )
    return Source(name, MIXES, kind, origin, licence, fields, records, notes=notes)
