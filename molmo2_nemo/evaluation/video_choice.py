"""Tasks of multiple choice, and of other short answers, about videos, read from a published benchmark's own files.

A benchmark is a folder in the folder of data sets with a table of questions (.parquet, .json or .jsonl) and the videos.
The videos are looked for when their question is asked: a missing one is a wrong answer that is counted and said.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.subtitle_files import Line
from molmo2_nemo.errors import DataError, UserError, read_text
from molmo2_nemo.evaluation.choice import LETTERS
from molmo2_nemo.evaluation.task import ELSEWHERE, Question, Task, TaskSettings
from molmo2_nemo.inference.prompt import Prompt

Row = dict[str, Any]
LETTER_ONLY = "Answer with the option's letter from the given choices directly."  # as LLaVA's evaluations ask


@dataclass(frozen=True)
class VideoChoice:
    """One question, worded."""

    key: str
    video: Path
    asked: str  # question, options and instruction
    options: Sequence[str]  # none: `reference` says what is right
    letter: str  # of the correct option
    tags: dict[str, str] = field(default_factory=dict)
    subtitles: Sequence[Line] = ()  # start and end in seconds of the film, text
    clip: tuple[float, float] | None = None  # seconds of the film: the part that is shown
    style: str = "video_multiple_choice"
    reference: Mapping[str, Any] = field(default_factory=dict)  # further fields of it


def listed(options: Sequence[str]) -> str:
    """Options without letters of their own, a line for each."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))


class VideoChoices:
    """The questions of a benchmark, in the order of its table."""

    def __init__(self, rows: Sequence[VideoChoice]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def questions(self, number: int, builder: ExampleBuilder) -> list[Question]:
        """See `Items`."""
        row = self.rows[number]
        style = "video_multiple_choice_w_subtitle" if row.subtitles else row.style
        prompt = Prompt(row.asked, video=row.video, style=style, subtitles=row.subtitles, clip=row.clip)
        choice = {"option": row.letter, "options": list(row.options)} if row.options else {}
        return [Question(row.key, prompt, ({**choice, **row.reference},), tags=row.tags)]


class VideoChoiceTask(Task):
    """A benchmark of short answers about videos. A row of its table that cannot be read stops the task."""

    places: ClassVar[tuple[str, ...]]  # its folder, in the folder of data sets: the first that has the table counts
    table: ClassVar[str]  # path in its folder
    fetch: ClassVar[str]  # where table and videos come from
    max_new_tokens = 32
    video = True

    @abstractmethod
    def read(self, row: Row, folder: Path, key: str) -> list[VideoChoice]:
        """The questions of a row of the table.

        Args:
            key: unique to the row.

        Raises:
            DataError, AttributeError, KeyError, IndexError, TypeError, ValueError: it is not such a row.
        """

    def rows(self, folder: Path) -> Iterable[tuple[str, Row]]:
        """The rows of the table, and where each is."""
        return table_rows(folder / self.table)

    def folder(self, settings: TaskSettings) -> Path:
        """The benchmark's folder.

        Raises:
            UserError: its table is not there; says where it comes from.
        """
        folders = [settings.root / place for place in self.places]
        for folder in folders:
            if (folder / self.table).exists():
                return folder
        raise UserError(f"task {self.name}: no {folders[0] / self.table}; {self.fetch}, {ELSEWHERE}")

    def open(self, settings: TaskSettings) -> VideoChoices:
        folder = self.folder(settings)
        found: list[VideoChoice] = []
        where = str(folder / self.table)
        try:
            for number, (where, row) in enumerate(self.rows(folder)):  # noqa: B007 - read where a row fails
                found += checked(self.read(row, folder, str(number)))
        except DataError as error:
            raise UserError(f"{where}: {error}") from None
        except UserError:
            raise
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{where}: not a question of {self.name} ({type(error).__name__}: {error})") from None
        return VideoChoices(found)


def checked(questions: list[VideoChoice]) -> list[VideoChoice]:
    """Questions whose answers are among their options.

    Raises:
        DataError: of one it is not.
    """
    for question in questions:
        if question.options and question.letter not in list(LETTERS[: len(question.options)]):
            raise DataError(f"the answer is {question.letter!r} of {len(question.options)} options")
    return questions


def table_rows(path: Path) -> Iterable[tuple[str, Row]]:
    """The rows of a table, and where each is.

    Raises:
        UserError: a file that cannot be read as what its ending says.
    """
    if path.suffix == ".parquet":
        rows = _parquet(path)
    elif path.suffix == ".jsonl":
        lines = [line for line in read_text(path).split("\n") if line.strip()]
        rows = [read_json(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    else:
        rows = read_json(read_text(path), str(path))
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of questions")
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1)]


def read_json(text: str, where: str) -> Any:
    """The value that a text holds.

    Raises:
        UserError: not JSON; begins with `where`.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error})") from None


def _parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()  # type: ignore[no-any-return]
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error})") from None
