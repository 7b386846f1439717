"""Benchmarks on videos as they are published: tables (Parquet) of questions, and video files beside them."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.record import VIDEO_SUFFIXES, Record, parse_record
from molmo2_nemo.errors import DataError, UserError
from molmo2_nemo.evaluation.hub_tables import Row, Tables
from molmo2_nemo.evaluation.records import questions_of
from molmo2_nemo.evaluation.task import ELSEWHERE, Question, Task, TaskSettings


class PublishedVideos(Task):
    """A task whose folder, as downloaded from the Hub, holds tables (`**/*.parquet`) and the videos in any folders."""

    dataset: str  # on the Hub; its last part is the folder's name in the folder of data sets
    columns: Sequence[str]
    video = True

    def open(self, settings: TaskSettings) -> VideoRows:
        folder = settings.root / self.dataset.rpartition("/")[2]
        rows = VideoRows(folder, self) if folder.is_dir() else None
        if rows is None or not len(rows) or not rows.videos:
            without = "no video" if rows is not None and len(rows) else "no question in a *.parquet"
            raise UserError(
                f"task {self.name}: {folder}: {'no such folder' if rows is None else without}; download the data set "
                f"{self.dataset} of huggingface.co to this folder and put its videos, as its card says where they are "
                f"from, below it, {ELSEWHERE}"
            )
        return rows

    @abstractmethod
    def video_names(self, row: Row) -> Sequence[str]:
        """Names of a row's video, the preferred one first: paths without suffix, of which the end must agree."""

    @abstractmethod
    def record(self, row: Row) -> dict[str, Any]:
        """The row as a record of ours, without its video."""

    @abstractmethod
    def reference(self, row: Row) -> Any:
        """What answers to the row are compared with."""

    def tags(self, row: Row) -> dict[str, str]:
        """What figures are broken down by."""
        return {}


class VideoRows:
    """The rows of all tables of a folder, in order of the files' names.

    Raises:
        UserError: a file that is no table, or lacks one of the task's columns; names both.
    """

    def __init__(self, folder: Path, task: PublishedVideos) -> None:
        self.folder, self.task = folder, task
        self.tables = Tables(task.name, task.dataset, sorted(folder.rglob("*.parquet")), task.columns)
        self.videos: dict[str, list[Path]] = {}  # by the file's name without suffix
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower().lstrip(".") in VIDEO_SUFFIXES:
                self.videos.setdefault(path.stem, []).append(path)

    def __len__(self) -> int:
        return len(self.tables)

    def questions(self, number: int, builder: ExampleBuilder) -> list[Question]:
        """The question of a row, worded as in training.

        Raises:
            UserError: its video is missing or cannot be read, or the row is not as published; names the row.
        """
        path, _, _ = self.tables.places[number]
        key = f"{path.name}:{number}"
        row = self.tables.row(number)
        try:
            names, content = self.task.video_names(row), self.task.record(row)
            reference, tags = self.task.reference(row), self.task.tags(row)
        except (KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError) as error:
            says = f"not as {self.task.dataset} is published ({type(error).__name__}: {error})"
            raise DataError(f"{key}: {says}") from None
        (question,) = questions_of(self._record(key, names, content), builder, self.task.scorers)
        return [replace(question, key=key, references=(reference,), tags=tags)]

    def _record(self, key: str, names: Sequence[str], content: Mapping[str, Any]) -> Record:
        video = self._video(names)
        suffix = video.suffix.lower().lstrip(".")
        made = json.dumps({**content, "video": suffix}).encode()
        return parse_record(key, {"json": made, suffix: video.read_bytes()})

    def _video(self, names: Sequence[str]) -> Path:
        for name in names:
            for path in self.videos.get(name.rpartition("/")[2], ()):
                if f"/{path.with_suffix('').as_posix()}".endswith(f"/{name}"):
                    return path
        raise DataError(f"no video {names[0]}.* below {self.folder}")


def mask_of(rle: Mapping[str, Any]) -> dict[str, Any]:
    """A mask of a table as references have it: COCO's run lengths, whose text may be bytes there."""
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
