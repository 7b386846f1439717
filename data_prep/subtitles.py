"""Subtitles as lhotse supervisions, and cutting them to a clip."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from molmo2_nemo.errors import DataError


def supervisions(recording: str, lines: Iterable[tuple[float, float, str]]) -> list[Any]:
    """(start, end, text) in seconds -> `SupervisionSegment`s, in order of time; empty lines are left out.

    Raises:
        DataError: a line that ends before it starts or starts before 0.
    """
    from lhotse import SupervisionSegment

    made = []
    for i, (start, end, text) in enumerate(sorted(lines, key=lambda line: (line[0], line[1]))):
        if not 0 <= start <= end:
            raise DataError(f"subtitle {i} must have 0 <= start <= end, not {start} - {end}")
        if text.strip():
            made.append(
                SupervisionSegment(f"{recording}-{i}", recording, start, round(end - start, 8), text=text.strip())
            )
    return made


def cut(segments: Iterable[Any], start: float, end: float) -> list[Any]:
    """The supervisions between `start` and `end`, trimmed to that span, with times counted from `start`."""
    heard = (s for s in segments if s.start < end and (s.end > start or s.start >= start))
    return [segment.with_offset(-start).trim(end=end - start) for segment in heard]


def as_record(segments: Iterable[Any]) -> list[dict[str, Any]]:
    """Supervisions in the form of a record's `subtitles` field."""
    return [{"start": float(s.start), "end": float(s.end), "text": s.text} for s in segments]
