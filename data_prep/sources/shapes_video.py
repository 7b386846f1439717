"""What the video sources share: rows gathered per video or clip, subtitles of a cut, where YouTube videos lie.

A source of questions or captions is mostly three small functions: what the rows of one record have in common (`key`),
which annotations a row gives (`branches`), and what is seen (`visual`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_prep.sources.base import Annotation, Context, File, Row, Sample, Skip

if TYPE_CHECKING:
    import numpy as np

Line = tuple[float, float, str]  # a subtitle: start and end in seconds, text
Records = Callable[[Iterable[Row], Context], Iterator[Sample | Skip]]

EMPTY_ANSWER = "empty answer"
EMPTY_CLIP = "clip ends before it starts"
NO_SUCH_OPTION = "answer is none of the options"
CORRUPT = "video known to be corrupt"

# Wordings of the label sets: the published ones say the same.
ACTION_QUESTIONS = (
    "Which action can be seen?",
    "What is going on in the video, in a few words?",
    "Name the activity that the video shows.",
)
PERSON_QUESTIONS = (*ACTION_QUESTIONS, "What does the person do?")


def per_group(
    key: str | Callable[[Row], str],
    branches: Callable[[Row, np.random.Generator], Sequence[Annotation] | str],
    visual: Callable[[list[Row]], Mapping[str, Any]],
    *,
    at_most: int | None = None,
) -> Records:
    """`Source.records` of a data set whose rows are gathered by `key` into one record each.

    Args:
        key: column, or function of a row.
        branches: annotations of a row, or in words why it gives none (it is skipped and counted).
        visual: fields of the `Sample` besides key and annotations, from the group's usable rows.
        at_most: annotations per record; larger groups are split into even parts.
    """

    def records(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
        for name, group in ctx.grouped(rows, key):
            rng = ctx.rng(name)
            made: list[Annotation] = []
            used: list[Row] = []
            for i, row in enumerate(group):
                found = branches(row, rng)
                if isinstance(found, str):
                    yield Skip(f"{name}#{i}", found)
                else:
                    made.extend(found)
                    used.append(row)
            if made:
                seen = visual(used)
                for i, part in enumerate(even_parts(made, at_most)):
                    yield Sample(f"{name}/{i}" if at_most and len(made) > at_most else name, part, **seen)

    return records


def even_parts(items: Sequence[Annotation], at_most: int | None) -> list[Sequence[Annotation]]:
    """As few parts of at most `at_most` items as possible, their sizes differing by one at most, in order."""
    if at_most is None or len(items) <= at_most:
        return [items]
    count = -(-len(items) // at_most)
    size, larger = divmod(len(items), count)
    starts = [i * size + min(i, larger) for i in range(count + 1)]
    return [items[a:b] for a, b in zip(starts, starts[1:], strict=False)]


class UniqueKeys:
    """Keys of data sets whose own ids may repeat: the second `a` becomes `a~2`."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def __call__(self, key: str) -> str:
        count = self._seen[key] = self._seen.get(key, 0) + 1
        return key if count == 1 else f"{key}~{count}"


def pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    """One of the items."""
    return items[int(rng.integers(len(items)))]


def text(value: Any) -> str:
    """A cell as text, without the `.0` that whole numbers get in columns with gaps; "" for none (NaN too)."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def whole(value: Any) -> int | None:
    """A whole number that a table may hold as text or float; None if it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def seconds(value: Any) -> float | None:
    """A time: a number, its text, or `hours:minutes:seconds`; None if it is none (NaN too)."""
    try:
        parts = [float(part) for part in value.split(":")] if isinstance(value, str) else [float(value)]
    except (TypeError, ValueError):
        return None
    total = 0.0
    for part in parts:
        total = 60 * total + part
    return total if total == total else None


def option_index(value: Any, options: Sequence[str]) -> int | None:
    """The number of the right option, from a column that may hold it as text; None if there is no such option."""
    index = whole(value)
    return index if index is not None and 0 <= index < len(options) else None


def cut_lines(lines: Iterable[Mapping[str, Any]], start: float, end: float) -> list[Line]:
    """Subtitle lines that overlap a cut, in seconds from its start; lines without readable times are left out.

    For videos that are a cut already; of a `Sample` with a `clip` the framework cuts the subtitles.
    """
    kept = []
    for line in lines:
        begins, ends = seconds(line.get("start")), seconds(line.get("end"))
        if begins is not None and ends is not None and line.get("text") and begins < end and ends > start:
            kept.append((max(begins - start, 0.0), min(ends, end) - start, str(line["text"])))
    return kept


def all_lines(lines: Iterable[Mapping[str, Any]]) -> list[Line]:
    """Subtitle lines of a whole video; of lines with the same times the last counts, as in the published loader."""
    by_time = {(float(line["start"]), float(line["end"])): str(line["text"]) for line in lines}
    return [(start, end, words) for (start, end), words in by_time.items() if 0 <= start <= end]


YOUTUBE_CC = ("youtube-cc-exist", "youtube-cc-kw", "youtube-cc-temporal")
YOUTUBE_CC_MEDIA = (
    "YouTube videos (Creative Commons) by id, as youtube-cc/<id>.mp4 or in the published layout "
    "youtube-cc/{youtube-cc-exist,youtube-cc-kw,youtube-cc-temporal}/<id>/<any name>; the data set's card says how to "
    "get them"
)


def youtube_cc(video_id: str) -> File:
    """A video of the Creative Commons collection, in the published layout or flat."""
    return File(*(f"youtube-cc/{part}/{video_id}/" for part in YOUTUBE_CC), f"youtube-cc/{video_id}", video_id)


def below(root: str, path: str) -> File:
    """`path` below `root`, or right below --source."""
    return File(f"{root}/{path}", path)


def clip_name(video: str, start: float, end: float, decimals: int) -> str:
    """What the published scripts call a clip that was cut beforehand."""
    return f"{video}_{start:.{decimals}f}_{end:.{decimals}f}"


def span(value: str) -> tuple[float, float] | None:
    """Two numbers somewhere in a text such as `[10.5:20.31]`; None when there are not two."""
    found = re.findall(r"\d+(?:\.\d+)?", value)
    return (float(found[0]), float(found[1])) if len(found) == 2 else None
