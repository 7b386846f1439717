'''The tasks of `molmo2 evaluate`, one file each. To add one, put a file here that defines `TASK`, whose name is that of
the file:

    """NAME (arXiv ...): what is asked, how many questions, of which split.

    Data: where the files come from, the command that writes them, what cannot be fetched.
    Score: the scorer, and how the official figure is computed from it.
    """

    from molmo2_nemo.evaluation.shard_task import ShardTask

    class Name(ShardTask):
        name = "NAME"
        title = "..."
        group = "image QA"
        scorers = ("anls",)
        folder = "..."
        prepare = "molmo2 prepare ... --split validation"

    TASK = Name()
'''

from __future__ import annotations

import importlib
import pkgutil

from molmo2_nemo.errors import UserError, nearest
from molmo2_nemo.evaluation.task import Task

AUTO = "auto"  # no file's name: records of the user's own, scored by their style


def task_names() -> list[str]:
    """Names of all tasks, from their files."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_task(name: str) -> Task:
    """The task with a name.

    Raises:
        UserError: there is none; the message suggests the nearest name.
    """
    if name not in task_names():
        raise UserError(f"unknown task {name!r}; {nearest(name, [*task_names(), AUTO])}")
    task = importlib.import_module(f"{__name__}.{name}").TASK
    assert isinstance(task, Task) and task.name == name, f"tasks/{name}.py: TASK is not a Task of that name"
    return task
