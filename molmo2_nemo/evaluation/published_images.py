"""Benchmarks on images as they are published: JSON lists of questions, and image files beside them."""

from __future__ import annotations

import io
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.media import read_media
from molmo2_nemo.errors import DataError, UserError, read_text
from molmo2_nemo.evaluation.task import ELSEWHERE, Question, Task, TaskSettings
from molmo2_nemo.inference.prompt import Prompt

Entry = Mapping[str, Any]


class PublishedImages(Task):
    """A task whose folder, as downloaded from the Hub and unpacked, holds lists of questions and their images."""

    dataset: str  # on the Hub
    folders: Sequence[str]  # names of its folder in the folder of data sets; the first that is there
    lists: str  # pattern of the files with questions
    style: str
    group = "point"

    def open(self, settings: TaskSettings) -> ImageEntries:
        found = [settings.root / name for name in self.folders if any((settings.root / name).glob(self.lists))]
        if not found:
            raise UserError(
                f"task {self.name}: no {settings.root / self.folders[0] / self.lists}; download the data set "
                f"{self.dataset} of huggingface.co there and unpack its archives, {ELSEWHERE}"
            )
        return ImageEntries(found[0], self)

    def kept(self, entry: Entry) -> bool:
        """Whether an entry is a question of the benchmark."""
        return True

    @abstractmethod
    def image(self, entry: Entry) -> str:
        """Path of an entry's image in the folder."""

    @abstractmethod
    def text(self, entry: Entry) -> str:
        """What is asked."""

    @abstractmethod
    def reference(self, entry: Entry, folder: Path, size: tuple[int, int]) -> Any:
        """What answers are compared with; `size` is the image's width and height in pixels."""

    def tags(self, entry: Entry) -> dict[str, str]:
        """What figures are broken down by."""
        return {}


class ImageEntries:
    """The entries of all lists of a folder, in order of the files' names.

    Raises:
        UserError: a file that is no list of objects; names it.
    """

    def __init__(self, folder: Path, task: PublishedImages) -> None:
        self.folder, self.task = folder, task
        self.entries: list[tuple[str, Entry]] = []  # key, entry
        for path in sorted(folder.glob(task.lists)):
            try:
                entries = json.loads(read_text(path))
            except json.JSONDecodeError as error:
                raise UserError(f"task {task.name}: {path} is not JSON ({error})") from None
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise UserError(f"task {task.name}: {path} is no list of objects; is it of {task.dataset}?")
            named = [(f"{path.stem}:{number}", {"file": path.stem, **entry}) for number, entry in enumerate(entries)]
            self.entries += [(key, entry) for key, entry in named if task.kept(entry)]

    def __len__(self) -> int:
        return len(self.entries)

    def questions(self, number: int, builder: ExampleBuilder) -> list[Question]:
        """The question of an entry.

        Raises:
            UserError: its image or mask is missing or cannot be read, or the entry is not as published; names it.
        """
        key, entry = self.entries[number]
        task = self.task
        name, text, tags = (self._field(key, read, entry) for read in (task.image, task.text, task.tags))
        content = read_media(self.folder / name, "image")
        size = _size(content)
        reference = self._field(key, lambda given: task.reference(given, self.folder, size), entry)
        return [Question(key, Prompt(text, images=[content], style=task.style), (reference,), task.scorers, tags)]

    def _field(self, key: str, read: Callable[[Entry], Any], entry: Entry) -> Any:
        try:
            return read(entry)
        except (KeyError, IndexError) as error:
            raise DataError(f"{key}: not as {self.task.dataset} is published (without {error})") from None


def _size(content: bytes) -> tuple[int, int]:
    from PIL import Image

    return Image.open(io.BytesIO(content)).size
