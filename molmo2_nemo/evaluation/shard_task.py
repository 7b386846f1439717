"""Tasks whose items are the records of a data set of ours."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.records import RecordItems
from molmo2_nemo.evaluation.task import ELSEWHERE, Items, Task, TaskSettings


class ShardTask(Task):
    """A task whose items are the records of a data set that `molmo2 prepare` wrote, as it wrote them."""

    folder: ClassVar[str]  # of the data set, in the folder of data sets
    prepare: ClassVar[str]  # the command that writes it

    def found(self, settings: TaskSettings) -> Path:
        """The folder of the data set.

        Raises:
            UserError: it is not there; says how it is written.
        """
        path = settings.root / self.folder
        if not path.is_dir():
            raise UserError(f"task {self.name}: no data set {path}; write it with `{self.prepare}`, {ELSEWHERE}")
        return path

    def open(self, settings: TaskSettings) -> Items:
        return RecordItems(self.found(settings), self.name, self.scorers)


class OwnData(Task):
    """The records of any data set, each question scored as its style says.

    Args:
        path: its folder, or its address.
    """

    title = "records of your own, scored by their style"
    group = "own data"
    scorers = ()
    max_new_tokens = 256
    video = True

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = Path(path.rstrip("/")).name or "data"  # type: ignore[misc]

    def open(self, settings: TaskSettings) -> Items:
        return RecordItems(self.path, self.name)
