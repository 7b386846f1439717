"""Benchmarks that are published as tables on the Hub, each row of which has a question with all that it is about."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.errors import DataError, UserError
from molmo2_nemo.evaluation.task import ELSEWHERE, Question, Task, TaskSettings
from molmo2_nemo.evaluation.video_choice import table_rows

Row = Mapping[str, Any]


class Tables:
    """The rows of Parquet files, read a row group at a time.

    Args:
        columns: that are read.

    Raises:
        UserError: a file that is no table, or lacks a column; names both.
    """

    def __init__(self, task: str, dataset: str, paths: Sequence[Path], columns: Sequence[str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        self.columns = list(columns)
        self.places: list[tuple[Path, int, int]] = []  # file, row group, row
        for path in paths:
            try:
                file = parquet.ParquetFile(path)
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"task {task}: {path} cannot be read as Parquet ({error})") from None
            if missing := sorted(set(columns) - set(file.schema_arrow.names)):
                raise UserError(f"task {task}: {path} has no column {missing[0]!r}; is it of {dataset}?")
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self.places += [(path, group, row) for group, size in enumerate(sizes) for row in range(size)]
        self.group: tuple[Any, Any] = (None, None)  # the last that was read, as an Arrow table

    def __len__(self) -> int:
        return len(self.places)

    def row(self, number: int) -> Row:
        import pyarrow.parquet as parquet

        path, group, row = self.places[number]
        if self.group[0] != (path, group):
            self.group = (path, group), parquet.ParquetFile(path).read_row_group(group, columns=self.columns)
        (found,) = self.group[1].slice(row, 1).to_pylist()
        return found  # type: ignore[no-any-return]


class JsonList:
    """The rows of one JSON file, a list of objects.

    Raises:
        UserError: it is none; names the file.
    """

    def __init__(self, path: Path) -> None:
        self.rows = [row for _, row in table_rows(path)]
        self.places = [(path, 0, row) for row in range(len(self.rows))]

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, number: int) -> Row:
        return self.rows[number]


class HubTask(Task):
    """A task whose folder, as downloaded from the Hub, holds tables with texts and pictures."""

    dataset: str  # on the Hub; its last part is the folder's name in the folder of data sets
    tables: str  # pattern of its files: Parquet, or one JSON list
    columns: Sequence[str]
    selects: ClassVar[bool] = False
    max_new_tokens = 32

    def open(self, settings: TaskSettings) -> HubRows:
        folder = settings.root / self.dataset.rpartition("/")[2]
        paths = sorted(folder.glob(self.tables))
        if not paths:
            raise UserError(
                f"task {self.name}: no {folder / self.tables}; download the data set {self.dataset} of huggingface.co "
                f"to this folder, {ELSEWHERE}"
            )
        if paths[0].suffix == ".json":
            return HubRows(self, folder, JsonList(paths[0]))
        return HubRows(self, folder, Tables(self.name, self.dataset, paths, self.columns))

    def kept(self, row: Row) -> bool:
        """Whether a row is a question of the task; asked of every row, at once, where `selects` is set."""
        return True

    @abstractmethod
    def question(self, row: Row, key: str, folder: Path) -> Question:
        """The question of a row.

        Args:
            key: unique to the row; ends in a colon and its number, from 0.

        Raises:
            UserError: a file that is not there.
            KeyError, TypeError, IndexError, AttributeError, ValueError, SyntaxError: not as published.
        """


class HubRows:
    """The rows of all tables of a task, in order of the files' names."""

    def __init__(self, task: HubTask, folder: Path, tables: Tables | JsonList) -> None:
        self.task, self.folder, self.tables = task, folder, tables
        every = range(len(tables))
        self.numbers = [number for number in every if task.kept(tables.row(number))] if task.selects else every

    def __len__(self) -> int:
        return len(self.numbers)

    def questions(self, number: int, builder: ExampleBuilder) -> list[Question]:
        """The question of a row.

        Raises:
            UserError: the row is not as published, or a file that it names is not there; names the row.
        """
        number = self.numbers[number]
        path, _, _ = self.tables.places[number]
        key = f"{path.parent.name}/{path.name}:{number}"
        try:
            return [self.task.question(self.tables.row(number), key, self.folder)]
        except DataError as error:
            raise DataError(f"{key}: {error}") from None
        except (KeyError, TypeError, IndexError, AttributeError, ValueError, SyntaxError) as error:
            says = f"not as {self.task.dataset} is published ({type(error).__name__}: {error})"
            raise DataError(f"{key}: {says}") from None


def picture(value: Any) -> bytes:
    """The file of a picture in a table: {"bytes": ...}, as the Hub writes it.

    Raises:
        DataError: there is none.
    """
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(content, bytes) or not content:
        raise DataError("the row has no picture")
    return content


def pictures(row: Row, columns: Sequence[str]) -> list[bytes]:
    """The pictures of the columns that have one.

    Raises:
        DataError: none has.
    """
    found = [picture(row[name]) for name in columns if row[name] is not None]
    if not found:
        raise DataError("the row has no picture")
    return found
