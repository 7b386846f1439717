"""LongVideoBench (arXiv 2407.15754) with subtitles; see tasks/longvideobench.py.

Data: further, subtitles/<subtitle_path>: lines with "timestamp" ([start, end] in seconds) and "text", or "start" and
"end" (h:m:s) and "line", of the film that the video was cut from. Of these, the ones heard between
starting_timestamp_for_subtitles and `duration` seconds later, counted from there; a line without an end lasts to
`duration`. Of lines with the same two times the released loader keeps the last. Score: longvideobench, as published; by
duration_group and category.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molmo2_nemo.data.subtitle_files import Line
from molmo2_nemo.errors import read_text
from molmo2_nemo.evaluation.tasks.longvideobench import LongVideoBench
from molmo2_nemo.evaluation.video_choice import Row, read_json


def seconds(time: str) -> float:
    """h:m:s as seconds."""
    hours, minutes, rest = time.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)


def line_of(entry: dict[str, Any], duration: float) -> Line:
    """One line of a file."""
    if "timestamp" not in entry:
        return seconds(entry["start"]), seconds(entry["end"]), entry["line"]
    start, end = entry["timestamp"]
    return float(start), end if isinstance(end, float) else float(duration), entry["text"]


class LongVideoBenchSubtitles(LongVideoBench):
    name = "longvideobench_subtitles"
    title = "multiple choice about long videos, with subtitles (LongVideoBench, validation)"

    def subtitles(self, folder: Path, row: Row) -> Sequence[Line]:
        path = folder / "subtitles" / row["subtitle_path"]
        first, duration = float(row["starting_timestamp_for_subtitles"]), float(row["duration"])
        lines = [line_of(entry, duration) for entry in read_json(read_text(path), str(path))]
        return [(max(a - first, 0.0), b - first, text) for a, b, text in lines if b >= first and a <= first + duration]


TASK = LongVideoBenchSubtitles()
