"""The interface of tasks: where questions come from, which scorers compare the answers, to which group they belong."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.evaluation.results import Group
from molmo2_nemo.inference.prompt import Prompt
from molmo2_nemo.settings.run import EvaluationConfig

# How a message about data that are not there ends.
ELSEWHERE = "or name the folder of your data sets with --root or MOLMO2_DATA (of a run: evaluation.root)"


@dataclass(frozen=True)
class Question:
    """One prompt and what its answer is compared with."""

    key: str  # unique within the task
    prompt: Prompt
    references: tuple[Any, ...] = ()  # texts or objects of JSON values, as the scorers want them
    scorers: tuple[str, ...] = ()  # names; empty: the task's
    tags: Mapping[str, str] = field(default_factory=dict)  # figures are also given for each value of each tag


@dataclass(frozen=True)
class TaskSettings:
    """What a user may choose of a task."""

    root: Path  # folder of data sets (MOLMO2_DATA)
    limit: int | None = None  # items, the first ones; None: all
    seed: int = 0  # of what a task draws or generates
    frames: int | None = None  # most frames of a video in this pass; None: the run's. Length of needles' haystacks
    depths: int = EvaluationConfig.depths  # needles: how many places in the haystack


class Items(Protocol):
    """The items of a task, each with one or several questions. Every rank has the same ones in the same order."""

    def __len__(self) -> int: ...

    def questions(self, number: int, builder: ExampleBuilder) -> list[Question]:
        """The questions of an item, the same at every call.

        Args:
            builder: of the model's examples, for what depends on how much of the media is shown.

        Raises:
            UserError: the item cannot be read; it counts as one wrong answer.
        """
        ...


class Task(ABC):
    """A task is a file in tasks/ that defines TASK, an object of a subclass; its docstring says where the data come
    from and which paper's figure it gives."""

    name: ClassVar[str]  # that of its file
    title: ClassVar[str]  # a one-line description for users
    group: ClassVar[Group]
    scorers: ClassVar[tuple[str, ...]]  # names, the main one first
    max_new_tokens: ClassVar[int] = 64
    video: ClassVar[bool] = False  # whether its media are videos, of which --frames shows more or fewer

    @abstractmethod
    def open(self, settings: TaskSettings) -> Items:
        """The items.

        Raises:
            UserError: data that are not there; says what to fetch and where it goes.
        """

    def check(self, settings: TaskSettings, data: DataConfig) -> None:  # noqa: B027 - most tasks ask whatever is there
        """Called before a model is loaded.

        Args:
            data: how the pass shows media.

        Raises:
            UserError: nothing can be asked that way.
        """

    def draw(self, lines: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """Writes what else there is to see of the answers; called after each pass.

        Args:
            lines: from `run.evaluate`, of all passes so far.
            folder: of results.

        Raises:
            OSError: it cannot be written.
        """
        return
